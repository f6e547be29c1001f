"""The face: one name for one thing, whatever kind the parents are."""

import numpy as np
import pytest
import scipy.stats
import torch

import qstar
from qstar import families, gaussian, rows, rows_torch, solve
from qstar.families import Gamma, Weibull

P, R = np.log([[0.7, 0.2, 0.1], [0.4, 0.4, 0.2]]), np.log([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]])
TENSORS = torch.tensor(P), torch.tensor(R)
GAUSSIANS = qstar.Gaussian(0.0, 1.0), qstar.Gaussian(1.0, 4.0)
FAMILIES = Gamma(2.0, 1.0), Weibull(1.5, 1.0)
FROZEN = scipy.stats.gamma(2.0), scipy.stats.weibull_min(1.5)
KINDS = {
    "arrays": ((P, R), solve, rows),
    "lists": ((P[0].tolist(), R[0].tolist()), solve, rows),
    "tensors": (TENSORS, rows_torch, rows_torch),
    "Gaussians": (GAUSSIANS, gaussian, gaussian),
    "families": (FAMILIES, families, families),
    "frozen": (FROZEN, families, families),
    "a frozen one and a Gaussian": ((scipy.stats.laplace(), GAUSSIANS[1]), families, families),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_face_is_the_function_of_the_parents_kind(kind):
    parents, solver, home = KINDS[kind]
    assert qstar.solve_kl_symmetry(*parents) == solver.solve_kl_symmetry(*parents)
    assert np.array_equal(qstar.kl(*parents), home.kl(*parents))
    alpha = torch.full((2,), 0.3, dtype=torch.float64) if kind == "tensors" else 0.3
    found, own = qstar.log_partition(*parents, 0.3), home.log_partition(*parents, alpha)
    assert np.array_equal(found, own)
    names = ["log_geometric_mean"] if home in (rows, rows_torch) else ["geometric_mean"]
    (name,) = names
    middle = getattr(qstar, name)(*parents, 0.3)
    np.testing.assert_array_equal(qstar.kl(middle, middle), 0 * np.asarray(qstar.kl(*parents)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_status_compares_with_its_name_whatever_the_kind(kind):
    balance = qstar.solve_kl_symmetry(*KINDS[kind][0])
    assert np.all(np.asarray(balance.status == "interior"))
    assert np.all(np.asarray(balance.status == qstar.Status.interior))
    assert not np.any(np.asarray(balance.status == "disjoint"))
    if np.ndim(balance.alpha) == 0:
        assert balance.status is qstar.Status.interior


def test_rows_alone_have_a_total_variation():
    for name in ("total_variation", "acceptance_probability"):
        ours = getattr(qstar, name)
        np.testing.assert_allclose(ours(*TENSORS).numpy(), ours(P, R), rtol=0, atol=1e-15)
        with pytest.raises(TypeError, match="rows of log-probabilities, arrays or tensors: got Ga"):
            ours(*GAUSSIANS)


@pytest.mark.parametrize("pair", [(P, TENSORS[1]), (GAUSSIANS[0], R), (TENSORS[0], FROZEN[1])])
def test_two_kinds_are_refused(pair):
    for ask in (qstar.solve_kl_symmetry, qstar.kl):
        with pytest.raises(TypeError, match="must be of one kind, two arrays, two tensors or two"):
            ask(*pair)


def test_what_a_kind_does_not_have_is_said_with_what_it_has():
    with pytest.raises(TypeError, match=r"call qstar\.log_geometric_mean"):
        qstar.geometric_mean(P, R, 0.5)
    with pytest.raises(TypeError, match=r"call qstar\.geometric_mean"):
        qstar.log_geometric_mean(*GAUSSIANS, 0.5)


@pytest.mark.parametrize("alpha", [0.3, [0.3, 0.3], np.full(2, 0.3), torch.tensor(0.3).double()])
def test_exponents_of_tensors_may_be_numbers_lists_arrays_or_tensors(alpha):
    for name in ("log_geometric_mean", "log_partition"):
        ours, theirs = getattr(qstar, name), getattr(rows, name)
        np.testing.assert_allclose(ours(*TENSORS, alpha), theirs(P, R, 0.3), rtol=0, atol=1e-7)
