"""alpha* for many rows of tensors at once: the complete algorithm, on any device.

`qstar.rows_torch.solve_kl_symmetry` calls it. Every branch is a `where`, so that nothing is read
back. `qstar.solve_torch_row` is quicker with a plain long row on a CPU, and `qstar.rows_triton` is
the same algorithm in fused kernels.

It looks for the root of F' for F = log Z, from alpha = 1/2, by Newton's method on the log of the
ratio of what raises F' to what lowers it, log E[max(l, 0)] - log E[max(-l, 0)]: for two outcomes a
straight line in alpha, and nearly one for many, where F' itself may be a staircase. Where the
supports agree a bracket starts at [1 - B(R), B(R)], R being the range of the log-ratio and
B(R) = log((e^R - 1) / R) / R; where they do not, the slopes at the two ends decide between a
boundary and the bracket [0, 1]. A row stops where

    |F'(alpha)| <= max(2 tolerance sqrt(F''), floor),

which puts q_alpha within about `tolerance` of q* in total variation. The floor is what rounding
leaves of F', eps / 2 (sqrt(F'') (1 + E_q[|log policy| + |log teacher|]) + F''). A row also stops
where its bracket [a, b] is too short to matter: (b - a) |F'| <= 4 tolerance^2, which bounds the
error surely, or b - a <= 4 eps.

What is guaranteed: the bracket holds alpha* and never grows. Every third pass takes Newton's step
only if the last one brought the log-odds down to half; else it goes to the middle, and halves the
bracket. (In between the log-odds may rise, so three passes need not halve either.) Once
u = M |alpha - alpha*| is at most 1/2, where M is the largest |log-ratio|, Newton's next error is at
most (e^u - 1 - u) / M. So a fixed number of passes promises no tolerance to every row: `converged`
says whether a row met it, and `slope` by how much the two divergences differ.

Derived in: the chapter "Solving for alpha*", thm-log-odds; the bracket follows from
    |F'''| <= R F''.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import rows as geometric
from .result import STATUSES

NORMALISATION_TOLERANCE = {
    getattr(torch, name): most for name, most in geometric.NORMALISATION_TOLERANCE.items()
}
"""How far a row's probabilities may sum from 1, by the dtype they came in; see `allowed_error`."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-4}
"""The default of `tolerance`, by the coarser of the two dtypes."""
MAX_PASSES = 64  # where rows stop by themselves
FIXED_PASSES = 16  # on an accelerator without fused kernels, where they all run on
INTERIOR, BOUNDARY_0, BOUNDARY_1, DEGENERATE_ALL, DISJOINT, INVALID = range(len(STATUSES))


class Plan(NamedTuple):
    """The options of one call, resolved."""

    tolerance: float
    came_as: tuple[torch.dtype, torch.dtype]  # of the two parents
    dtype: torch.dtype
    max_passes: int
    chunk_rows: int
    early_exit: bool  # rows may stop by themselves: their values may be read on the host
    validate: bool
    fused: bool = False  # by `rows_triton`


class Fields(NamedTuple):
    """The fields of a `Balance`, in its order."""

    alpha: Tensor
    chernoff: Tensor
    kl_to_policy: Tensor
    kl_to_teacher: Tensor
    status: Tensor
    converged: Tensor
    slope: Tensor
    curvature: Tensor
    passes: Tensor


