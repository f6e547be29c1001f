"""Two next-token distributions at many positions: every field against the NumPy reference."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch._subclasses.fake_tensor import FakeTensorMode

import qstar
from qstar.arguments import check_fixed_alpha
from qstar.decoding import diagnostics
from qstar.decoding.diagnostics import concatenate, measure, to_cpu
from qstar.result import STATUSES

VOCAB = 7


def random_distributions(*shape, seed, scale=2.0):
    rng = np.random.default_rng(seed)
    return log_softmax(scale * rng.normal(size=(*shape, VOCAB)), axis=-1)


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_every_field_is_what_the_reference_finds(alpha):
    rows = random_distributions(12, seed=0), random_distributions(12, seed=1, scale=0.7)
    found = measure(*map(torch.tensor, rows), alpha=alpha)
    for place in range(12):
        policy, teacher = rows[0][place], rows[1][place]
        expected = qstar.solve_kl_symmetry(policy, teacher)
        used = expected.alpha if alpha is None else alpha
        log_q = qstar.log_geometric_mean(policy, teacher, used)
        pairs = [
            (found.balance.alpha, expected.alpha),
            (found.balance.chernoff, expected.chernoff),
            (found.balance.curvature, expected.curvature),
            (found.alpha, used),
            (found.minus_log_partition, -qstar.log_partition(policy, teacher, used)),
            (found.minus_log_partition_half, -qstar.log_partition(policy, teacher, 0.5)),
            (found.policy_to_teacher, qstar.kl(policy, teacher)),
            (found.teacher_to_policy, qstar.kl(teacher, policy)),
            (found.accept_policy, qstar.acceptance_probability(policy, log_q)),
            (found.accept_teacher, qstar.acceptance_probability(teacher, log_q)),
            (found.log_ratio_range, np.ptp(policy - teacher)),
        ]
        for actual, wanted in pairs:
            np.testing.assert_allclose(actual[place].numpy(), wanted, atol=1e-9)
        assert STATUSES[found.balance.status[place]] == expected.status


def test_what_solving_buys_is_a_difference_of_log_partitions():
    rows = random_distributions(20, seed=2), random_distributions(20, seed=3)
    found = measure(*map(torch.tensor, rows))
    log_star, log_half = (
        qstar.log_geometric_mean(*rows, at) for at in (found.balance.alpha.numpy(), 0.5)
    )
    gained = found.balance.chernoff - found.minus_log_partition_half
    np.testing.assert_allclose(gained.numpy(), qstar.kl(log_star, log_half), atol=1e-12)
    assert (gained > 1e-4).any()


def test_positions_keep_their_shape_and_blocks_do_not_show(monkeypatch):
    rows = [torch.tensor(random_distributions(3, 5, seed=seed)) for seed in (4, 5)]
    whole = measure(*rows, alpha=0.3)
    assert whole.alpha.shape == whole.balance.status.shape == (3, 5)
    assert (whole.alpha == 0.3).all()
    monkeypatch.setattr(diagnostics, "BLOCK_ENTRIES", 2 * VOCAB)
    in_blocks = measure(*rows, alpha=0.3)
    parts = [measure(*[row[i] for row in rows], alpha=0.3) for i in range(3)]
    joined = to_cpu(concatenate(parts))
    for name in ("minus_log_partition", "accept_policy", "log_ratio_range"):
        wanted = getattr(whole, name)
        torch.testing.assert_close(getattr(in_blocks, name), wanted, rtol=0, atol=1e-14)
        torch.testing.assert_close(getattr(joined, name), wanted.flatten(), rtol=0, atol=1e-14)


def test_narrow_distributions_are_compared_in_float64():
    rows = [torch.tensor(random_distributions(4, seed=seed)).float() for seed in (6, 7)]
    found = measure(*rows)
    assert found.alpha.dtype == torch.float64
    gap = found.balance.kl_to_policy - found.balance.kl_to_teacher
    assert gap.abs().max() < 1e-9


def test_missing_outcomes_are_infinitely_far_and_out_of_the_range():
    policy = np.log([[0.5, 0.3, 0.2, 1e-300]])
    teacher = np.log([[0.1, 0.2, 0.7, 1e-300]])
    policy[0, 3] = teacher[0, 0] = -np.inf
    teacher = teacher - np.log(np.exp(teacher).sum())
    found = measure(torch.tensor(policy), torch.tensor(teacher))
    assert torch.isinf(found.policy_to_teacher).all()
    assert torch.isinf(found.teacher_to_policy).all()
    assert torch.isfinite(found.accept_policy).all()
    ratio = policy[0, 1:3] - teacher[0, 1:3]
    np.testing.assert_allclose(found.log_ratio_range[0].numpy(), np.ptp(ratio), atol=1e-12)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
        measure(torch.zeros(2, 3), torch.zeros(2, 4))


@pytest.mark.parametrize("alpha", [float("inf"), float("nan")])
def test_an_exponent_that_is_no_number_is_refused(alpha):
    with pytest.raises(ValueError, match=f"must be a finite number: got {alpha}"):
        check_fixed_alpha(alpha)


def test_beyond_the_ends_positions_without_a_mean_say_so():
    with np.errstate(divide="ignore"):
        policy = torch.tensor(np.log([[0.5, 0.3, 0.2], [0.5, 0.5, 0.0]]))
        teacher = torch.tensor(np.log([[0.5, 0.5, 0.0], [0.5, 0.3, 0.2]]))
    found = measure(policy, teacher, alpha=1.5)
    assert found.minus_log_partition[0] == -np.inf
    assert found.minus_log_partition[1] < 0
    assert torch.isnan(found.accept_policy).tolist() == [True, False]
    log_q = qstar.log_geometric_mean(policy[1].numpy(), teacher[1].numpy(), 1.5)
    expected = qstar.acceptance_probability(policy[1].numpy(), log_q)
    assert float(found.accept_policy[1]) == pytest.approx(float(expected), abs=1e-12)


def test_a_position_costs_no_mixed_devices():
    """Without a GPU: the tensor parts of a position, run on tensors that claim to be on one."""
    with FakeTensorMode():
        rows = [torch.randn(2, VOCAB, device="cuda").log_softmax(dim=-1) for _ in range(2)]
        found = measure(*rows)
    assert found.alpha.device.type == found.accept_policy.device.type == "cuda"
    assert found.alpha.shape == (2,)


@pytest.mark.parametrize("scale", [0.3, 2.0, 20.0])
def test_no_acceptance_probability_exceeds_one(scale):
    """Equal parents, whose probabilities need not sum to 1 in floating point."""
    rows = torch.tensor(random_distributions(500, seed=5, scale=scale))
    assert (rows.exp().sum(-1) > 1).any(), "the control"
    found = measure(rows, rows)
    for accept in (found.accept_policy, found.accept_teacher):
        assert (accept <= 1).all()
        assert (accept > 1 - 1e-12).all()
