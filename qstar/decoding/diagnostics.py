"""Two next-token distributions, position by position: alpha* and what goes with it.

Nothing here draws a token; `qstar.rows` is the reference in NumPy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_fixed_alpha
from ..result import Balance
from ..rows_torch import (
    acceptance_probability,
    kl,
    log_geometric_mean,
    log_partition,
    solve_kl_symmetry,
)

TensorBalance = Balance[Tensor, Tensor, Tensor]

BLOCK_ENTRIES = 2**18
"""Rows times vocabulary that `measure` takes at a time: it bounds the memory, and fits a cache."""


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """The two parents at every position, shape (*positions). Divergences are in nats.

    Attributes:
        balance: alpha*, the Chernoff information, the status and the rest of the solution.
        alpha: The exponent that was used: alpha*, unless it was fixed.
        minus_log_partition: -log Z(alpha); at alpha* it is the Chernoff information, outside
            [0, 1] never positive, and -inf where there is no q_alpha.
        minus_log_partition_half: -log Z(1/2), the Bhattacharyya distance of the parents. It is
            below the Chernoff information by KL(q* || q_1/2): what solving for alpha* buys.
        policy_to_teacher: KL(policy || teacher).
        teacher_to_policy: KL(teacher || policy).
        accept_policy: The acceptance probability of a token drafted by the policy if the output
            must follow q_alpha; nan where there is none.
        accept_teacher: The same for a token drafted by the teacher.
        log_ratio_range: The largest minus the smallest of log policy - log teacher over the shared
            support, which bounds how far alpha* can be from 1/2.
    """

    balance: TensorBalance
    alpha: Tensor
    minus_log_partition: Tensor
    minus_log_partition_half: Tensor
    policy_to_teacher: Tensor
    teacher_to_policy: Tensor
    accept_policy: Tensor
    accept_teacher: Tensor
    log_ratio_range: Tensor


def measure(log_policy: Tensor, log_teacher: Tensor, *, alpha: float | None = None) -> Comparison:
    """Compare the parents at positions where they have these distributions.

    Args:
        log_policy: In any precision; computed in float64. Shape (*positions, vocab).
        log_teacher: The same of the teacher.
        alpha: None solves for alpha*; a number fixes the exponent, outside [0, 1] too.

    Raises:
        ValueError: The shapes differ, or a row is not a distribution.
    """
    if log_policy.shape != log_teacher.shape or log_policy.ndim == 0:
        raise ValueError(
            f"log_policy and log_teacher must have one shape, vocabulary last: got "
            f"{tuple(log_policy.shape)} and {tuple(log_teacher.shape)}."
        )
    fixed = check_fixed_alpha(alpha)
    *shape, vocab = log_policy.shape
    rows = max(1, BLOCK_ENTRIES // vocab)
    pairs = zip(
        log_policy.reshape(-1, vocab).split(rows),
        log_teacher.reshape(-1, vocab).split(rows),
        strict=True,
    )
    flat = concatenate([_compare(_widen(p), _widen(r), fixed) for p, r in pairs])
    return _map(lambda values: values[0].reshape(shape), flat)


def concatenate(comparisons: Sequence[Comparison]) -> Comparison:
    """One comparison of all their positions, which must be along a single axis."""
    return _map(torch.cat, *comparisons)


def to_cpu(comparison: Comparison) -> Comparison:
    """The same comparison, ready for NumPy."""
    return _map(lambda values: values[0].cpu(), comparison)


def _widen(log_p: Tensor) -> Tensor:
    """The same distributions in the widest type the device has, normalised in it."""
    wide = torch.float32 if log_p.device.type == "mps" else torch.float64
    return torch.log_softmax(log_p, dim=-1, dtype=wide)


def _compare(log_policy: Tensor, log_teacher: Tensor, fixed: float | None) -> Comparison:
    balance = solve_kl_symmetry(log_policy, log_teacher)
    alpha = balance.alpha if fixed is None else torch.full_like(balance.alpha, fixed)
    log_q = log_geometric_mean(log_policy, log_teacher, alpha)
    shared = torch.isfinite(log_policy) & torch.isfinite(log_teacher)
    log_ratio = torch.where(shared, log_policy - log_teacher, torch.nan)
    return Comparison(
        balance=balance,
        alpha=alpha,
        minus_log_partition=-log_partition(log_policy, log_teacher, alpha),
        minus_log_partition_half=-log_partition(
            log_policy, log_teacher, torch.full_like(alpha, 0.5)
        ),
        policy_to_teacher=kl(log_policy, log_teacher),
        teacher_to_policy=kl(log_teacher, log_policy),
        accept_policy=acceptance_probability(log_policy, log_q),
        accept_teacher=acceptance_probability(log_teacher, log_q),
        log_ratio_range=log_ratio.nan_to_num(-torch.inf).amax(dim=-1)
        - log_ratio.nan_to_num(torch.inf).amin(dim=-1),
    )


def _map(function: Callable[[list[Tensor]], Tensor], *records: Comparison) -> Comparison:
    """A comparison whose every field is the function of that field of all the records."""

    def mapped(parts: Sequence[Any], names: Sequence[str]) -> dict[str, Tensor]:
        return {name: function([getattr(part, name) for part in parts]) for name in names}

    balance = Balance(**mapped([record.balance for record in records], Balance.__slots__))
    others = [name for name in Comparison.__slots__ if name != "balance"]
    return Comparison(balance=balance, **mapped(records, others))
