"""q* against its rivals: none is better, and a record gives back what was written."""

import numpy as np
import pytest
from scipy.special import log_softmax

from qstar import kl, solve_kl_symmetry
from qstar_book.records.baselines import compare, join, read, write

RNG = np.random.default_rng(0)
LOG_P, LOG_R = (log_softmax(2 * RNG.normal(size=(12, 30)), axis=-1) for _ in "pr")
RIVALS = compare(LOG_P, LOG_R)


def test_every_rival_pays_at_least_what_it_strays():
    """max KL(q || parent) - C >= KL(q || q*) > 0 is the minimax bound of q*."""
    for name, excess in RIVALS.excess.items():
        assert (excess > 0).all(), name
    np.testing.assert_array_equal(RIVALS.chernoff, solve_kl_symmetry(LOG_P, LOG_R).chernoff)


def test_the_best_mixture_is_the_best_of_the_mixtures():
    mixtures = [RIVALS.excess[name] for name in ("mixture alpha*", "midpoint", "forward centre")]
    assert (RIVALS.excess["best mixture"] <= np.min(mixtures, axis=0)).all()
    forward = [values for name, values in RIVALS.forward.items() if name != "forward centre"]
    assert (RIVALS.forward["forward centre"] <= np.min(forward, axis=0)).all()


def test_one_sided_mass_is_counted_under_q_star():
    log_p, log_r = np.log([[0.98, 0.01, 0.01]]), np.log([[0.01, 0.98, 0.01]])
    assert 0.95 < compare(log_p, log_r).one_sided[0] < 0.96
    assert compare(log_p, log_p[:, ::-1].copy()).one_sided[0] < 1


def test_a_record_gives_back_what_was_written(tmp_path):
    both = join([RIVALS, RIVALS])
    write({"a kind, [odd]": both}, {"command": "test"}, tmp_path / "record.json")
    kinds, made_by = read(tmp_path / "record.json")
    assert made_by == {"command": "test"}
    found = kinds["a kind, [odd]"]
    assert len(found.alpha) == 2 * len(LOG_P)
    for table in ("excess", "strayed", "forward"):
        assert getattr(found, table).keys() == getattr(both, table).keys()
        for name, values in getattr(both, table).items():
            np.testing.assert_allclose(getattr(found, table)[name], values, rtol=1e-3)


def test_a_failed_write_leaves_no_record(tmp_path):
    with pytest.raises(TypeError):
        write({"kind": RIVALS}, {"command": object()}, tmp_path / "record.json")
    assert list(tmp_path.iterdir()) == []


def test_strayed_is_measured_from_q_star():
    same = compare(LOG_P, LOG_P)
    assert all(np.abs(values).max() < 1e-12 for values in same.strayed.values())
    assert (RIVALS.strayed["alpha 0.5"] < kl(LOG_P, LOG_R)).all()
