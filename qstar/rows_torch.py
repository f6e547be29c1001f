"""alpha* for a batch of vocabularies, in torch: the fast solver, on any device.

`solve_kl_symmetry` agrees with the NumPy reference `qstar.solve_kl_symmetry` to the precision of
its input and returns the same `Balance`, of tensors. Beside it are the few functions of
`qstar.rows` that a decoder needs; they trust their input and check nothing.

Three roads lead to alpha*. On a CPU a row of a large vocabulary is solved on its own by
`_solve_row`: a few sweeps over buffers that stay in the cache, the arithmetic in between in Python
floats. Whatever is not plain there (an outcome that a parent excludes, parents that nearly agree, a
step that does not help) is handed to `_solve_block`, the complete algorithm, which treats many rows
at once and branches on no value. On CUDA in float32 it is `rows_triton` that follows the complete
algorithm, where Triton is there; any other accelerator takes `_solve_block`.
"""

import functools
import math
import threading
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import rows as geometric
from .result import NAMED, STATUSES, Balance, status_code

TorchBalance = Balance[Tensor, Tensor, Tensor]

NORMALISATION_TOLERANCE = {
    getattr(torch, name): allowed for name, allowed in geometric.NORMALISATION_TOLERANCE.items()
}
"""How far a row's probabilities may sum from 1, by the dtype in which they came; see `_allowed`."""

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-4}
"""The default of `tolerance`, by the coarser of the two dtypes."""

MAX_PASSES = 64  # where rows stop by themselves
FIXED_PASSES = 16  # on an accelerator without fused kernels, where they all run on
CPU_CHUNK_ENTRIES = 2**18  # entries (rows times vocabulary) treated at once
ACCELERATOR_CHUNK_ENTRIES = 2**25
ROW_VOCAB = 4096  # from here on a CPU row pays for its own Python
CLOSE = 1e-3  # -log Z(1/2) below which `_solve_row` sums differences, for an expm1 more
EQUAL = 1e-9  # curvature below which it leaves the row to `_solve_block`
CANCELLED = 1e-2  # of E[x^2], the least that E[x^2] - E[x]^2 must be to count as the variance
SAFETY = 0.1  # of what the tolerance allows, the most that `_solve_row`'s last step may rest on
LOG2_E = 1 / math.log(2)

INTERIOR, BOUNDARY_0, BOUNDARY_1, DEGENERATE_ALL, DISJOINT, INVALID = range(len(STATUSES))


class StatusTensor(Tensor):
    """int8 indices into `STATUSES` that equal a status name where they stand for it.

    An ordinary tensor's `== "interior"` is False, without a word. All else is as for any tensor;
    what moves or selects the indices (int8 in, int8 out) keeps the type.
    """

    def __ne__(self, other: object) -> Any:
        return super().__ne__(status_code(other) if isinstance(other, str) else other)

    __hash__ = Tensor.__hash__

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return memo.setdefault(id(self), self.clone())

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__eq__:
            args = [status_code(x) if isinstance(x, str) else x for x in args]
        with torch._C.DisableTorchFunctionSubclass():
            return _named(func(*args, **(kwargs or {})))


def _named(found: Any) -> Any:
    if isinstance(found, Tensor):
        return named_status(found) if found.dtype == torch.int8 else found
    return type(found)(map(_named, found)) if type(found) in (tuple, list) else found


def named_status(status: Tensor) -> Tensor:
    """A `StatusTensor` of the same memory; tensors without values (fake ones) as they are."""
    return status.as_subclass(StatusTensor) if type(status) is Tensor else status


NAMED[Tensor] = named_status