def computing_dtype(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def allowed_error(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """How far each of these rows, which came in `dtype`, may sum from 1.

    Rounding log p to `dtype` moves it by up to eps |log p| / 2, and so the sum by eps / 2 times
    -sum p log p, which is at most log V.
    """
    base, most = NORMALISATION_TOLERANCE[dtype], math.log(rows.shape[-1])
    if not (slack := rounding_slack(dtype)):
        return rows.new_full(rows.shape[:-1], base)
    size = torch.where(rows == -torch.inf, 0.0, rows.exp() * rows.abs()).sum(-1)
    return base + slack * size.clamp(max=most)


def rounding_slack(dtype: torch.dtype) -> float:
    """What `allowed_error` grows by with -sum p log p."""
    return 0.0 if dtype in (torch.float64, torch.float32) else torch.finfo(dtype).eps / 2


def solve_block(log_policy: Tensor, log_teacher: Tensor, plan: Plan) -> Fields:
    """The complete algorithm on a few rows at once; every branch is a `where`."""
    policy, teacher = log_policy.to(plan.dtype), log_teacher.to(plan.dtype)
    eps = torch.finfo(plan.dtype).eps
    valid = [
        (rows.logsumexp(-1).exp() - 1).abs() <= allowed_error(rows, dtype)
        for rows, dtype in zip((policy, teacher), plan.came_as, strict=True)
    ]
    path = _path(policy, teacher)
    at_0, at_1 = (path.moments(torch.full_like(path.unshared, end)) for end in (0.0, 1.0))
    partial = ((policy == -torch.inf) != (teacher == -torch.inf)).any(-1)
    status = torch.full_like(partial, INTERIOR, dtype=torch.int8)
    for code, rows in (  # of two that apply the later one counts
        (BOUNDARY_1, partial & (at_1.slope <= 2 * eps * (1 + at_1.size))),
        (BOUNDARY_0, partial & (at_0.slope >= -2 * eps * (1 + at_0.size))),
        (DEGENERATE_ALL, (path.ratio.abs() <= 2 * eps * (1 + path.size)).all(-1)),
        (DISJOINT, (path.base == -torch.inf).all(-1)),
        (INVALID, (valid[0] & valid[1]).logical_not()),
    ):
        status = status.masked_fill(rows, code)
    alpha = torch.full_like(path.unshared, 0.5)  # filled, not copied from the host: capturable
    for code, start in ((BOUNDARY_0, 0.0), (BOUNDARY_1, 1.0)):
        alpha = alpha.masked_fill(status == code, start)
    alpha = alpha.masked_fill(status > DEGENERATE_ALL, torch.nan)
    high = torch.where(partial, 1.0, _highest_alpha(path.ratio))
    search = _Search(
        alpha=alpha,
        low=1 - high,
        high=high,
        left=at_0.tangent(0.0),
        right=at_1.tangent(1.0),
        last=torch.full_like(alpha, torch.inf),
        passes=torch.full_like(status, 2, dtype=torch.int32),  # the two ends
        done=status != INTERIOR,
    )
    alpha, slope, curvature, passes, done = _minimise(path, search, plan)
    chernoff = torch.where(status == DISJOINT, torch.inf, -path.log_partition(alpha)).clamp(min=0)
    chernoff = chernoff + 0.0  # no -0.0
    to_policy, to_teacher = (
        torch.where(status == DISJOINT, torch.inf, chernoff + share).clamp(min=0)
        for share in ((alpha - 1) * slope, alpha * slope)
    )
    converged = done & (status <= DEGENERATE_ALL)
    return Fields(
        alpha, chernoff, to_policy, to_teacher, status, converged, slope, curvature, passes
    )


class _Moments(NamedTuple):
    """log Z and its derivatives at one alpha per row, and the scale of their rounding."""

    log_z: Tensor
    slope: Tensor
    curvature: Tensor
    size: Tensor  # E_q[|log policy| + |log teacher|]

    def tangent(self, alpha: Tensor | float) -> Tensor:
        """The line that touches log Z here, as (value at alpha = 0, slope)."""
        return torch.stack([self.log_z - alpha * self.slope, self.slope], dim=-1)


class _Path(NamedTuple):
    """Normalised rows, as every point of their path needs them."""

    base: Tensor  # log teacher; -inf off the shared support
    ratio: Tensor  # log policy - log teacher; 0 off the shared support
    size: Tensor  # |log policy| + |log teacher|; 0 off the shared support
    unshared: Tensor  # the teacher's mass off the shared support

    def moments(self, alpha: Tensor) -> _Moments:
        # Sums of products, not matrix products: those may run in TF32 or bfloat16.
        weight = torch.addcmul(self.base, self.ratio, alpha.unsqueeze(-1))
        top = weight.amax(-1, keepdim=True)
        z = weight.sub_(top).exp_().sum(-1, keepdim=True)
        weight.div_(z)
        size = (weight * self.size).sum(-1)
        slope = (weight * self.ratio).sum(-1)
        deviation = self.ratio - slope.unsqueeze(-1)
        # One factor at a time: the square of a huge log-ratio overflows, times a weight of 0.
        curvature = weight.mul_(deviation).mul_(deviation).sum(-1)
        return _Moments((top + z.log()).squeeze(-1), slope, curvature, size)

    def log_odds(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """log of (what raises the slope) / (what lowers it), and its derivative in alpha.

        Each side is scaled by its own largest term, so that neither underflows.
        """
        log_path = torch.addcmul(self.base, self.ratio, alpha.unsqueeze(-1))
        lowest = torch.finfo(log_path.dtype).min
        sides = []
        for sign in (1, -1):
            pull = (sign * self.ratio).clamp(min=0)
            weight = torch.where(pull > 0, log_path, -torch.inf)
            top = weight.amax(-1, keepdim=True)
            weight = weight.sub_(top.clamp(min=lowest)).exp_().mul_(pull)
            total = weight.sum(-1)
            sides.append((top.squeeze(-1) + total.log(), weight.mul_(pull).sum(-1) / total))
        (up, mean_up), (down, mean_down) = sides
        return up - down, mean_up + mean_down

    def log_partition(self, alpha: Tensor) -> Tensor:
        log_path = torch.addcmul(self.base, self.ratio, alpha.unsqueeze(-1))
        log_z = log_path.logsumexp(-1)
        # Between close parents Z is 1 - a little: sum what each outcome lacks, not what it has.
        teacher = self.base.exp()
        growth = torch.where(
            self.ratio.abs() < 1,
            teacher * (alpha.unsqueeze(-1) * self.ratio).expm1(),
            log_path.exp() - teacher,
        )
        return torch.where(log_z > -0.5, (growth.sum(-1) - self.unshared).log1p(), log_z)


def _path(policy: Tensor, teacher: Tensor) -> _Path:
    shared = torch.isfinite(policy) & torch.isfinite(teacher)
    ratio = torch.where(shared, policy - teacher, 0.0)
    log_total = teacher.logsumexp(-1, keepdim=True)
    teacher = teacher - log_total
    teacher_mass = teacher.exp()
    # log(sum policy / sum teacher) from the sum of their differences: exact to the size of the
    # log-ratio, where a difference of two sums would leave the rounding of a whole row.
    growth = torch.where(
        shared & (ratio.abs() < 1),
        teacher_mass * ratio.expm1(),
        (policy - log_total).exp() - teacher_mass,
    ).sum(-1)
    shift = (growth / teacher_mass.sum(-1)).log1p().unsqueeze(-1)
    ratio = torch.where(shared, ratio - shift, 0.0)
    size = torch.where(shared, -(2 * teacher + ratio), 0.0)
    return _Path(
        base=torch.where(shared, teacher, -torch.inf),
        ratio=ratio,
        size=size.clamp(max=torch.finfo(size.dtype).max),
        unshared=torch.where(shared, 0.0, teacher_mass).sum(-1),
    )


class _Search(NamedTuple):
    """Where the search for the minimum of log Z stands, per row."""

    alpha: Tensor
    low: Tensor
    high: Tensor
    left: Tensor  # the tangent nearest to the minimum from below
    right: Tensor  # and from above
    last: Tensor  # the log-odds at the previous alpha
    passes: Tensor
    done: Tensor

    def step(
        self, path: _Path, at: _Moments, passes: Tensor, done: Tensor, *, halve: bool
    ) -> "_Search":
        """Shrink the bracket and move to the next alpha, unless done.

        By Newton's step on the log-odds; where that leaves the bracket, or they have neither halved
        nor changed sign, to where the two tangents meet (for parents so far apart that log Z is a
        polygon this is its corner); or else to the middle of the bracket. Where `halve`, a change
        of sign is not enough and the middle comes first: one of the two is halved.
        """
        falls, rises = at.slope < 0, at.slope > 0
        tangent = at.tangent(self.alpha)
        low, high = (
            torch.where(side, self.alpha, end)
            for side, end in ((falls, self.low), (rises, self.high))
        )
        left, right = (
            torch.where(side.unsqueeze(-1), tangent, line)
            for side, line in ((falls, self.left), (rises, self.right))
        )
        log_odds, gain = path.log_odds(self.alpha)
        newton, better = self.alpha - log_odds / gain, 2 * log_odds.abs() <= self.last.abs()
        new = (low + high) / 2
        if not halve:
            (left_value, left_slope), (right_value, right_slope) = left.unbind(-1), right.unbind(-1)
            corner = (left_value - right_value) / (right_slope - left_slope)
            new = torch.where((low < corner) & (corner < high), corner, new)
            better = better | (log_odds * self.last < 0)
        new = torch.where((low < newton) & (newton < high) & better, newton, new)
        alpha = torch.where(done, self.alpha, new)
        return _Search(alpha, low, high, left, right, log_odds, passes, done)


def _minimise(path: _Path, search: _Search, plan: Plan) -> tuple[Tensor, ...]:
    """(alpha, slope, curvature, passes, done) per row, evaluated at the alpha returned."""
    eps = torch.finfo(plan.dtype).eps
    found: tuple[Tensor, ...] = ()
    live = None  # which rows are still in the work; None for all
    for count in range(1, plan.max_passes + 1):
        at = path.moments(search.alpha)
        deviation, size = at.curvature.sqrt(), at.slope.abs()
        floor = eps / 2 * (deviation * (1 + at.size) + at.curvature)
        width = search.high - search.low
        done = (
            search.done
            | (size <= torch.maximum(2 * plan.tolerance * deviation, floor))
            | (size * width <= 4 * plan.tolerance**2)
            | (width <= 4 * eps)
        )
        passes = search.passes + search.done.logical_not()
        here = (search.alpha, at.slope, at.curvature, passes, done)
        if live is None:
            found = here
        else:
            found = tuple(x.index_copy(0, live, y) for x, y in zip(found, here, strict=True))
        if plan.early_exit:  # only a CPU may look
            num_done = int(done.sum())
            if num_done == len(done):
                break
        search = search.step(path, at, passes, done, halve=count % 3 == 0)
        if plan.early_exit and 2 * num_done >= len(done):
            keep = (~done).nonzero().squeeze(1)
            live = keep if live is None else live[keep]
            path = _Path(*(values[keep] for values in path))
            search = _Search(*(values[keep] for values in search))
    return found


def _highest_alpha(ratio: Tensor) -> Tensor:
    """B(R) = log((e^R - 1) / R) / R, with room for rounding: alpha* is in [1 - B, B].

    R is the range of the log-ratio, and the supports agree.
    """
    most = torch.finfo(ratio.dtype).max / 4
    extent = (ratio.amax(-1) / 2 - ratio.amin(-1) / 2).clamp(max=most) * 2
    bound = 1 + ((-extent.neg().exp()).log1p() - extent.log()) / extent
    bound = torch.where(extent < 0.01, 0.5 + extent / 24, bound)
    return (bound + 1e-3).clamp(max=1)
