"""alpha* for a batch of vocabularies, in torch: the fast solver, on any device.

`solve_kl_symmetry` agrees with the NumPy reference `qstar.solve_kl_symmetry` to the precision of
its input and returns the same `Balance`, of tensors. Beside it are the few functions of
`qstar.geometric` that a decoder needs; they trust their input and check nothing.

Two roads lead to alpha*. On a CPU a row of a large vocabulary is solved on its own by
`_solve_row`: a few sweeps over buffers that stay in the cache, the arithmetic in between in Python
floats. Whatever is not plain there (an outcome that a parent excludes, parents that nearly agree, a
step that does not help) is handed to `_solve_block`, the complete algorithm, which treats many rows
at once, branches on no value, and is the only road on an accelerator.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from .result import STATUSES, Balance

TorchBalance = Balance[Tensor, Tensor, Tensor]

NORMALISATION_TOLERANCE = {
    torch.float64: 1e-6,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 2e-2,
}
"""How far a row's probabilities may sum from 1, by the dtype in which they came."""

TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 5e-7,
    torch.float16: 1e-4,
    torch.bfloat16: 1e-4,
}
"""The default of `tolerance`, by the coarser of the two dtypes."""

MAX_PASSES = 64  # on a CPU, where rows stop by themselves
FIXED_PASSES = 12  # on an accelerator, where they all run on
CHUNK_ENTRIES = {"cpu": 2**18}  # entries (rows times vocabulary) treated at once
ACCELERATOR_CHUNK_ENTRIES = 2**25
ROW_VOCAB = 4096  # from here on a CPU row pays for its own Python
CLOSE = 0.02  # curvature below which `_solve_row` sums differences, at the price of an expm1
EQUAL = 1e-9  # curvature below which it leaves the row to `_solve_block`
LOG2_E = 1 / math.log(2)

INTERIOR, BOUNDARY_0, BOUNDARY_1, DEGENERATE_ALL, DISJOINT, INVALID = range(len(STATUSES))


