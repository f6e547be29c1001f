r"""Two members of one exponential family: alpha*, log Z and KL from one function of alpha.

With natural parameters eta_1 (policy) and eta_2 (teacher) and log-normaliser A, the geometric mean
is the member at alpha eta_1 + (1 - alpha) eta_2, log Z(alpha) is minus the Jensen gap of A between
them, and alpha* is the root of

    (eta_1 - eta_2) . grad A(alpha eta_1 + (1 - alpha) eta_2) = A(eta_1) - A(eta_2).

Taken literally, close parents leave nothing of these differences but rounding. They are therefore
written as areas under the variance v(t) of the log-ratio along the path, the second derivative of
log Z, which no family needs a difference for:

    KL(q_alpha || teacher) = integral of t v(t) from 0 to alpha,
    KL(q_alpha || policy) = integral of (1 - t) v(t) from alpha to 1,

and alpha* is where the two areas agree. Every digit of the parameters reaches the result, for
parents that differ in the last one and for ratios of 1e100.

Source: Taylor's formula for A with the remainder as an integral; Nielsen (2013),
doi:10.1109/LSP.2013.2243726, for the root.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy import ndarray
from scipy.optimize import brentq

from ..result import Balance
from .base import Distribution

EPS = np.finfo(np.float64).eps
Variance = Callable[[ndarray, ndarray], ndarray]
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
_NODES, _WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2


def same_family(policy: Distribution, teacher: Distribution) -> bool:
    """Whether the two are members of one exponential family, which this module can handle."""
    kin = policy._kin()
    return type(policy) is type(teacher) and kin is not None and kin == teacher._kin()


def kl_to_parents(
    policy: Distribution, teacher: Distribution, alpha: ndarray
) -> tuple[ndarray, ndarray]:
    """KL(q_alpha || policy) and KL(q_alpha || teacher), in nats; see `qstar.families`."""
    found = [_areas(policy, teacher, float(at)) for at in np.asarray(alpha).flat]
    to_policy, to_teacher = np.array(found).reshape(-1, 2).T
    return to_policy.reshape(np.shape(alpha)), to_teacher.reshape(np.shape(alpha))


def log_partition(policy: Distribution, teacher: Distribution, alpha: ndarray) -> ndarray:
    """log Z(alpha); see `qstar.families`."""
    to_policy, to_teacher = kl_to_parents(policy, teacher, alpha)
    return -(alpha * to_policy + (1 - alpha) * to_teacher) + 0.0


def kl(p: Distribution, q: Distribution) -> float:
    """KL(p || q); see `qstar.families`."""
    return _areas(p, q, 1.0)[1]


def geometric_mean(policy: Distribution, teacher: Distribution, alpha: float) -> Distribution:
    """The member q_alpha; a parent itself at an end."""
    if alpha in (0.0, 1.0):
        return policy if alpha else teacher
    return policy._between(teacher, alpha, 1 - alpha)


def solve_kl_symmetry(policy: Distribution, teacher: Distribution) -> Balance[float, str, bool]:
    """Find alpha* of two members of one exponential family; see `qstar.families`."""
    at_0, at_1 = _areas(policy, teacher, 0.0)[0], _areas(policy, teacher, 1.0)[1]
    if at_0 == 0 or at_1 == 0:
        return Balance(0.5, 0.0, 0.0, 0.0, "degenerate_all", True, 0.0, 0.0, 2)

    def slope(alpha: float) -> float:
        to_policy, to_teacher = _areas(policy, teacher, alpha)
        return to_teacher - to_policy

    alpha, root = brentq(
        slope, 0.0, 1.0, xtol=1e-300, rtol=4 * EPS, maxiter=2000, full_output=True, disp=False
    )
    to_policy, to_teacher = _areas(policy, teacher, alpha)
    curvature = policy._variance(teacher, np.array([alpha]), np.array([1 - alpha]))[0]
    return Balance(
        alpha=float(alpha),
        chernoff=alpha * to_policy + (1 - alpha) * to_teacher,
        kl_to_policy=to_policy,
        kl_to_teacher=to_teacher,
        status="interior",
        converged=bool(root.converged),
        slope=to_teacher - to_policy,
        curvature=float(curvature),
        passes=int(root.function_calls) + 2,
    )


def _areas(policy: Distribution, teacher: Distribution, alpha: float) -> tuple[float, float]:
    """The two divergences at one alpha: at 0 the first is KL(teacher || policy), at 1 the second
    KL(policy || teacher)."""
    straight = partial(policy._variance, teacher)
    return (
        _area(lambda t, rest: straight(rest, t), 1 - alpha, alpha),
        _area(straight, alpha, 1 - alpha),
    )


def _area(variance: Variance, high: float, rest: float) -> float:
    """The integral of t variance(t, 1 - t) from 0 to `high`, `rest` being 1 - high.

    Nodes are measured from the nearer end of [0, 1], near which a far pair changes fastest.
    """
    if high <= 0.5:
        return _integrate(lambda t: t * variance(t, 1 - t), 0.0, high)
    near = _integrate(lambda t: t * variance(t, 1 - t), 0.0, 0.5)
    return near + _integrate(lambda s: (1 - s) * variance(1 - s, s), rest, 0.5)


def _integrate(function: Callable[[ndarray], ndarray], low: float, high: float) -> float:
    """A positive function's integral, to rounding: halve the panels until halving changes nothing.

    `scipy.integrate.tanhsinh` reaches the same digits on every reference case, and takes 10 to 20
    times as long (53 ms a balance of two Poisson distributions against 3); `quad` misses some.

    Raises:
        ArithmeticError: The function overflows: the parents are too far apart for float64.
    """
    start, width = np.array([low]), np.array([high - low])
    whole, settled = _gauss(function, start, width), 0.0
    while len(start):
        width = width / 2
        parts = _gauss(function, np.stack([start, start + width], 1).ravel(), np.repeat(width, 2))
        total, pairs = settled + parts.sum(), parts.reshape(-1, 2)
        if not np.isfinite(total):
            raise ArithmeticError(
                "the divergence between policy and teacher overflows float64. Bring the parameters "
                "of the two closer, or compare them on another scale."
            )
        open_ = (np.abs(pairs.sum(axis=1) - whole) > 16 * EPS * total) & (width > 1e-305)
        settled += pairs[~open_].sum()
        start = np.stack([start, start + width], 1)[open_].ravel()
        width, whole = np.repeat(width[open_], 2), pairs[open_].ravel()
    return float(settled)


def _gauss(function: Callable[[ndarray], ndarray], start: ndarray, width: ndarray) -> ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return function(start[:, None] + width[:, None] * _NODES) @ _WEIGHTS * width
