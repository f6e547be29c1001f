"""Adversarial rows: none may crash, come out nan or be wrong without saying so."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from qstar import (
    acceptance_probability,
    rows_torch,
    solve_kl_symmetry,
    solve_torch_row,
    total_variation,
)
from qstar import (
    rows as geometric,
)
from qstar_book.__main__ import main
from qstar_book.files import write_json
from qstar_book.records import stress

DTYPES = pytest.mark.parametrize("dtype", stress.DTYPES, ids=str)


def test_no_adversarial_row_is_a_fault():
    counts = stress.run(330, seed=3, large=0)
    assert {family for family, _ in counts} == set(stress.FAMILIES)
    assert stress.faults(counts) == 0, stress.table(counts)


PLANTED = {
    "crash": lambda found: 1 / 0,
    "nan": lambda found: dataclasses.replace(found, alpha=found.alpha * torch.nan),
    "unconverged": lambda found: dataclasses.replace(found, converged=found.converged & False),
    "unflagged": lambda found: dataclasses.replace(found, alpha=found.alpha * 0.9),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_counted_and_fails_the_command(fault, monkeypatch, capsys):
    def solve(*rows):
        return PLANTED[fault](rows_torch.solve_kl_symmetry(*rows))

    few = {name: stress.FAMILIES[name] for name in ("opposed", "near-identical")}
    monkeypatch.setattr(stress, "FAMILIES", few)
    counts = stress.run(4, large=0, solve=solve)
    total = {name: sum(getattr(count, name) for count in counts.values()) for name in stress.FAULTS}
    assert total[fault] > 0
    assert sum(total.values()) == total[fault]
    monkeypatch.setattr(stress, "run", lambda *args, **options: counts)
    assert main(["record", "stress", "22"]) == 1
    assert "faults" in capsys.readouterr().out


@DTYPES
@pytest.mark.parametrize("vocab", [2, 50, solve_torch_row.ROW_VOCAB, 50_000])
def test_opposed_favourites_are_solved_at_every_temperature(dtype, vocab):
    """Leads of 33 to 55 nats against 66 ended in a math domain error from 4096 outcomes on."""
    rng = np.random.default_rng(1)
    for temperature in (0.1, 2.0):
        for leads in ((7.3, 2.3), (4.0, 7.0)):
            logits = rng.normal(size=(2, 1, vocab))
            for place, lead in enumerate(leads):
                logits[place, :, place] = logits[place].max(-1) + lead
            pair = torch.tensor(logits / temperature).log_softmax(-1).to(dtype)
            exact = solve_kl_symmetry(*(side.double().log_softmax(-1).numpy() for side in pair))
            for solve in (rows_torch.solve_kl_symmetry, rows_torch.solve_as_on_an_accelerator):
                found = solve(*pair)
                assert found.converged.all()
                np.testing.assert_allclose(found.chernoff, exact.chernoff, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e2, 1e5])
def test_fixed_passes_leave_no_row_of_any_scale_unconverged(scale):
    rng = np.random.default_rng(2)
    for draw in (rng.normal, lambda size: rng.standard_t(1, size)):
        pair = torch.tensor(scale * draw(size=(2, 500, 7))).log_softmax(-1)
        for dtype in (torch.float64, torch.float32):
            assert rows_torch.solve_as_on_an_accelerator(*pair.to(dtype)).converged.all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [50, 4096, 51_000])
def test_a_log_softmax_in_a_half_type_is_a_distribution(dtype, vocab):
    generator = torch.Generator().manual_seed(0)
    for spread in (0.0, 0.3, 3.0):
        logits = (spread * torch.randn(2, vocab, generator=generator)).to(dtype)
        pair = logits.log_softmax(-1)
        for solve in (rows_torch.solve_kl_symmetry, rows_torch.solve_as_on_an_accelerator):
            assert not bool(solve(*pair).is_status("invalid"))
        if dtype == torch.float16:
            solve_kl_symmetry(*pair.numpy())
        with pytest.raises(ValueError, match=r"off by \+"):
            rows_torch.solve_kl_symmetry(pair[0] + 0.25, pair[1])


@pytest.mark.parametrize("vocab", [3, 50_000])
def test_float32_rows_stay_distributions_when_they_are_widened(vocab):
    logits = np.random.default_rng(0).normal(size=(2, vocab)).astype(np.float32)
    pair = [np.float32(x) - np.float32(np.log(np.exp(x).sum())) for x in logits]
    pair = [side + np.float32(2e-5) for side in pair]
    assert solve_kl_symmetry(*(side.astype(np.float64) for side in pair)).converged
    with pytest.raises(ValueError, match=r"not 1 within 0\.0001: it is off by \+3\.0e-04.*float64"):
        solve_kl_symmetry(pair[0].astype(np.float64) + 2.8e-4, pair[1].astype(np.float64))


def test_overlap_and_distance_are_probabilities():
    rng = np.random.default_rng(0)
    rows = torch.tensor(rng.normal(size=(500, 12)) * 3).log_softmax(-1)
    raw = rows.exp().sum(-1)
    assert (raw > 1).any(), "else nothing is tested"
    for dtype in stress.DTYPES:
        given = rows.to(dtype)
        assert rows_torch.acceptance_probability(given, given).max() <= 1
        for other in (given, given.flip(-1)):
            assert rows_torch.total_variation(given, other).min() >= 0
            assert rows_torch.total_variation(given, other).max() <= 1
    assert acceptance_probability(rows.numpy(), rows.numpy()).max() <= 1
    far = (
        np.where(np.arange(12) < 6, rows.numpy(), -np.inf),
        np.where(np.arange(12) < 6, -np.inf, rows.numpy()),
    )
    far = [torch.tensor(side).log_softmax(-1).numpy() for side in far]
    assert total_variation(*far).max() <= 1
    assert geometric.total_variation(*far).min() > 1 - 1e-12


@pytest.mark.parametrize("record", [{"a": object()}, {"a": float("nan")}, {1j: 0}])
def test_a_record_that_is_no_json_leaves_no_file(record, tmp_path):
    with pytest.raises((TypeError, ValueError)):
        write_json(tmp_path / "record.json", record)
    assert list(tmp_path.iterdir()) == []
    write_json(tmp_path / "record.json", {"a": [1, 2]})
    assert json.loads((tmp_path / "record.json").read_text()) == {"a": [1, 2]}