def solve_kl_symmetry(
    log_policy: Tensor,
    log_teacher: Tensor,
    *,
    tolerance: float | None = None,
    validate: bool | None = None,
    max_passes: int | None = None,
    chunk_rows: int | None = None,
) -> TorchBalance:
    """Find alpha* for each row: KL(q* || policy) = KL(q* || teacher).

    The same problem and the same result as `qstar.solve_kl_symmetry`, whose docstring says what
    the statuses mean. The root of F' for F = log Z, from alpha = 1/2, by Newton's method on the log
    of the ratio of what raises F' to what lowers it, log E[max(l, 0)] - log E[max(-l, 0)]: for two
    outcomes a straight line in alpha, and nearly one for many, where F' itself may be a staircase;
    safeguarded by a bracket. (Halley's method on F, on the CPU, for rows of a large vocabulary.) A
    row stops where

        |F'(alpha)| <= max(2 tolerance sqrt(F''), floor),

    which puts q_alpha within about `tolerance` of q* in total variation; the floor is what
    rounding leaves of F', eps / 2 (sqrt(F'') (1 + E_q[|log policy| + |log teacher|]) + F''): of q*
    it leaves an error of about eps times the size of the log-probabilities. A row also stops where
    its bracket [a, b] is too short to matter: (b - a) |F'| <= 4 tolerance^2, which bounds the
    error surely, or b - a <= 4 eps; and, for rows of a large vocabulary on a CPU, after a step on
    which two models of F of different order agree: the cubic that Halley's method solves, and the
    quintic that also knows F(0) = F(1) = 0. What the quintic adds must be a twentieth of what the
    rule above allows; its minimum is then returned, and `slope` and `curvature` are read off it.

    Where the supports agree the bracket starts at [1 - B(R), B(R)], R being the range of the
    log-ratio and B(R) = log((e^R - 1) / R) / R; where they do not, the slopes at the two ends
    decide between a boundary and the bracket [0, 1].

    On a CPU each row stops by itself, and so it does in the fused kernels of `rows_triton`, which
    CUDA tensors take that are computed in float32, where Triton is installed. Otherwise every call
    on an accelerator runs the same number of passes; a row that is still short of its stopping rule
    then has `converged` False. On no accelerator is anything read back: a call neither waits for
    the device nor breaks a captured graph. Two rows that differ by no more than their own dtype's
    rounding count as equal (`degenerate_all`).

    Memory: the workspace is at most 8 words of the computing dtype for each of the
    chunk_rows * vocab entries that are treated at once; for a large vocabulary on a CPU, 5 * vocab
    words, which each thread keeps for its next call; of the fused kernels, less than a word for
    an entry of the rows.

    Gradients: `alpha`, `chernoff`, `kl_to_policy` and `kl_to_teacher` are differentiable once, by
    the implicit function theorem (d alpha = -dF' / F''), through the renormalisation of the rows
    too. alpha is held fixed, and has gradient zero, at a boundary and for `degenerate_all`;
    `disjoint` and `invalid` rows have gradient zero. Where F'' is tiny the gradient of alpha is as
    ill-determined as alpha. `slope` and `curvature` carry no gradient (asking for one raises), and
    neither does a second differentiation.

    Args:
        log_policy: Log-probabilities, natural log; -inf off the support. float64 or float32;
            bfloat16 and float16 are computed in float32. Rows are renormalised. Shape (*batch,
            vocab).
        log_teacher: The same, over the same vocabulary, on the same device. Shape (*batch, vocab).
        tolerance: Error of q* in total variation at which to stop; by default 1e-12 in float64,
            1e-6 in float32, 1e-4 for the half types, whose own rounding moves q* by far more.
        validate: Whether to raise on rows that are no distributions. By default on for CPU tensors
            and off for others, where it would have to wait for the device: a bad row then gets the
            status `invalid`, and nan.
        max_passes: How many evaluations of F' a row may take, by default 64; on an accelerator
            without fused kernels the number that every row takes, by default 16.
        chunk_rows: Rows treated at once. By default 2^18 / vocab on a CPU, for its cache, and
            2^25 / vocab on an accelerator, at least 1. Fused kernels treat all.

    Returns:
        A `Balance` of tensors of the batch shape, on the device of the input: floats in the
        computing dtype, `status` an int8 index into `STATUSES` that compares with its names
        (`StatusTensor`), `passes` int32.

    Raises:
        ValueError: Shapes or devices differ, a vocabulary is empty, a dtype is not a floating one;
            with `validate`, a row holds nan or +inf or does not sum to one (within 1e-4, in the
            half types 2e-2 and what their rounding may leave of -sum p log p more).

    Source: the analysis, problem 2; Chernoff (1952); Nielsen (2013),
        doi:10.1109/LSP.2013.2243726. The bracket and the contraction rate (Newton's error, in
        units of 1/R, falls from u to e^u - 1 - u) follow from |F'''| <= R F''.
    """
    _check_call(log_policy, log_teacher)
    on_cpu, fused = log_policy.is_cpu, takes_fused_kernels(log_policy, log_teacher)
    given: dict[str, Any] = {
        "tolerance": tolerance,
        "max_passes": max_passes,
        "chunk_rows": chunk_rows,
    }
    plan = _plan(log_policy, log_teacher, early_exit=on_cpu, fused=fused)._replace(
        validate=on_cpu if validate is None else validate,
        **{name: value for name, value in given.items() if value is not None},
    )
    if torch.is_grad_enabled() and (log_policy.requires_grad or log_teacher.requires_grad):
        return Balance(*_Solve.apply(log_policy, log_teacher, plan))
    return Balance(*_solve(log_policy, log_teacher, plan))


