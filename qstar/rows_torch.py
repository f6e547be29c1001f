"""alpha* for a batch of vocabularies, in torch: the fast solver, on any device.

`solve_kl_symmetry` agrees with the NumPy reference `qstar.solve_kl_symmetry` to the precision of
its input and returns the same `Balance`, of tensors. Beside it are the few functions of
`qstar.rows` that a decoder needs; they trust their input and check nothing.

On a CPU a row of a large vocabulary is solved on its own (`qstar.solve_torch_row`); CUDA rows in
float32 by fused kernels, where Triton is there (`qstar.rows_triton`); all others by the complete
algorithm (`qstar.solve_torch`).
"""

import functools
import math
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import rows as geometric
from .result import NAMED, Balance, status_code
from .solve_torch import (
    DEGENERATE_ALL,
    FIXED_PASSES,
    INTERIOR,
    INVALID,
    MAX_PASSES,
    NORMALISATION_TOLERANCE,
    TOLERANCE,
    Fields,
    Plan,
    allowed_error,
    computing_dtype,
    rounding_slack,
    solve_block,
)
from .solve_torch_row import alone_pays, solve_one_by_one

TorchBalance = Balance[Tensor, Tensor, Tensor]


CPU_CHUNK_ENTRIES = 2**18  # entries (rows times vocabulary) treated at once
ACCELERATOR_CHUNK_ENTRIES = 2**25


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

    The same problem, result and statuses as `qstar.solve_kl_symmetry`. A row stops where q_alpha is
    within about `tolerance` of q* in total variation, or as near as rounding lets it (about eps
    times the size of the log-probabilities): `qstar.solve_torch` says how. Two rows that differ by
    no more than their own dtype's rounding count as equal (`degenerate_all`).

    On a CPU, and in fused kernels, each row stops by itself. Otherwise every call on an accelerator
    runs the same number of passes; a row that is still short of its stopping rule then has
    `converged` False. On no accelerator is anything read back: a call neither waits for the device
    nor breaks a captured graph.

    Memory: at most 8 words of the computing dtype for each of the chunk_rows * vocab entries that
    are treated at once; for a large vocabulary on a CPU 5 * vocab words, which each thread keeps
    for its next call; in fused kernels less than a word an entry.

    Gradients: `alpha`, `chernoff`, `kl_to_policy` and `kl_to_teacher` are differentiable once, by
    the implicit function theorem (d alpha = -dF' / F''), through the renormalisation of the rows
    too. At a boundary and for `degenerate_all` alpha is held fixed; `disjoint` and `invalid` rows
    have gradient zero. Where F'' is tiny the gradient of alpha is as ill-determined as alpha.
    `slope` and `curvature` carry none (asking for it raises).

    Args:
        log_policy: Log-probabilities, -inf off the support; renormalised. The half types are
            computed in float32. Shape (*batch, vocab).
        log_teacher: The same, on the same device. Shape (*batch, vocab).
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
        doi:10.1109/LSP.2013.2243726.
    """
    _check_call(log_policy, log_teacher)
    on_cpu, fused = log_policy.is_cpu, takes_fused_kernels(log_policy, log_teacher)
    plan = _plan(log_policy, log_teacher, early_exit=on_cpu, fused=fused)
    plan = plan._replace(
        tolerance=plan.tolerance if tolerance is None else tolerance,
        validate=on_cpu if validate is None else validate,
        max_passes=max_passes or plan.max_passes,
        chunk_rows=chunk_rows or plan.chunk_rows,
    )
    if torch.is_grad_enabled() and (log_policy.requires_grad or log_teacher.requires_grad):
        return Balance(*_Solve.apply(log_policy, log_teacher, plan))
    return Balance(*_solve(log_policy, log_teacher, plan))


def solve_as_on_an_accelerator(log_policy: Tensor, log_teacher: Tensor) -> TorchBalance:
    """The fixed passes of an accelerator without fused kernels, on any device: for tests."""
    plan = _plan(log_policy, log_teacher, early_exit=False, fused=False)
    return Balance(*_solve(log_policy, log_teacher, plan))


def _plan(log_policy: Tensor, log_teacher: Tensor, *, early_exit: bool, fused: bool) -> Plan:
    """The options of a call that says nothing else."""
    dtypes = (log_policy.dtype, log_teacher.dtype)
    entries = CPU_CHUNK_ENTRIES if log_policy.is_cpu else ACCELERATOR_CHUNK_ENTRIES
    return Plan(
        tolerance=max(TOLERANCE[d] for d in dtypes),
        came_as=dtypes,
        dtype=computing_dtype(*dtypes),
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
    """KL(p || q) in nats. As `qstar.kl`, but the rows are trusted to be normalised."""
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
    """1 - TV(draft, target). As `qstar.acceptance_probability`, but nothing is checked."""
    return torch.minimum(_widen(log_draft), _widen(log_target)).exp_().sum(-1).clamp(max=1)


def _check_call(log_policy: Tensor, log_teacher: Tensor) -> None:
    """What can be told without reading a value; ValueError as from `qstar.rows`."""
    pair, names = (log_policy, log_teacher), ("policy", "teacher")
    geometric.check_kind(*pair, names, floating=NORMALISATION_TOLERANCE.__contains__)
    geometric.check_same_shape(*pair, names)
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
            raise ValueError(geometric.not_finite(name, row, what, outcome))
    wide = log_rows.to(computing_dtype(log_rows.dtype))
    total, allowed = wide.logsumexp(-1).exp(), allowed_error(wide, log_rows.dtype)
    off = ~((total - 1).abs() <= allowed)
    if bool(off.any()):
        row = off.nonzero()[0].tolist()
        at, dtype = tuple(row), str(log_rows.dtype).removeprefix("torch.")
        found = total[at].item(), allowed[at].item()
        raise ValueError(geometric.not_normalised(name, row, *found, dtype))


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
    weight = alpha.unsqueeze(-1)
    if inside and not torch.is_grad_enabled():
        log_path = (weight * log_policy).add_((1 - weight) * log_teacher)
        return log_path.nan_to_num_(-torch.inf, torch.inf, -torch.inf)  # 0 * -inf: not shared
    shared = torch.isfinite(log_policy) & torch.isfinite(log_teacher)
    # Zero before the product, not after: 0 * -inf is nan, and so would be its gradient.
    policy, teacher = (torch.where(shared, rows, 0.0) for rows in (log_policy, log_teacher))
    log_path = weight * policy + (1 - weight) * teacher
    if inside:
        return torch.where(shared, log_path, -torch.inf)
    # Of an outcome that one parent excludes: inf if its exponent is negative. nan of what both do,
    # and of 0 * inf inside [0, 1].
    beyond = (weight - weight.clamp(0, 1)).detach() * (log_policy - log_teacher).detach()
    return torch.where(shared, log_path, beyond.nan_to_num(-torch.inf, torch.inf, -torch.inf))


class _Solve(torch.autograd.Function):
    """The solver as a differentiable function of its two batches of rows."""

    @staticmethod
    def forward(ctx: Any, log_policy: Tensor, log_teacher: Tensor, plan: Plan) -> Fields:
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


def _solve(log_policy: Tensor, log_teacher: Tensor, plan: Plan) -> Fields:
    """The fields, each row by the way that suits it."""
    *batch, vocab = log_policy.shape
    if plan.fused:
        fields, plain = _solve_fused(log_policy, log_teacher, plan), False
    elif plan.early_exit and log_policy.numel() and alone_pays(math.prod(batch), vocab):
        fields, plain = solve_one_by_one(log_policy, log_teacher, plan)
    else:
        # Here and below no tensor is indexed: split and friends run on fake devices too.
        sides = (x.reshape(-1, vocab).split(plan.chunk_rows) for x in (log_policy, log_teacher))
        blocks = [solve_block(p, r, plan) for p, r in zip(*sides, strict=True)]
        columns = (torch.cat(column).reshape(batch) for column in zip(*blocks, strict=True))
        fields, plain = Fields(*columns), log_policy.numel() == 0
    if plan.validate and not plain and fields.status.max().item() == INVALID:
        _raise_if_invalid(log_policy, "policy")
        _raise_if_invalid(log_teacher, "teacher")
    return fields


def takes_fused_kernels(log_policy: Tensor, log_teacher: Tensor) -> bool:
    """Whether `solve_kl_symmetry` solves these rows by the fused kernels of `rows_triton`."""
    return (
        log_policy.is_cuda
        and log_policy.numel() > 0
        and computing_dtype(log_policy.dtype, log_teacher.dtype) == torch.float32
        and all(type(rows) in (Tensor, torch.nn.Parameter) for rows in (log_policy, log_teacher))
        and _has_triton()
    )


@functools.cache
def _has_triton() -> bool:
    if find_spec("triton") is None:
        return False
    from .rows_triton import runs

    return runs()


def _solve_fused(log_policy: Tensor, log_teacher: Tensor, plan: Plan) -> Fields:
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
        slack=(rounding_slack(policy), rounding_slack(teacher)),
        most=math.log(vocab),
    )
    return Fields(*(field.reshape(batch) for field in found))
