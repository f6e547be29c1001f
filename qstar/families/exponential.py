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


def kl_to_parents(policy: Distribution, teacher: Distribution, alpha: float) -> tuple[float, float]:
    """KL(q_alpha || policy) and KL(q_alpha || teacher), in nats: the two areas.

    At alpha = 0 the first is KL(teacher || policy), at 1 the second is KL(policy || teacher).
    """

    def from_teacher(t: ndarray, rest: ndarray) -> ndarray:
        return policy._variance(teacher, t, rest)

    def from_policy(t: ndarray, rest: ndarray) -> ndarray:
        return policy._variance(teacher, rest, t)

    return _area(from_policy, 1 - alpha, alpha), _area(from_teacher, alpha, 1 - alpha)


def solve_kl_symmetry(policy: Distribution, teacher: Distribution) -> Balance[float, str, bool]:
    """Find alpha* of two members of one exponential family; see `qstar.families`."""
    at_0, at_1 = kl_to_parents(policy, teacher, 0.0)[0], kl_to_parents(policy, teacher, 1.0)[1]
    if at_0 == 0 or at_1 == 0:
        return Balance(0.5, 0.0, 0.0, 0.0, "degenerate_all", True, 0.0, 0.0, 2)

    def slope(alpha: float) -> float:
        to_policy, to_teacher = kl_to_parents(policy, teacher, alpha)
        return to_teacher - to_policy

    alpha, root = brentq(
        slope, 0.0, 1.0, xtol=1e-300, rtol=4 * EPS, maxiter=2000, full_output=True, disp=False
    )
    to_policy, to_teacher = kl_to_parents(policy, teacher, alpha)
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

    Raises:
        ArithmeticError: The function overflows: the parents are too far apart for float64.
    """
    if low >= high:
        return 0.0
    panels = np.array([[low, high - low]])  # start, width
    whole = _gauss(function, panels)
    settled = 0.0
    while len(panels):
        width = panels[:, 1] / 2
        halves = np.stack(
            [np.stack([panels[:, 0], width], 1), np.stack([panels[:, 0] + width, width], 1)], 1
        )
        parts = _gauss(function, halves.reshape(-1, 2)).reshape(-1, 2)
        total = settled + parts.sum()
        if not np.isfinite(total):
            raise ArithmeticError(
                "the divergence between policy and teacher overflows float64. Bring the parameters "
                "of the two closer, or compare them on another scale."
            )
        unsettled = np.abs(parts.sum(axis=1) - whole) > 16 * EPS * total
        unsettled &= width > 1e-305
        settled += parts[~unsettled].sum()
        panels, whole = halves[unsettled].reshape(-1, 2), parts[unsettled].ravel()
    return float(settled)


def _gauss(function: Callable[[ndarray], ndarray], panels: ndarray) -> ndarray:
    nodes = panels[:, :1] + panels[:, 1:] * _NODES
    with np.errstate(over="ignore", invalid="ignore"):
        return function(nodes) @ _WEIGHTS * panels[:, 1]
