"""The geometric path between two distributions: q_alpha, log Z(alpha), its slope, and KL.

Pure NumPy on log-probabilities: float64, natural logarithms, vocabulary on the last axis, -inf
off the support. The path is

    q_alpha(x) = policy(x)^alpha teacher(x)^(1 - alpha) / Z(alpha),  x in the shared support,

so alpha = 1 is the policy and alpha = 0 the teacher, each conditioned on the shared support
(which changes nothing where the supports agree): the values at the two ends are the limits.

Beyond the ends the path goes on, with one parent's exponent above 1 and the other's negative. An
outcome that the first excludes has no mass. If the second excludes one that the first does not,
nothing is left to normalise: Z is infinite, as is the Renyi divergence of order alpha, and there is
no q_alpha.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import ndarray
from numpy.typing import ArrayLike

from .arguments import check_exponents

NORMALISATION_TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-2}
"""How far a row's probabilities may sum from 1, by the dtype in which they came. float64 rows may
have been float32 before: one is not asked for more than the other. Rounded half types may be off by
what their rounding leaves of the row, eps / 2 (-sum p log p), on top."""


def log_partition(log_policy: ArrayLike, log_teacher: ArrayLike, alpha: ArrayLike) -> ndarray:
    """log Z(alpha) = log sum_x policy(x)^alpha teacher(x)^(1 - alpha), in nats.

    Convex in alpha. In [0, 1] never positive, and -inf where the parents share no outcome. Outside
    never negative: (alpha - 1) D for alpha > 1, D being the Renyi divergence of order alpha from
    policy to teacher (inf where the policy has an outcome that the teacher lacks); the mirror image
    for alpha < 0. Near zero it has the relative precision of the inputs: it is then computed from
    the gap of the inequality of the means.

    Args:
        log_policy: Normalised log-probabilities. Shape (*batch, vocab).
        log_teacher: The same of the teacher. Shape (*batch, vocab).
        alpha: The exponent on the policy, broadcast against the batch; nan gives nan. Shape
            (*alphas).

    Raises:
        ValueError: A row is not a normalised distribution, shapes differ, or alpha is infinite.
    """
    return check_pair(log_policy, log_teacher).log_partition(check_exponents(alpha))


def log_geometric_mean(log_policy: ArrayLike, log_teacher: ArrayLike, alpha: ArrayLike) -> ndarray:
    """log q_alpha, the normalised geometric mean of policy and teacher, in nats.

    At alpha* this is q*. Outside [0, 1] it is guidance: the parent with the exponent above 1,
    tilted away from the other. A row without a q_alpha is nan: its parents share no outcome or,
    outside [0, 1], the parent with the negative exponent lacks one that the other has.

    Arguments and errors are those of `log_partition`.
    """
    return check_pair(log_policy, log_teacher).log_geometric_mean(check_exponents(alpha))


def kl_gap(log_policy: ArrayLike, log_teacher: ArrayLike, alpha: ArrayLike) -> ndarray:
    """KL(q_alpha || teacher) - KL(q_alpha || policy), in nats.

    It equals E_q[log policy - log teacher], the slope of log Z, and so never decreases in alpha:
    a root, once bracketed, is the only one. nan where there is no q_alpha.

    Arguments and errors are those of `log_partition`.
    """
    return check_pair(log_policy, log_teacher).slope_and_curvature(check_exponents(alpha))[0]


def cumulants(
    log_policy: ArrayLike, log_teacher: ArrayLike, alpha: ArrayLike
) -> tuple[ndarray, ndarray, ndarray]:
    """The first three derivatives of log Z: mean, variance and third central moment of the
    log-ratio log policy - log teacher under q_alpha, in nats, nats^2 and nats^3.

    The mean is `kl_gap`. One Newton step towards alpha* is -mean / variance.

    Arguments and errors are those of `log_partition`.
    """
    pair, at = check_pair(log_policy, log_teacher), check_exponents(alpha)
    mean, variance = pair.slope_and_curvature(at)
    q = np.exp(pair.log_geometric_mean(at))
    third = (q * (pair.log_ratio - mean[..., None]) ** 3).sum(axis=-1)
    return mean, variance, third


def kl(log_p: ArrayLike, log_q: ArrayLike) -> ndarray:
    """KL(p || q) in nats; 0 log 0 = 0, and inf where p puts mass that q lacks.

    Computed from terms that are never negative, p log(p/q) - p + q, so that close distributions
    get a small number and not rounding noise.
    """
    return check_pair(log_p, log_q, names=("p", "q")).kl()


def total_variation(log_p: ArrayLike, log_q: ArrayLike) -> ndarray:
    """TV(p, q) = 1/2 sum_x |p(x) - q(x)|, between 0 and 1."""
    pair = check_pair(log_p, log_q, names=("p", "q"))
    distance = 0.5 * np.abs(np.exp(pair.log_policy) - np.exp(pair.log_teacher)).sum(axis=-1)
    return np.minimum(distance, 1.0)


def acceptance_probability(log_draft: ArrayLike, log_target: ArrayLike) -> ndarray:
    """sum_x min(draft(x), target(x)) = 1 - TV(draft, target), at one position.

    The chance that a token drawn from `draft` survives the accept/residual rule when the output
    must follow `target`: the largest that any exact rule can have.

    Source: Leviathan et al. (2023), arXiv:2211.17192, corollary 3.6.
    """
    pair = check_pair(log_draft, log_target, names=("draft", "target"))
    overlap = np.exp(np.minimum(pair.log_policy, pair.log_teacher)).sum(axis=-1)
    return np.minimum(overlap, 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """Two checked rows (or batches of rows) and what every point of their path needs.

    Made by `check_pair`; the methods trust it and check nothing again.

    Attributes:
        log_policy: float64, renormalised. Shape (*batch, vocab), as of all that follow.
        log_teacher: The same.
        shared: Where both have mass.
        log_ratio: log policy - log teacher on the shared support, 0 elsewhere.
        mass_gap: policy - teacher, exact also where the two are close.
    """

    log_policy: ndarray
    log_teacher: ndarray
    shared: ndarray
    log_ratio: ndarray
    mass_gap: ndarray

    def rows(self, index: ndarray) -> "Pair":
        """The rows `index` of a two-dimensional batch."""
        return Pair(*(getattr(self, name)[index] for name in self.__slots__))

    def log_path(self, alpha: ndarray) -> ndarray:
        """The unnormalised log of the path; off the shared support -inf, or inf where a parent
        with a negative exponent alone excludes an outcome."""
        weight = alpha[..., None]
        with np.errstate(invalid="ignore"):  # 0 * -inf at the ends, -inf + inf: off the support
            log_path = weight * self.log_policy + (1 - weight) * self.log_teacher
        return np.where(self.shared | (log_path == np.inf), log_path, -np.inf)

    def log_partition(self, alpha: ndarray) -> ndarray:
        """See `qstar.log_partition`."""
        log_path = self.log_path(alpha)
        log_z = _logsumexp(log_path)
        near = np.abs(log_z) < 0.5
        if near.any():
            # sum (alpha p + (1 - alpha) r - p^alpha r^(1-alpha)): every term >= 0, by the
            # inequality of the means, and <= 0 outside [0, 1]; the rows are normalised, so the
            # sum is 1 - Z.
            weight = alpha[..., None]
            teacher = np.exp(self.log_teacher)
            with np.errstate(invalid="ignore", over="ignore"):
                close = teacher * np.expm1(weight * self.log_ratio)
                path_gap = np.where(np.abs(self.log_ratio) < 1, close, np.exp(log_path) - teacher)
            gap = (weight * self.mass_gap - np.where(self.shared, path_gap, -teacher)).sum(axis=-1)
            outside = (alpha < 0) | (alpha > 1)
            gap = np.where(outside, np.minimum(gap, 0), np.maximum(gap, 0))
            with np.errstate(divide="ignore", invalid="ignore"):
                log_z = np.where(near, np.log1p(-gap), log_z)
        return np.where(np.isnan(alpha), np.nan, log_z)

    def log_geometric_mean(self, alpha: ndarray) -> ndarray:
        """See `qstar.log_geometric_mean`."""
        log_path = self.log_path(alpha)
        log_z = _logsumexp(log_path)
        log_z = np.where(np.isnan(alpha) | np.isposinf(log_z), np.nan, log_z)
        with np.errstate(invalid="ignore"):  # -inf - -inf: no shared outcome
            log_q = log_path - log_z[..., None]
        return log_q

    def slope_and_curvature(self, alpha: ndarray) -> tuple[ndarray, ndarray]:
        """The first two derivatives of log Z: mean and variance of the log-ratio under q."""
        log_path = self.log_path(alpha)
        log_z = _logsumexp(log_path)
        with np.errstate(invalid="ignore"):
            q = np.exp(log_path - log_z[..., None])
        slope = (q * self.log_ratio).sum(axis=-1)
        curvature = (q * (self.log_ratio - slope[..., None]) ** 2).sum(axis=-1)
        near = np.abs(log_z) < 0.5
        if near.any():
            # Subtracting sum (p - r) = 0 termwise leaves terms of second order in the log-ratio:
            # no cancellation between close parents, and the right sign at both ends.
            with np.errstate(invalid="ignore", over="ignore"):  # far outside [0, 1], not near
                first_order = np.exp(log_path) * self.log_ratio - self.mass_gap
                exact = first_order.sum(axis=-1) / np.exp(np.where(near, log_z, 0.0))
            slope = np.where(near, exact, slope)
        undefined = np.isnan(alpha) | np.isinf(log_z)
        return np.where(undefined, np.nan, slope), np.where(undefined, np.nan, curvature)

    def log_odds(self, alpha: ndarray) -> tuple[ndarray, ndarray, ndarray]:
        """Of what raises the slope to what lowers it: log E[max(l, 0)] - log E[max(-l, 0)], its
        derivative in alpha, and the log of what lowers it.

        Nearly straight in alpha (for two outcomes exactly), where the slope may be a staircase.
        Each side is scaled by its own largest term, so that neither underflows.
        """
        log_path = self.log_path(alpha)
        sides = []
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            for pull in (np.maximum(self.log_ratio, 0.0), np.maximum(-self.log_ratio, 0.0)):
                weight = np.where(pull > 0, log_path, -np.inf)
                top = weight.max(axis=-1, keepdims=True)
                weight = np.exp(weight - top) * pull
                total = weight.sum(axis=-1)
                sides.append((top[..., 0] + np.log(total), (weight * pull).sum(axis=-1) / total))
        (up, mean_up), (down, mean_down) = sides
        return up - down, mean_up + mean_down, down

    def kl(self) -> ndarray:
        """KL(first || second)."""
        p = np.exp(self.log_policy)
        terms = np.where(self.shared, p * self.log_ratio, 0.0) - self.mass_gap
        total = np.maximum(terms.sum(axis=-1), 0.0)
        outside = ~self.shared & (p > 0)
        return np.where(outside.any(axis=-1), np.inf, total)


def check_pair(
    log_policy: ArrayLike, log_teacher: ArrayLike, *, names: tuple[str, str] = ("policy", "teacher")
) -> Pair:
    """Check two batches of log-probabilities and prepare them for the path between them.

    Raises:
        ValueError: Shapes differ, a vocabulary is empty, the dtype is not a floating one, or a row
            holds nan or +inf or does not sum to one (to `NORMALISATION_TOLERANCE`).
    """
    given = np.asarray(log_policy), np.asarray(log_teacher)
    check_kind(*given, names, floating=lambda dtype: dtype.kind == "f")
    first, second = map(_check_rows, given, names)
    check_same_shape(first, second, names)
    shared = np.isfinite(first) & np.isfinite(second)
    with np.errstate(invalid="ignore"):  # -inf - -inf, discarded by the `where`
        log_ratio = np.where(shared, first - second, 0.0)
    p, r = np.exp(first), np.exp(second)
    with np.errstate(over="ignore", invalid="ignore"):
        # Where the two are close expm1 beats a difference of exponentials.
        mass_gap = np.where(shared & (np.abs(log_ratio) < 1), r * np.expm1(log_ratio), p - r)
    return Pair(first, second, shared, log_ratio, mass_gap)


def check_kind(
    first: Any, second: Any, names: tuple[str, str], *, floating: Callable[[Any], bool]
) -> None:
    """ValueError unless two arrays, or tensors, are of floating-point rows; reads no value."""
    for rows, name in zip((first, second), names, strict=True):
        if not floating(rows.dtype):
            raise ValueError(
                f"log_{name} must hold floating-point log-probabilities: got dtype {rows.dtype}. "
                f"Pass natural logarithms of probabilities."
            )
        if rows.ndim == 0 or rows.shape[-1] == 0:
            raise ValueError(
                f"log_{name} needs a vocabulary of at least one outcome on its last axis: "
                f"got shape {tuple(rows.shape)}."
            )


def check_same_shape(first: Any, second: Any, names: tuple[str, str]) -> None:
    """ValueError unless two arrays, or tensors, have one shape."""
    if first.shape != second.shape:
        raise ValueError(
            f"{names[0]} and {names[1]} must share one vocabulary and one batch: expected equal "
            f"shapes, got {tuple(first.shape)} and {tuple(second.shape)}. Broadcast or cut them "
            f"explicitly."
        )


def _check_rows(rows: ndarray, name: str) -> ndarray:
    """One batch of log-probabilities as float64, renormalised; ValueError if it is not one."""
    dtype = rows.dtype.name
    rows = rows.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        log_total = _logsumexp(rows)
        total = np.exp(log_total)
        off = ~(np.abs(total - 1) <= NORMALISATION_TOLERANCE.get(dtype, 1e-4))
        if off.any():  # rare: a bad row, or a half type on a large vocabulary
            _raise_if_bad(rows, total, name, dtype)
    return rows - log_total[..., None]


def _raise_if_bad(rows: ndarray, total: ndarray, name: str, dtype: str) -> None:
    """ValueError for the first row that is no distribution."""
    for bad, what in ((np.isnan(rows), "nan"), (np.isposinf(rows), "+inf")):
        if bad.any():
            *row, outcome = np.argwhere(bad)[0].tolist()
            raise ValueError(not_finite(name, row, what, outcome))
    size = np.where(np.isneginf(rows), 0.0, np.exp(rows) * np.abs(rows)).sum(axis=-1)
    rounding = np.finfo(np.float16).eps / 2 if dtype == "float16" else 0.0
    allowed = NORMALISATION_TOLERANCE.get(dtype, 1e-4) + rounding * np.minimum(
        size, math.log(rows.shape[-1])
    )
    off = ~(np.abs(total - 1) <= allowed)
    if off.any():
        row = np.argwhere(off)[0].tolist()
        at = tuple(row)
        raise ValueError(not_normalised(name, row, float(total[at]), float(allowed[at]), dtype))


def not_finite(name: str, row: list[int], what: str, outcome: int) -> str:
    """The words in which a row with nan or +inf is refused, here and for tensors."""
    return (
        f"log_{name} must hold log-probabilities, finite or -inf: {_row(row)} holds {what} at "
        f"outcome {outcome}. Mend what produced it; nothing is guessed."
    )


def not_normalised(name: str, row: list[int], total: float, allowed: float, dtype: str) -> str:
    """The same for a row that does not sum to one."""
    return (
        f"log_{name} must be normalised log-probabilities: {_row(row)} sums to {total:.6g}, not 1 "
        f"within {allowed:.2g}: it is off by {total - 1:+.1e}, more than rounding leaves of "
        f"{dtype} rows. Pass logits through log_softmax first; rows that were rounded to a half "
        f"type and widened need it again."
    )


def _row(index: list[int]) -> str:
    """How an error names a row of the batch."""
    return f"row {tuple(index)}" if len(index) > 1 else f"row {index[0] if index else 0}"


def _logsumexp(log_rows: ndarray) -> ndarray:
    """As SciPy's, whose care for axes and array kinds costs more than a short row."""
    top = log_rows.max(axis=-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore", over="ignore"):  # a row of -inf sums to zero: log 0
        total = np.log(np.exp(log_rows - top).sum(axis=-1))
    return np.asarray(total + top[..., 0])
