"""The benchmark runs, its solvers agree, and its record is whole; no time is asserted."""

import json

import numpy as np
import pytest

import qstar
from qstar_book.__main__ import main
from qstar_book.records import solver


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """(what the command printed, the record it wrote)."""
    out = tmp_path_factory.mktemp("benchmark") / "results" / "record.json"
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *words: printed.append(" ".join(map(str, words))))
        main(["record", "solver", "--quick", "--out", str(out)])
    assert [path.name for path in out.parent.iterdir()] == ["record.json"]  # no partial file
    return "\n".join(printed), json.loads(out.read_text())


def test_the_record_says_how_it_was_made(quick):
    _, record = quick
    for field in ("command", "date", "seed", "rounds", "tolerance_tv", "device", "rows", "machine"):
        assert field in record
    assert record["machine"].keys() == {"cpu", "cores"}
    assert record["versions"].keys() == {"python", "numpy", "scipy", "torch"}
    assert record["solvers"].keys() == solver.SOLVERS.keys()


def test_every_cell_has_every_solver(quick):
    _, record = quick
    assert [(cell["vocab"], cell["batch"]) for cell in record["cells"]] == [(5_000, 1), (5_000, 3)]
    for cell in record["cells"]:
        assert cell["seconds"].keys() == solver.SOLVERS.keys()
        assert cell["ratio"].keys() == solver.SOLVERS.keys() - {"torch_float32"}
        for ratio in cell["ratio"].values():
            assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
        assert cell["threads"] == 1
        assert cell["passes"]["median"] <= 4
        assert 3e-4 < cell["chernoff"]["min"] < cell["chernoff"]["max"] < 3


def test_every_solver_found_the_same_q_star_before_it_was_timed(quick):
    _, record = quick
    for cell in record["cells"]:
        assert cell["worst_tv"].keys() == solver.SOLVERS.keys() - {"read"}
        assert max(cell["worst_tv"].values()) < 3 * solver.TOLERANCE


def test_every_target_is_judged_and_printed(quick):
    text, record = quick
    assert len(record["targets"]) == len(solver.TARGETS) * len(record["cells"])
    for target in record["targets"]:
        assert target["met"] == (target["ratio"] >= target["needed"])
        assert f"{target['target']}: {target['ratio']:.2f}" in text
    busy = {**record["cells"][0], "clock": "perf_counter", "load": 7.0}
    assert {target["met"] for target in solver.judge([busy])} == {None}
    assert record["machine"]["cpu"] in text


def test_baselines_agree_with_the_reference():
    rows = solver.language_model_like_rows(rows=6, vocab=2_000, seed=3)
    expected = qstar.solve_kl_symmetry(*rows)
    user = [solver.user_brentq(*row) for row in zip(*rows, strict=True)]
    lean = [solver.lean_brentq(*row, 1e-12) for row in zip(*rows, strict=True)]
    np.testing.assert_allclose(user, expected.alpha, rtol=0, atol=1e-9)
    np.testing.assert_allclose(lean, expected.alpha, rtol=0, atol=1e-9)


def test_a_solver_that_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(solver, "user_brentq", lambda *rows: 0.3)
    with pytest.raises(RuntimeError, match="user_brentq must find the reference's q"):
        solver.measure_cell(vocab=500, batch=1, rounds=1, seed=0)


def test_rows_are_normalised_sharp_and_ever_farther_apart():
    rows = solver.language_model_like_rows(rows=8, vocab=20_000, seed=1)
    for log_p in rows:
        np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, atol=1e-12)
        assert (np.sort(np.exp(log_p), axis=-1)[:, -100:].sum(-1) > 0.2).all()
    chernoff = qstar.solve_kl_symmetry(*rows).chernoff
    assert chernoff[-1] > 100 * chernoff[0]
