"""alpha* for one row on a CPU: few sweeps, over buffers that stay in its cache.

The arithmetic in between is in Python floats. Whatever is not plain here (an outcome that a parent
excludes, parents that nearly agree, a path that sits on one outcome) is left to
`qstar.solve_torch`.

Halley's method on F = log Z, in a bracket that begins as [0, 1]: after a step that did not halve
the slope, and for one that would leave the bracket, its middle is next. A row stops by the rule of
`qstar.solve_torch`, or after a step on which two models of F of different order agree: the cubic
that Halley's method solves, and the quintic that also knows F(0) = F(1) = 0. What the quintic adds
must be a twentieth of what that rule allows; its minimum is then returned, and `slope` and
`curvature` are read off it.
"""

import math
import threading
from typing import NamedTuple

import torch
from torch import Tensor

from .solve_torch import NORMALISATION_TOLERANCE, Fields, Plan, solve_block

ROW_VOCAB = 4096  # from here on a CPU row pays for its own Python,
ROWS = 16  # and up to here for rows of every size: a block takes some 400 operations
ROW_PASSES = 16  # after which `_solve_row` leaves a row: rounding may decide its slope's sign
CLOSE = 1e-3  # -log Z(1/2) below which `_solve_row` sums differences, for an expm1 more
EQUAL = 1e-9  # curvature below which it leaves the row to `solve_block`
CANCELLED = 1e-2  # of E[x^2], the least that E[x^2] - E[x]^2 must be to count as the variance
SAFETY = 0.1  # of what the tolerance allows, the most that `_solve_row`'s last step may rest on
LOG2_E = 1 / math.log(2)


def alone_pays(rows: int, vocab: int) -> bool:
    """Whether so many rows of a CPU are solved sooner one by one than together."""
    return vocab >= ROW_VOCAB or rows <= ROWS


def solve_one_by_one(log_policy: Tensor, log_teacher: Tensor, plan: Plan) -> tuple[Fields, bool]:
    """The fields from rows on the CPU that are solved one by one, and whether all were plain."""
    *batch, vocab = log_policy.shape
    work = _workspace(vocab, plan.dtype)
    sides = [x.reshape(-1, vocab).unbind() if batch else (x,) for x in (log_policy, log_teacher)]
    solved = [_solve_alone(p, r, work, plan) for p, r in zip(*sides, strict=True)]
    fields = _from_rows(solved, batch, plan)
    left = [row for row, found in enumerate(solved) if found is None]
    found = [([row], few) for row, few in enumerate(solved) if isinstance(few, Fields)]
    for start in range(0, len(left), plan.chunk_rows):
        rows = left[start : start + plan.chunk_rows]
        policy, teacher = (torch.stack([side[row] for row in rows]) for side in sides)
        found.append((rows, solve_block(policy, teacher, plan)))
    for rows, values in found:
        for field, value in zip(fields, values, strict=True):
            field.view(-1)[rows] = value
    return fields, not found


_LOCAL = threading.local()