def solve_kl_symmetry(
    log_policy: Float[Tensor, "*batch vocab"],
    log_teacher: Float[Tensor, "*batch vocab"],
    *,
    tolerance: float | None = None,
    validate: bool | None = None,
    max_passes: int | None = None,
    chunk_rows: int | None = None,
) -> TorchBalance:
    """Find alpha* for each row: KL(q* || policy) = KL(q* || teacher).

    The same problem and the same result as `qstar.solve_kl_symmetry`, whose docstring says what
    the statuses mean. A safeguarded Newton method of third order (Halley's) on F = log Z, from
    alpha = 1/2. A row stops where

        |F'(alpha)| <= max(2 tolerance sqrt(F''), floor),

    which puts q_alpha within about `tolerance` of q* in total variation; the floor is what
    rounding leaves of F', 4 eps (sqrt(F'') (1 + E_q[|log policy| + |log teacher|]) + F''). A row
    whose bracket has shrunk to 4 eps stops too. Where the supports agree the bracket starts at
    [1 - B(R), B(R)], R being the range of the log-ratio and B(R) = log((e^R - 1) / R) / R; where
    they do not, the slopes at the two ends decide between a boundary and the bracket [0, 1].

    On a CPU each row stops by itself. On an accelerator every call runs the same number of passes
    and reads nothing back, so it neither waits for the device nor breaks a captured graph; a row
    that is still short of its stopping rule then has `converged` False. Two rows that differ by
    no more than their own dtype's rounding count as equal (`degenerate_all`).

    Memory: the workspace is at most 12 chunk_rows vocab words of the computing dtype.

    Gradients: `alpha`, `chernoff`, `kl_to_policy` and `kl_to_teacher` are differentiable once, by
    the implicit function theorem (d alpha = -dF' / F''), through the renormalisation of the rows
    too. alpha is held fixed, and has gradient zero, at a boundary and for `degenerate_all`;
    `disjoint` and `invalid` rows have gradient zero. Where F'' is tiny the gradient of alpha is as
    ill-determined as alpha. `slope` and `curvature` carry no gradient (asking for one raises), and
    neither does a second differentiation.

    Args:
        log_policy: Log-probabilities, natural log; -inf off the support. float64 or float32;
            bfloat16 and float16 are computed in float32. Rows are renormalised.
        log_teacher: The same, over the same vocabulary, on the same device.
        tolerance: Error of q* in total variation at which to stop; by default 1e-12 in float64,
            5e-7 in float32, 1e-4 for the half types, whose own rounding moves q* by far more.
        validate: Whether to raise on rows that are no distributions. By default on for CPU tensors
            and off for others, where it would have to wait for the device: a bad row then gets the
            status `invalid`, and nan.
        max_passes: How many evaluations of F' a row may take: on an accelerator the number that
            every row takes. By default 64 on a CPU, 12 on an accelerator.
        chunk_rows: Rows treated at once. By default 2^18 / vocab on a CPU, for its cache, and
            2^25 / vocab on an accelerator, at least 1.

    Returns:
        A `Balance` of tensors of the batch shape, on the device of the input: floats in the
        computing dtype, `status` an int8 index into `STATUSES`, `passes` int32.

    Raises:
        ValueError: Shapes or devices differ, a vocabulary is empty, a dtype is not a floating one;
            with `validate`, a row holds nan or +inf or does not sum to one (within 1e-6 in float64,
            1e-4 in float32, 2e-2 in the half types).

    Source: the analysis, problem 2; Chernoff (1952); Nielsen (2013),
        doi:10.1109/LSP.2013.2243726. The bracket and the contraction rate (Newton's error, in
        units of 1/R, falls from u to e^u - 1 - u) follow from |F'''| <= R F''.
    """
    _check_call(log_policy, log_teacher)
    on_cpu = log_policy.device.type == "cpu"
    *batch, vocab = log_policy.shape
    dtypes = (log_policy.dtype, log_teacher.dtype)
    plan = _Plan(
        tolerance=max(TOLERANCE[d] for d in dtypes) if tolerance is None else tolerance,
        normalisation=(NORMALISATION_TOLERANCE[dtypes[0]], NORMALISATION_TOLERANCE[dtypes[1]]),
        dtype=_computing_dtype(*dtypes),
        max_passes=max_passes or (MAX_PASSES if on_cpu else FIXED_PASSES),
        chunk_rows=chunk_rows
        or max(1, CHUNK_ENTRIES.get(log_policy.device.type, ACCELERATOR_CHUNK_ENTRIES) // vocab),
        early_exit=on_cpu,
    )
    fields = _Solve.apply(log_policy.reshape(-1, vocab), log_teacher.reshape(-1, vocab), plan)
    balance = Balance(*(field.reshape(batch) for field in fields))
    if validate is None:
        validate = on_cpu
    if validate and bool((balance.status == INVALID).any()):
        for rows, name in ((log_policy, "policy"), (log_teacher, "teacher")):
            _raise_if_invalid(rows, name)
    return balance


def log_partition(
    log_policy: Float[Tensor, "*batch vocab"],
    log_teacher: Float[Tensor, "*batch vocab"],
    alpha: Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch"]:
    """log Z(alpha) = log sum_x policy(x)^alpha teacher(x)^(1 - alpha), in nats.

    As `qstar.log_partition`, but the rows are trusted to be normalised and log Z near zero has
    the absolute, not the relative, precision of the dtype. `solve_kl_symmetry` returns a better
    value at alpha* itself, as -chernoff.
    """
    return _log_path(log_policy, log_teacher, alpha).logsumexp(-1)


def log_geometric_mean(
    log_policy: Float[Tensor, "*batch vocab"],
    log_teacher: Float[Tensor, "*batch vocab"],
    alpha: Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch vocab"]:
    """log q_alpha, the normalised geometric mean; at alpha* it is q*.

    As `qstar.log_geometric_mean`, but nothing is checked. nan where the parents share no outcome.
    """
    return _log_path(log_policy, log_teacher, alpha).log_softmax(-1)


def kl(
    log_p: Float[Tensor, "*batch vocab"], log_q: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """KL(p || q) in nats; 0 log 0 = 0, and inf where p puts mass that q lacks.

    As `qstar.kl`, but the rows are trusted to be normalised.
    """
    log_p, log_q = _widen(log_p), _widen(log_q)
    on = log_p != -torch.inf
    log_ratio = torch.where(on, log_p - log_q, 0.0)
    p, q = log_p.exp(), log_q.exp()
    # p log(p/q) - p + q is never negative: close rows get a small number, not rounding noise.
    close = on & (log_ratio.abs() < 1)
    excess = torch.where(close, q * torch.where(close, log_ratio, 0.0).expm1(), p - q)
    return (torch.where(on, p * log_ratio, 0.0) - excess).sum(-1).clamp(min=0)


def total_variation(
    log_p: Float[Tensor, "*batch vocab"], log_q: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """TV(p, q) = 1/2 sum_x |p(x) - q(x)|. As `qstar.total_variation`, but nothing is checked."""
    return 0.5 * (_widen(log_p).exp() - _widen(log_q).exp()).abs().sum(-1)


def acceptance_probability(
    log_draft: Float[Tensor, "*batch vocab"], log_target: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """sum_x min(draft(x), target(x)) = 1 - TV(draft, target), at one position.

    As `qstar.acceptance_probability`, but nothing is checked.
    """
    return torch.minimum(_widen(log_draft), _widen(log_target)).exp().sum(-1)


def _check_call(log_policy: Tensor, log_teacher: Tensor) -> None:
    """What can be told without reading a value; ValueError as from `qstar.geometric`."""
    for rows, name in ((log_policy, "policy"), (log_teacher, "teacher")):
        if rows.dtype not in NORMALISATION_TOLERANCE:
            raise ValueError(
                f"log_{name} must hold floating-point log-probabilities: got dtype {rows.dtype}. "
                f"Pass natural logarithms of probabilities."
            )
        if rows.ndim == 0 or rows.shape[-1] == 0:
            raise ValueError(
                f"log_{name} needs a vocabulary of at least one outcome on its last axis: "
                f"got shape {tuple(rows.shape)}."
            )
    if log_policy.shape != log_teacher.shape:
        raise ValueError(
            f"policy and teacher must share one vocabulary and one batch: expected equal shapes, "
            f"got {tuple(log_policy.shape)} and {tuple(log_teacher.shape)}. "
            f"Broadcast or cut them explicitly."
        )
    if log_policy.device != log_teacher.device:
        raise ValueError(
            f"policy and teacher must be on one device: got {log_policy.device} and "
            f"{log_teacher.device}. Move one with .to()."
        )


def _raise_if_invalid(log_rows: Tensor, name: str) -> None:
    """ValueError for the first row that is no distribution; reads values on the host."""
    for bad, what in ((log_rows.isnan(), "nan"), (log_rows.isposinf(), "+inf")):
        if bool(bad.any()):
            *row, outcome = bad.nonzero()[0].tolist()
            raise ValueError(
                f"log_{name} must hold log-probabilities, finite or -inf: {_row(row)} holds {what} "
                f"at outcome {outcome}. Mend what produced it; nothing is guessed."
            )
    allowed = NORMALISATION_TOLERANCE[log_rows.dtype]
    total = log_rows.to(_computing_dtype(log_rows.dtype)).logsumexp(-1).exp()
    off = ~((total - 1).abs() <= allowed)
    if bool(off.any()):
        row = off.nonzero()[0].tolist()
        raise ValueError(
            f"log_{name} must be normalised log-probabilities: {_row(row)} sums to "
            f"{total[tuple(row)].item():.6g}, not 1 within {allowed:g}. "
            f"Pass logits through log_softmax first."
        )


def _row(index: list[int]) -> str:
    """How an error names a row of the batch."""
    if len(index) < 2:
        return f"row {index[0] if index else 0}"
    return f"row {tuple(index)}"


def _computing_dtype(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _widen(log_rows: Tensor) -> Tensor:
    """Half types as float32, renormalised there; others as they are."""
    if log_rows.dtype in (torch.float32, torch.float64):
        return log_rows
    return log_rows.float().log_softmax(-1)


def _log_path(log_policy: Tensor, log_teacher: Tensor, alpha: Tensor) -> Tensor:
    log_policy, log_teacher = _widen(log_policy), _widen(log_teacher)
    shared = torch.isfinite(log_policy) & torch.isfinite(log_teacher)
    # Zero before the product, not after: 0 * -inf is nan, and so would be its gradient.
    policy, teacher = (torch.where(shared, rows, 0.0) for rows in (log_policy, log_teacher))
    weight = alpha[..., None]
    return torch.where(shared, weight * policy + (1 - weight) * teacher, -torch.inf)


class _Plan(NamedTuple):
    """The options of one call, resolved."""

    tolerance: float
    normalisation: tuple[float, float]
    dtype: torch.dtype
    max_passes: int
    chunk_rows: int
    early_exit: bool  # rows may stop by themselves: their values may be read on the host


class _Fields(NamedTuple):
    """The fields of a `Balance`, in its order, for a flat batch."""

    alpha: Tensor
    chernoff: Tensor
    kl_to_policy: Tensor
    kl_to_teacher: Tensor
    status: Tensor
    converged: Tensor
    slope: Tensor
    curvature: Tensor
    passes: Tensor


class _Solve(torch.autograd.Function):
    """The solver as a differentiable function of its two batches of rows."""

    @staticmethod
    def forward(ctx: Any, log_policy: Tensor, log_teacher: Tensor, plan: _Plan) -> _Fields:
        fields = _solve(log_policy, log_teacher, plan)
        ctx.plan = plan
        ctx.save_for_backward(
            log_policy, log_teacher, fields.alpha, fields.status, fields.slope, fields.curvature
        )
        ctx.mark_non_differentiable(
            fields.status, fields.converged, fields.slope, fields.curvature, fields.passes
        )
        return fields

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        log_policy, log_teacher, *fields = ctx.saved_tensors
        to_policy, to_teacher = torch.empty_like(log_policy), torch.empty_like(log_teacher)
        for rows in _chunks(len(log_policy), ctx.plan.chunk_rows):
            to_policy[rows], to_teacher[rows] = _chain(
                log_policy[rows].to(ctx.plan.dtype),
                log_teacher[rows].to(ctx.plan.dtype),
                *(field[rows] for field in fields),
                *(grad[rows] for grad in grads[:4]),
            )
        return to_policy, to_teacher, None


def _chain(
    log_policy: Tensor,
    log_teacher: Tensor,
    alpha: Tensor,
    status: Tensor,
    slope: Tensor,
    curvature: Tensor,
    grad_alpha: Tensor,
    grad_chernoff: Tensor,
    grad_to_policy: Tensor,
    grad_to_teacher: Tensor,
) -> tuple[Tensor, Tensor]:
    """From the gradient with respect to the results to that with respect to the rows.

    With alpha held fixed dF = E_q[alpha dp + (1 - alpha) dr] and dF' = E_q[(1 + alpha u) dp
    - (1 - (1 - alpha) u) dr], where p and r are the log rows and u = log-ratio - F'. Then
    d alpha = -dF' / F'' inside and 0 elsewhere, dC = -dF by the envelope theorem, and the two KL
    divergences follow C where alpha moves to keep them equal, and F and F' where it is fixed.
    """
    fixed = status != INTERIOR
    on_slope = torch.where(
        fixed, alpha * grad_to_teacher - (1 - alpha) * grad_to_policy, -grad_alpha / curvature
    )
    on_partition = -(grad_chernoff + grad_to_policy + grad_to_teacher)
    log_policy, log_teacher = log_policy.log_softmax(-1), log_teacher.log_softmax(-1)
    shared = torch.isfinite(log_policy) & torch.isfinite(log_teacher)
    deviation = torch.where(shared, log_policy - log_teacher, 0.0) - slope[:, None]
    weight, on_slope, on_partition = (x[:, None] for x in (alpha, on_slope, on_partition))
    q = _log_path(log_policy, log_teacher, alpha).softmax(-1)
    to_policy = q * (on_partition * weight + on_slope * (1 + weight * deviation))
    to_teacher = q * (on_partition * (1 - weight) - on_slope * (1 - (1 - weight) * deviation))
    # The rows were renormalised first: a shift of a whole row changes nothing.
    to_policy = to_policy - log_policy.exp() * to_policy.sum(-1, keepdim=True)
    to_teacher = to_teacher - log_teacher.exp() * to_teacher.sum(-1, keepdim=True)
    exists = (status <= DEGENERATE_ALL)[:, None]
    return torch.where(exists, to_policy, 0.0), torch.where(exists, to_teacher, 0.0)


def _chunks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, size))


def _solve(log_policy: Tensor, log_teacher: Tensor, plan: _Plan) -> _Fields:
    """The fields for a flat batch, each row by the road that suits it."""
    length, vocab = log_policy.shape
    if not plan.early_exit or vocab < ROW_VOCAB or length == 0:
        blocks = [
            _solve_block(log_policy[rows], log_teacher[rows], plan)
            for rows in _chunks(max(length, 1), plan.chunk_rows)
        ]
        return _Fields(*(torch.cat(columns) for columns in zip(*blocks, strict=True)))
    work = torch.empty(6, vocab, dtype=plan.dtype)
    solved = [
        _solve_alone(policy, teacher, work, plan)
        for policy, teacher in zip(log_policy, log_teacher, strict=True)
    ]
    fields = _from_rows([found if isinstance(found, _Row) else None for found in solved], plan)
    for row, found in enumerate(solved):
        if isinstance(found, _Fields):
            for field, value in zip(fields, found, strict=True):
                field[row] = value[0]
    return fields


def _solve_alone(policy: Tensor, teacher: Tensor, work: Tensor, plan: _Plan) -> "_Row | _Fields":
    """One row on the CPU, by the cheapest road that can take it."""
    policy, teacher = policy.to(plan.dtype), teacher.to(plan.dtype)
    found = _solve_row(policy, teacher, work, plan)
    if found is None and not bool((policy - teacher).isfinite().all()):
        policy, teacher = _condense(policy, teacher)
        found = _solve_row(policy, teacher, work[:, : len(policy)], plan)
    return found or _solve_block(policy[None], teacher[None], plan)


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
    """What `_solve_row` found."""

    alpha: float
    chernoff: float
    slope: float
    curvature: float
    passes: int


def _solve_row(
    log_policy: Float[Tensor, " vocab"],
    log_teacher: Float[Tensor, " vocab"],
    work: Float[Tensor, "6 vocab"],
    plan: _Plan,
) -> _Row | None:
    """One plain row on the CPU; None for one that `_solve_block` must solve.

    Powers of two, not of e: torch's exp goes through a library that is slow on some processors,
    and its exp2 does not. The path is not shifted by its largest term: it is never positive, and
    a row whose sum is so small that terms may have been lost is not plain.
    """
    ratio, square, base, path, teacher, spare = work
    torch.mul(log_policy, LOG2_E, out=path)
    policy_total = path.exp2_().sum().item()
    torch.mul(log_teacher, LOG2_E, out=base)
    teacher_total = torch.exp2(base, out=teacher).sum().item()
    for total, allowed in zip((policy_total, teacher_total), plan.normalisation, strict=True):
        if not abs(total - 1) <= allowed:
            return None
    torch.sub(log_policy, log_teacher, out=ratio)
    torch.mul(ratio, ratio, out=square)

    def log_growth(alpha: float) -> float:
        """log(sum teacher e^(alpha ratio) / sum teacher), also where it is next to nothing."""
        growth = torch.dot(torch.mul(ratio, alpha, out=spare).expm1_(), teacher)
        return math.log1p(growth.item() / teacher_total)

    # Renormalising shifts the log-ratio, and log Z, by constants: no sweep is needed.
    shift = math.log(policy_total) - math.log(teacher_total)
    alpha, last, close = 0.5, math.inf, False
    for passes in range(1, plan.max_passes + 1):
        torch.add(base, ratio, alpha=alpha * LOG2_E, out=path)
        z = path.exp2_().sum().item()
        if not z > 1e-12:  # terms below the smallest float may matter
            return None
        mean = torch.dot(path, ratio).item() / z
        curvature = torch.dot(path, square).item() / z - mean * mean
        if not curvature > EQUAL:  # also nan, from an outcome that a parent excludes
            return None
        if passes == 1 and curvature < CLOSE:
            close, shift = True, log_growth(1.0)
        slope = mean - shift
        if not abs(slope) <= last / 2:
            return None
        if abs(slope) <= 2 * plan.tolerance * math.sqrt(curvature):
            log_z = log_growth(alpha) if close else math.log(z / teacher_total)
            return _Row(alpha, alpha * shift - log_z, slope, curvature, passes)
        cube = torch.dot(path.mul_(ratio), square).item() / z
        third = cube - 3 * mean * curvature - mean**3
        alpha += _step(slope, curvature, third)
        if not 0 < alpha < 1:
            return None
        last = abs(slope)
    return None


def _step(slope: float, curvature: float, third: float) -> float:
    """The root of slope + curvature x + third x^2 / 2 that is nearer 0, or Newton's step."""
    discriminant = curvature * curvature - 2 * third * slope
    return -2 * slope / (curvature + (math.sqrt(discriminant) if discriminant > 0 else curvature))


def _from_rows(solved: list[_Row | None], plan: _Plan) -> _Fields:
    """The fields of a flat batch; rows without a result are left as 0."""
    rows = [found or _Row(0.0, 0.0, 0.0, 0.0, 0) for found in solved]
    table = torch.tensor([row[:4] for row in rows], dtype=torch.float64)
    alpha, chernoff, slope, curvature = table.unbind(-1)
    chernoff = chernoff.clamp(min=0)
    return _Fields(
        alpha=alpha.to(plan.dtype),
        chernoff=chernoff.to(plan.dtype),
        kl_to_policy=(chernoff - (1 - alpha) * slope).clamp(min=0).to(plan.dtype),
        kl_to_teacher=(chernoff + alpha * slope).clamp(min=0).to(plan.dtype),
        status=torch.full((len(rows),), INTERIOR, dtype=torch.int8),
        converged=torch.ones(len(rows), dtype=torch.bool),
        slope=slope.to(plan.dtype),
        curvature=curvature.to(plan.dtype),
        passes=torch.tensor([row.passes for row in rows], dtype=torch.int32),
    )


def _solve_block(
    log_policy: Float[Tensor, "rows vocab"], log_teacher: Float[Tensor, "rows vocab"], plan: _Plan
) -> _Fields:
    """The complete algorithm on a few rows at once; every branch is a `where`."""
    policy, teacher = log_policy.to(plan.dtype), log_teacher.to(plan.dtype)
    eps = torch.finfo(plan.dtype).eps
    invalid = torch.zeros(len(policy), dtype=torch.bool, device=policy.device)
    for rows, allowed in zip((policy, teacher), plan.normalisation, strict=True):
        invalid |= ~((rows.logsumexp(-1).exp() - 1).abs() <= allowed)
    path = _path(policy, teacher)
    at_0, at_1 = (path.moments(torch.full_like(path.unshared, end)) for end in (0.0, 1.0))
    partial = ((policy == -torch.inf) != (teacher == -torch.inf)).any(-1)
    status = torch.full_like(partial, INTERIOR, dtype=torch.int8)
    for code, rows in (  # of two that apply the later one counts
        (BOUNDARY_1, partial & (at_1.slope <= 2 * eps * (1 + at_1.size))),
        (BOUNDARY_0, partial & (at_0.slope >= -2 * eps * (1 + at_0.size))),
        (DEGENERATE_ALL, (path.ratio.abs() <= 2 * eps * (1 + path.size)).all(-1)),
        (DISJOINT, (path.base == -torch.inf).all(-1)),
        (INVALID, invalid),
    ):
        status = status.masked_fill(rows, code)
    starts = [0.5, 0.0, 1.0, 0.5, torch.nan, torch.nan]  # by status
    alpha = torch.tensor(starts, dtype=plan.dtype, device=status.device)[status.long()]
    high = torch.where(partial, 1.0, _highest_alpha(path.ratio))
    search = _Search(
        alpha=alpha,
        low=1 - high,
        high=high,
        left=at_0.tangent(0.0),
        right=at_1.tangent(1.0),
        last=torch.full_like(alpha, torch.inf),
        done=status != INTERIOR,
    )
    alpha, slope, curvature, passes, done = _minimise(path, search, plan)
    chernoff = torch.where(status == DISJOINT, torch.inf, -path.log_partition(alpha)).clamp(min=0)
    to_policy, to_teacher = (
        torch.where(status == DISJOINT, torch.inf, chernoff + share).clamp(min=0)
        for share in ((alpha - 1) * slope, alpha * slope)
    )
    converged = done & (status <= DEGENERATE_ALL)
    return _Fields(
        alpha, chernoff, to_policy, to_teacher, status, converged, slope, curvature, passes
    )


class _Moments(NamedTuple):
    """log Z and its derivatives at one alpha per row, and the scale of their rounding."""

    log_z: Tensor
    slope: Tensor
    curvature: Tensor
    third: Tensor
    size: Tensor  # E_q[|log policy| + |log teacher|]

    def tangent(self, alpha: Tensor | float) -> Tensor:
        """The line that touches log Z here, as (value at alpha = 0, slope)."""
        return torch.stack([self.log_z - alpha * self.slope, self.slope], dim=-1)


class _Path(NamedTuple):
    """Normalised rows, as every point of their path needs them."""

    base: Float[Tensor, "rows vocab"]  # log teacher; -inf off the shared support
    ratio: Float[Tensor, "rows vocab"]  # log policy - log teacher; 0 off the shared support
    size: Float[Tensor, "rows vocab"]  # |log policy| + |log teacher|; 0 off the shared support
    unshared: Float[Tensor, " rows"]  # the teacher's mass off the shared support

    def moments(self, alpha: Float[Tensor, " rows"]) -> _Moments:
        # Sums of products, not matrix products: those may run in TF32 or bfloat16.
        weight = torch.addcmul(self.base, self.ratio, alpha[:, None])
        top = weight.amax(-1, keepdim=True)
        z = weight.sub_(top).exp_().sum(-1, keepdim=True)
        weight.div_(z)
        size = (weight * self.size).sum(-1)
        slope = (weight * self.ratio).sum(-1)
        deviation = self.ratio - slope[:, None]
        # One factor at a time: the square of a huge log-ratio overflows, times a weight of 0.
        curvature = weight.mul_(deviation).mul_(deviation).sum(-1)
        third = weight.mul_(deviation).sum(-1)
        return _Moments((top + z.log()).squeeze(-1), slope, curvature, third, size)

    def log_partition(self, alpha: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        log_path = torch.addcmul(self.base, self.ratio, alpha[:, None])
        log_z = log_path.logsumexp(-1)
        # Between close parents Z is 1 - a little: sum what each outcome lacks, not what it has.
        teacher = self.base.exp()
        growth = torch.where(
            self.ratio.abs() < 1,
            teacher * (alpha[:, None] * self.ratio).expm1(),
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
    shift = (growth / teacher_mass.sum(-1)).log1p()[:, None]
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
    left: Float[Tensor, "rows 2"]  # the tangent nearest to the minimum from below
    right: Float[Tensor, "rows 2"]  # and from above
    last: Tensor  # |slope| at the previous alpha
    done: Tensor

    def step(self, at: _Moments, done: Tensor, *, halve: bool) -> "_Search":
        """Shrink the bracket and move to the next alpha, unless done.

        By Halley's step; where that leaves the bracket, or the slope has not halved, to where the
        two tangents meet (for parents so far apart that log Z is a polygon this is its corner); or
        else to the middle of the bracket.
        """
        falls, rises = at.slope < 0, at.slope > 0
        tangent = at.tangent(self.alpha)
        low, high = (
            torch.where(side, self.alpha, end)
            for side, end in ((falls, self.low), (rises, self.high))
        )
        left, right = (
            torch.where(side[:, None], tangent, line)
            for side, line in ((falls, self.left), (rises, self.right))
        )
        discriminant = at.curvature.square() - 2 * at.third * at.slope
        root = torch.where(discriminant > 0, discriminant.abs().sqrt(), at.curvature)
        halley = self.alpha - 2 * at.slope / (at.curvature + root)
        size = at.slope.abs()
        new = (low + high) / 2
        if not halve:
            corner = (left[:, 0] - right[:, 0]) / (right[:, 1] - left[:, 1])
            new = torch.where((low < corner) & (corner < high), corner, new)
        helps = (low < halley) & (halley < high) & (size <= self.last / 2)
        new = torch.where(helps, halley, new)
        return _Search(torch.where(done, self.alpha, new), low, high, left, right, size, done)


def _minimise(
    path: _Path, search: _Search, plan: _Plan
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(alpha, slope, curvature, passes, done) per row, evaluated at the alpha returned."""
    eps = torch.finfo(plan.dtype).eps
    alpha, slope, curvature = (torch.full_like(search.alpha, torch.nan) for _ in range(3))
    passes = torch.full_like(search.done, 2, dtype=torch.int32)  # the two ends
    done = search.done.clone()
    live: Tensor | slice = slice(None)
    for count in range(1, plan.max_passes + 1):
        at = path.moments(search.alpha)
        alpha[live], slope[live], curvature[live] = search.alpha, at.slope, at.curvature
        passes[live] += (~search.done).int()
        deviation, size = at.curvature.sqrt(), at.slope.abs()
        floor = 4 * eps * (deviation * (1 + at.size) + at.curvature)
        width = search.high - search.low
        stop = (
            search.done
            | (size <= torch.maximum(2 * plan.tolerance * deviation, floor))
            | (size * width <= 4 * plan.tolerance**2)
            | (width <= 4 * eps)
        )
        search = search.step(at, stop, halve=count % 3 == 0)
        done[live] = stop
        if not plan.early_exit:
            continue
        num_done = int(stop.sum())
        if num_done == len(stop):
            break
        if 2 * num_done >= len(stop):
            keep = (~stop).nonzero().squeeze(1)
            live = keep if isinstance(live, slice) else live[keep]
            path = _Path(*(values[keep] for values in path))
            search = _Search(*(values[keep] for values in search))
    return alpha, slope, curvature, passes, done


def _highest_alpha(ratio: Float[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
    """B(R) = log((e^R - 1) / R) / R, with room for rounding: alpha* is in [1 - B, B].

    R is the range of the log-ratio, and the supports agree.
    """
    most = torch.finfo(ratio.dtype).max / 4
    extent = (ratio.amax(-1) / 2 - ratio.amin(-1) / 2).clamp(max=most) * 2
    bound = 1 + ((-extent.neg().exp()).log1p() - extent.log()) / extent
    bound = torch.where(extent < 0.01, 0.5 + extent / 24, bound)
    return (bound + 1e-3).clamp(max=1)