def solve_as_on_an_accelerator(log_policy: Tensor, log_teacher: Tensor) -> TorchBalance:
    """The fixed passes of an accelerator without fused kernels, on any device: for tests."""
    plan = _plan(log_policy, log_teacher, early_exit=False, fused=False)
    return Balance(*_solve(log_policy, log_teacher, plan))


def _plan(log_policy: Tensor, log_teacher: Tensor, *, early_exit: bool, fused: bool) -> "_Plan":
    """The options of a call that says nothing else."""
    dtypes = (log_policy.dtype, log_teacher.dtype)
    entries = CPU_CHUNK_ENTRIES if log_policy.is_cpu else ACCELERATOR_CHUNK_ENTRIES
    return _Plan(
        tolerance=max(TOLERANCE[d] for d in dtypes),
        came_as=dtypes,
        dtype=_computing_dtype(*dtypes),
        max_passes=MAX_PASSES if early_exit or fused else FIXED_PASSES,
        chunk_rows=max(1, entries // log_policy.shape[-1]),
        early_exit=early_exit,
        validate=False,
        fused=fused,
    )


def log_partition(
    log_policy: Tensor, log_teacher: Tensor, alpha: Tensor, *, inside: bool = False
) -> Tensor:
    """log Z(alpha) = log sum_x policy(x)^alpha teacher(x)^(1 - alpha), in nats.

    As `qstar.log_partition`, but the rows are trusted to be normalised and log Z near zero has
    the absolute, not the relative, precision of the dtype. `solve_kl_symmetry` returns a better
    value at alpha* itself, as -chernoff. `inside` is the caller's word that the exponents lie in
    [0, 1], which saves three passes.
    """
    return _log_path(log_policy, log_teacher, alpha, inside=inside).logsumexp(-1)


def log_geometric_mean(
    log_policy: Tensor, log_teacher: Tensor, alpha: Tensor, *, inside: bool = False
) -> Tensor:
    """log q_alpha, the normalised geometric mean; at alpha* it is q*.

    As `qstar.log_geometric_mean`, but nothing is checked; nan where there is no q_alpha. `inside`
    as in `log_partition`.
    """
    return _log_path(log_policy, log_teacher, alpha, inside=inside).log_softmax(-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
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


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """TV(p, q) = 1/2 sum_x |p(x) - q(x)|. As `qstar.total_variation`, but nothing is checked."""
    return (0.5 * (_widen(log_p).exp() - _widen(log_q).exp()).abs().sum(-1)).clamp(max=1)


def acceptance_probability(log_draft: Tensor, log_target: Tensor) -> Tensor:
    """sum_x min(draft(x), target(x)) = 1 - TV(draft, target), at one position.

    As `qstar.acceptance_probability`, but nothing is checked.
    """
    return torch.minimum(_widen(log_draft), _widen(log_target)).exp().sum(-1).clamp(max=1)


def _check_call(log_policy: Tensor, log_teacher: Tensor) -> None:
    """What can be told without reading a value; ValueError as from `qstar.rows`."""
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
    wide = log_rows.to(_computing_dtype(log_rows.dtype))
    total, allowed = wide.logsumexp(-1).exp(), _allowed(wide, log_rows.dtype)
    off = ~((total - 1).abs() <= allowed)
    if bool(off.any()):
        row = off.nonzero()[0].tolist()
        at = tuple(row)
        raise ValueError(
            geometric.not_normalised(
                f"log_{name}",
                _row(row),
                total[at].item(),
                allowed[at].item(),
                str(log_rows.dtype).removeprefix("torch."),
            )
        )


def _allowed(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """How far each of these rows, which came in `dtype`, may sum from 1.

    Rounding log p to `dtype` moves it by up to eps |log p| / 2, and so the sum by eps / 2 times
    -sum p log p, which is at most log V.
    """
    base, most = NORMALISATION_TOLERANCE[dtype], math.log(rows.shape[-1])
    if not (slack := _slack(dtype)):
        return rows.new_full(rows.shape[:-1], base)
    size = torch.where(rows == -torch.inf, 0.0, rows.exp() * rows.abs()).sum(-1)
    return base + slack * size.clamp(max=most)


def _slack(dtype: torch.dtype) -> float:
    """What `_allowed` grows by with -sum p log p."""
    return 0.0 if dtype in (torch.float64, torch.float32) else torch.finfo(dtype).eps / 2


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


def _log_path(
    log_policy: Tensor, log_teacher: Tensor, alpha: Tensor, *, inside: bool = False
) -> Tensor:
    """The unnormalised log of the path, as `qstar.rows.Pair.log_path`."""
    log_policy, log_teacher = _widen(log_policy), _widen(log_teacher)
    shared = torch.isfinite(log_policy) & torch.isfinite(log_teacher)
    # Zero before the product, not after: 0 * -inf is nan, and so would be its gradient.
    policy, teacher = (torch.where(shared, rows, 0.0) for rows in (log_policy, log_teacher))
    weight = alpha.unsqueeze(-1)
    log_path = weight * policy + (1 - weight) * teacher
    if inside:
        return torch.where(shared, log_path, -torch.inf)
    # Of an outcome that one parent excludes: inf if its exponent is negative. nan of what both do,
    # and of 0 * inf inside [0, 1].
    beyond = (weight - weight.clamp(0, 1)).detach() * (log_policy - log_teacher).detach()
    return torch.where(shared, log_path, beyond.nan_to_num(-torch.inf, torch.inf, -torch.inf))


class _Plan(NamedTuple):
    """The options of one call, resolved."""

    tolerance: float
    came_as: tuple[torch.dtype, torch.dtype]  # of the two parents
    dtype: torch.dtype
    max_passes: int
    chunk_rows: int
    early_exit: bool  # rows may stop by themselves: their values may be read on the host
    validate: bool
    fused: bool = False  # by `rows_triton`


class _Fields(NamedTuple):
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
        size, vocab = ctx.plan.chunk_rows, ctx.saved_tensors[0].shape[-1]
        rows = [x.reshape(-1, vocab).split(size) for x in ctx.saved_tensors[:2]]
        per_row = [x.reshape(-1).split(size) for x in (*ctx.saved_tensors[2:], *grads[:4])]
        chained = [
            _chain(*part, dtype=ctx.plan.dtype) for part in zip(*rows, *per_row, strict=True)
        ]
        to_policy, to_teacher = (torch.cat(side) for side in zip(*chained, strict=True))
        shape = ctx.saved_tensors[0].shape
        return to_policy.reshape(shape), to_teacher.reshape(shape), None


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
    *,
    dtype: torch.dtype,
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
    log_policy, log_teacher = (x.to(dtype).log_softmax(-1) for x in (log_policy, log_teacher))
    shared = torch.isfinite(log_policy) & torch.isfinite(log_teacher)
    deviation = torch.where(shared, log_policy - log_teacher, 0.0) - slope.unsqueeze(-1)
    weight, on_slope, on_partition = (x.unsqueeze(-1) for x in (alpha, on_slope, on_partition))
    q = _log_path(log_policy, log_teacher, alpha, inside=True).softmax(-1)
    to_policy = q * (on_partition * weight + on_slope * (1 + weight * deviation))
    to_teacher = q * (on_partition * (1 - weight) - on_slope * (1 - (1 - weight) * deviation))
    # The rows were renormalised first: a shift of a whole row changes nothing.
    to_policy = to_policy - log_policy.exp() * to_policy.sum(-1, keepdim=True)
    to_teacher = to_teacher - log_teacher.exp() * to_teacher.sum(-1, keepdim=True)
    exists = (status <= DEGENERATE_ALL).unsqueeze(-1)
    return torch.where(exists, to_policy, 0.0), torch.where(exists, to_teacher, 0.0)


def _solve(log_policy: Tensor, log_teacher: Tensor, plan: _Plan) -> _Fields:
    """The fields, each row by the road that suits it."""
    *batch, vocab = log_policy.shape
    if plan.fused:
        fields, plain = _solve_fused(log_policy, log_teacher, plan), False
    elif plan.early_exit and vocab >= ROW_VOCAB and log_policy.numel():
        fields, plain = _solve_one_by_one(log_policy, log_teacher, plan)
    else:
        # Here and below no tensor is indexed: split and friends run on fake devices too.
        sides = (x.reshape(-1, vocab).split(plan.chunk_rows) for x in (log_policy, log_teacher))
        blocks = [_solve_block(p, r, plan) for p, r in zip(*sides, strict=True)]
        columns = (torch.cat(column).reshape(batch) for column in zip(*blocks, strict=True))
        fields, plain = _Fields(*columns), log_policy.numel() == 0
    if plan.validate and not plain and fields.status.max().item() == INVALID:
        _raise_if_invalid(log_policy, "policy")
        _raise_if_invalid(log_teacher, "teacher")
    return fields


def takes_fused_kernels(log_policy: Tensor, log_teacher: Tensor) -> bool:
    """Whether `solve_kl_symmetry` solves these rows by the fused kernels of `rows_triton`."""
    return (
        log_policy.is_cuda
        and log_policy.numel() > 0
        and _computing_dtype(log_policy.dtype, log_teacher.dtype) == torch.float32
        and all(type(rows) in (Tensor, torch.nn.Parameter) for rows in (log_policy, log_teacher))
        and _has_triton()
    )


@functools.cache
def _has_triton() -> bool:
    if find_spec("triton") is None:
        return False
    from .rows_triton import runs

    return runs()


def _solve_fused(log_policy: Tensor, log_teacher: Tensor, plan: _Plan) -> _Fields:
    """The fields by the kernels of `rows_triton`."""
    from .rows_triton import solve  # needs Triton

    *batch, vocab = log_policy.shape
    policy, teacher = plan.came_as
    found = solve(
        log_policy.reshape(-1, vocab),
        log_teacher.reshape(-1, vocab),
        tolerance=plan.tolerance,
        max_passes=plan.max_passes,
        allowed=(NORMALISATION_TOLERANCE[policy], NORMALISATION_TOLERANCE[teacher]),
        slack=(_slack(policy), _slack(teacher)),
        most=math.log(vocab),
    )
    return _Fields(*(field.reshape(batch) for field in found))


def _solve_one_by_one(log_policy: Tensor, log_teacher: Tensor, plan: _Plan) -> tuple[_Fields, bool]:
    """The fields from rows of a large vocabulary on the CPU, and whether all rows were plain."""
    *batch, vocab = log_policy.shape
    work = _workspace(vocab, plan.dtype)
    sides = [x.reshape(-1, vocab).unbind() if batch else (x,) for x in (log_policy, log_teacher)]
    solved = [_solve_alone(p, r, work, plan) for p, r in zip(*sides, strict=True)]
    fields = _from_rows(solved, batch, plan)
    hard = [(row, found) for row, found in enumerate(solved) if isinstance(found, _Fields)]
    for row, found in hard:
        for field, value in zip(fields, found, strict=True):
            field.view(-1)[row] = value[0]
    return fields, not hard


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
    policy: Tensor, teacher: Tensor, work: tuple[Tensor, ...], plan: _Plan
) -> "_Row | _Fields":
    """One row on the CPU, by the cheapest road that can take it."""
    policy, teacher = policy.to(plan.dtype), teacher.to(plan.dtype)
    found = _solve_row(policy, teacher, work, plan)
    if found is None and not bool((policy - teacher).isfinite().all()):
        policy, teacher = _condense(policy, teacher)
        if len(policy) <= len(work[0]):
            found = _solve_row(policy, teacher, tuple(x[: len(policy)] for x in work), plan)
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
    log_policy: Tensor, log_teacher: Tensor, work: tuple[Tensor, ...], plan: _Plan
) -> _Row | None:
    """One plain row on the CPU; None for one that `_solve_block` must solve.

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
    for passes in range(1, plan.max_passes + 1):
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
        if not abs(slope) <= last / 2:
            return None
        if close:
            log_z = log_growth(alpha) - alpha * shift
        if abs(slope) <= 2 * plan.tolerance * math.sqrt(curvature):
            return _Row.at(alpha, log_z, slope, curvature, passes)
        third = path.mul_(ratio).sum().item() / z - 3 * mean * curvature - mean**3
        step = _step(slope, curvature, third)
        series = _through_the_ends(alpha, log_z, slope, curvature, third)
        _, left, bend = _evaluate(series, step)
        if not bend > 0:
            return None
        better = step - left / bend
        if not 0 < alpha + better < 1:
            return None
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


def _from_rows(solved: list["_Row | _Fields"], batch: list[int], plan: _Plan) -> _Fields:
    """The fields of a batch of rows; those that `_solve_row` left are filled in later."""
    rows = [found if isinstance(found, _Row) else _Row((0.0,) * 6, 0) for found in solved]
    columns = list(zip(*(row.values for row in rows), strict=True))
    table = torch.tensor(columns, dtype=plan.dtype).view(6, *batch)
    alpha, chernoff, to_policy, to_teacher, slope, curvature = table.unbind()
    passes = torch.tensor([row.passes for row in rows], dtype=torch.int32).view(batch)
    status = torch.zeros(batch, dtype=torch.int8)  # INTERIOR
    converged = torch.ones(batch, dtype=torch.bool)
    return _Fields(
        alpha, chernoff, to_policy, to_teacher, status, converged, slope, curvature, passes
    )


def _solve_block(log_policy: Tensor, log_teacher: Tensor, plan: _Plan) -> _Fields:
    """The complete algorithm on a few rows at once; every branch is a `where`."""
    policy, teacher = log_policy.to(plan.dtype), log_teacher.to(plan.dtype)
    eps = torch.finfo(plan.dtype).eps
    valid = [
        (rows.logsumexp(-1).exp() - 1).abs() <= _allowed(rows, dtype)
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
    return _Fields(
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
    last: Tensor  # |log-odds| at the previous alpha
    passes: Tensor
    done: Tensor

    def step(
        self, path: _Path, at: _Moments, passes: Tensor, done: Tensor, *, halve: bool
    ) -> "_Search":
        """Shrink the bracket and move to the next alpha, unless done.

        By Newton's step on the log-odds; where that leaves the bracket, or they have not halved,
        to where the two tangents meet (for parents so far apart that log Z is a polygon this is its
        corner); or else to the middle of the bracket.
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
        newton, size = self.alpha - log_odds / gain, log_odds.abs()
        new = (low + high) / 2
        if not halve:
            (left_value, left_slope), (right_value, right_slope) = left.unbind(-1), right.unbind(-1)
            corner = (left_value - right_value) / (right_slope - left_slope)
            new = torch.where((low < corner) & (corner < high), corner, new)
        helps = (low < newton) & (newton < high) & (size <= self.last / 2)
        new = torch.where(helps, newton, new)
        alpha = torch.where(done, self.alpha, new)
        return _Search(alpha, low, high, left, right, size, passes, done)


def _minimise(path: _Path, search: _Search, plan: _Plan) -> tuple[Tensor, ...]:
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