def _workspace(vocab: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Buffers for one row, kept from call to call by each thread.

    Between calls a decoder's other work lets the allocator give memory back to the system, and
    touching fresh pages then costs as much as solving the row.
    """
    kept: tuple[Tensor, ...] | None = getattr(_LOCAL, "buffers", None)
    if kept is None or len(kept[0]) != vocab or kept[0].dtype != dtype:
        with torch.inference_mode(False):  # made there, it could not be written to elsewhere
            kept = torch.empty(5, vocab, dtype=dtype, device="cpu").unbind()
        if type(kept[0]) is Tensor:  # and not a fake one
            _LOCAL.buffers = kept
    return kept


def _solve_alone(
    policy: Tensor, teacher: Tensor, work: tuple[Tensor, ...], plan: Plan
) -> "_Row | Fields | None":
    """One row on the CPU; None if it is not plain, nor made so by what is not shared."""
    policy, teacher = policy.to(plan.dtype), teacher.to(plan.dtype)
    if found := _solve_row(policy, teacher, work, plan):
        return found
    if bool((policy - teacher).isfinite().all()):
        return None
    policy, teacher = _condense(policy, teacher)
    if len(policy) > len(work[0]):
        return None
    few = tuple(x[: len(policy)] for x in work)
    return _solve_row(policy, teacher, few, plan) or solve_block(policy[None], teacher[None], plan)


def _condense(policy: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The same problem on the shared outcomes alone, as after top-k.

    What a parent holds outside the shared support counts only by its sum: one more outcome each.
    """
    shared = policy.isfinite() & teacher.isfinite()
    nothing = policy.new_full((1,), -torch.inf)
    outside = [torch.cat([rows[~shared], nothing]).logsumexp(0)[None] for rows in (policy, teacher)]
    policy, teacher = policy[shared], teacher[shared]
    if len(policy) and all(bool(mass == -torch.inf) for mass in outside):
        return policy, teacher
    return torch.cat([policy, outside[0], nothing]), torch.cat([teacher, nothing, outside[1]])


class _Row(NamedTuple):
    """What `_solve_row` found: an interior solution that met its stopping rule."""

    values: tuple[float, ...]  # alpha, chernoff, kl_to_policy, kl_to_teacher, slope, curvature
    passes: int

    @classmethod
    def at(cls, alpha: float, log_z: float, slope: float, curvature: float, passes: int) -> "_Row":
        chernoff = max(-log_z, 0.0)
        to_policy = max(chernoff - (1 - alpha) * slope, 0.0)
        to_teacher = max(chernoff + alpha * slope, 0.0)
        return cls((alpha, chernoff, to_policy, to_teacher, slope, curvature), passes)


def _solve_row(
    log_policy: Tensor, log_teacher: Tensor, work: tuple[Tensor, ...], plan: Plan
) -> _Row | None:
    """One plain row on the CPU; None for one that `solve_block` must solve.

    Powers of two, not of e: torch's exp goes through a library that is slow on some processors,
    and its exp2 does not. The path is not shifted by its largest term: it is never positive, and
    a row whose sum is so small that terms may have been lost is not plain.
    """
    ratio, base, path, *spare = work
    torch.mul(log_policy, LOG2_E, out=path)
    policy_total = path.exp2_().sum().item()
    torch.mul(log_teacher, LOG2_E, out=base)
    teacher_total = torch.exp2(base, out=path).sum().item()
    for total, dtype in zip((policy_total, teacher_total), plan.came_as, strict=True):
        if not abs(total - 1) <= NORMALISATION_TOLERANCE[dtype]:
            return None
    torch.sub(log_policy, log_teacher, out=ratio)

    def log_growth(alpha: float) -> float:
        """log(sum teacher e^(alpha ratio) / sum teacher), also where it is next to nothing."""
        growth = torch.mul(ratio, alpha, out=spare[0]).expm1_()
        growth.mul_(torch.exp2(base, out=spare[1]))
        total = growth.sum().item() / teacher_total
        return math.log1p(total) if total > -0.5 else math.nan  # nan: leave it to the block

    # Renormalising shifts the log-ratio, and log Z, by constants: no sweep is needed.
    shift = math.log(policy_total) - math.log(teacher_total)
    alpha, last, close = 0.5, math.inf, False
    low, high = 0.0, 1.0  # F' rises from below 0 to above: all outcomes are shared
    for passes in range(1, min(plan.max_passes, ROW_PASSES) + 1):
        torch.add(base, ratio, alpha=alpha * LOG2_E, out=path)
        z = path.exp2_().sum().item()
        if not z > 1e-12:  # terms below the smallest float may matter
            return None
        mean = path.mul_(ratio).sum().item() / z
        square = path.mul_(ratio).sum().item() / z
        curvature = square - mean * mean
        # Also nan, from an outcome that a parent excludes. A variance that is a small difference
        # says nothing, least of all that the parents are close: q may sit on one token.
        if not curvature > max(EQUAL, CANCELLED * square):
            return None
        log_z = math.log(z / teacher_total) - alpha * shift
        if passes == 1 and log_z > -CLOSE:
            close, shift = True, log_growth(1.0)
        slope = mean - shift
        low, high = (low, alpha) if slope > 0 else (alpha, high)
        if close:
            log_z = log_growth(alpha) - alpha * shift
        if abs(slope) <= 2 * plan.tolerance * math.sqrt(curvature):
            return _Row.at(alpha, log_z, slope, curvature, passes)
        third = path.mul_(ratio).sum().item() / z - 3 * mean * curvature - mean**3
        step = _step(slope, curvature, third)
        series = _through_the_ends(alpha, log_z, slope, curvature, third)
        _, left, bend = _evaluate(series, step)
        better = step - left / bend if bend > 0 else math.nan
        if not (abs(slope) <= last / 2 and low < alpha + better < high):
            alpha, last = (low + high) / 2, math.inf
            continue
        # What the quintic adds to the slope, term by term: their sum may vanish by chance.
        added = abs(4 * series[4] * step**3) + abs(5 * series[5] * step**4)
        if added <= SAFETY * plan.tolerance * math.sqrt(curvature):
            return _Row.at(alpha + better, *_evaluate(series, better), passes)
        alpha, last = alpha + better, abs(slope)
    return None


def _step(slope: float, curvature: float, third: float) -> float:
    """The root of slope + curvature x + third x^2 / 2 that is nearer 0, or Newton's step."""
    discriminant = curvature * curvature - 2 * third * slope
    return -2 * slope / (curvature + (math.sqrt(discriminant) if discriminant > 0 else curvature))


def _through_the_ends(
    alpha: float, log_z: float, slope: float, curvature: float, third: float
) -> tuple[float, ...]:
    """Coefficients in x = alpha' - alpha of the quintic with these derivatives at alpha and with
    the two values of log Z that need no computing: 0 at alpha' = 0 and at alpha' = 1.
    """
    series = (log_z, slope, curvature / 2, third / 6)
    left, right = -alpha, 1 - alpha
    over_left, over_right = (-_evaluate(series, x)[0] / x**4 for x in (left, right))
    return (*series, over_left * right - over_right * left, over_right - over_left)


def _evaluate(series: tuple[float, ...], x: float) -> tuple[float, float, float]:
    """A polynomial and its first two derivatives at x, from its coefficients, lowest first."""
    value = first = half_second = 0.0
    for coefficient in reversed(series):
        half_second = half_second * x + first
        first = first * x + value
        value = value * x + coefficient
    return value, first, 2 * half_second


def _from_rows(solved: list["_Row | Fields | None"], batch: list[int], plan: Plan) -> Fields:
    """The fields of a batch of rows; those that `_solve_row` left are filled in later."""
    rows = [found if isinstance(found, _Row) else _Row((0.0,) * 6, 0) for found in solved]
    columns = list(zip(*(row.values for row in rows), strict=True))
    table = torch.tensor(columns, dtype=plan.dtype).view(6, *batch)
    alpha, chernoff, to_policy, to_teacher, slope, curvature = table.unbind()
    passes = torch.tensor([row.passes for row in rows], dtype=torch.int32).view(batch)
    status = torch.zeros(batch, dtype=torch.int8)  # INTERIOR
    converged = torch.ones(batch, dtype=torch.bool)
    return Fields(
        alpha, chernoff, to_policy, to_teacher, status, converged, slope, curvature, passes
    )
