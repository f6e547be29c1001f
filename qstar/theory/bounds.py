"""What can be said about alpha* without solving for it, and what a fixed exponent costs at most.

Every bound is about two parents with one support, and holds for any of them: rows, densities,
models. Divergences and log-ratios in nats; NumPy float64.
"""

import numpy as np
from numpy import ndarray
from numpy.typing import ArrayLike
from scipy.optimize import elementwise
from scipy.special import digamma, log_expit

from ..rows import cumulants

SMALL_RANGE = 0.1
"""Below it `range_bound` is four terms of its series, to rounding."""


def derivative_bounds(
    chernoff: ArrayLike, policy_to_teacher: ArrayLike, teacher_to_policy: ArrayLike
) -> tuple[ndarray, ndarray]:
    """The interval that the two divergences between the parents leave for alpha*.

    log Z is convex, zero at both ends, with slope -KL(teacher || policy) at 0 and
    KL(policy || teacher) at 1. It stays above both tangents, so that at alpha*

        C <= alpha* KL(teacher || policy)  and  C <= (1 - alpha*) KL(policy || teacher).

    Args:
        chernoff: The Chernoff information C of the pair. Shape (*any), as of the others.
        policy_to_teacher: KL(policy || teacher); inf is a value.
        teacher_to_policy: KL(teacher || policy); inf is a value.

    Returns:
        (low, high) with low <= alpha* <= high; (0, 1) where both divergences are infinite. Equal
        parents, where all three are 0, give nan.

    Raises:
        ValueError: A number is negative, or C is above `largest_chernoff` by more than rounding.
    """
    c, there, back = _not_negative(
        chernoff=chernoff, policy_to_teacher=policy_to_teacher, teacher_to_policy=teacher_to_policy
    )
    most = largest_chernoff(there, back)
    if (c > most * (1 + 1e-9)).any():
        at = np.argmax(c - most)
        raise ValueError(
            f"two parents {there.flat[at]:g} and {back.flat[at]:g} nats from each other have a "
            f"Chernoff information of at most {most.flat[at]:g} nats: got {c.flat[at]:g}. Are the "
            f"three numbers of one pair, and all in nats?"
        )
    with np.errstate(divide="ignore", invalid="ignore"):  # 0/0 of equal parents is nan
        return c / back, 1 - c / there


def largest_chernoff(policy_to_teacher: ArrayLike, teacher_to_policy: ArrayLike) -> ndarray:
    """Where the tangents of log Z at its two ends meet: C is at most a b / (a + b).

    With a = KL(policy || teacher) and b = KL(teacher || policy), not negative; inf is a value.
    """
    there, back = _not_negative(
        policy_to_teacher=policy_to_teacher, teacher_to_policy=teacher_to_policy
    )
    with np.errstate(divide="ignore"):
        total = 1 / there + 1 / back
        return np.asarray(1 / total)


def range_bound(log_ratio_range: ArrayLike) -> ndarray:
    """B(R) = log((e^R - 1) / R) / R: alpha* lies in [1 - B, B] if the log-ratio's range is R.

    The range is the largest minus the smallest of log policy - log teacher over the common
    support. |F'''| <= R F'' makes F''(t) e^{-Rt} fall, and F(0) = F(1) does the rest; the bound is
    sharp (`range_extremal_pair`). It is 1/2 + R/24 for small R and 1 - log(R)/R for large R; inf
    gives 1, and a negative R a ValueError.
    """
    (r,) = _not_negative(log_ratio_range=log_ratio_range)
    inner = np.where((r > SMALL_RANGE) & np.isfinite(r), r, 1.0)
    # log((e^R - 1) / R) = R/2 + log(sinh(R/2) / (R/2)), in the form that cannot overflow.
    bound = 1 + (np.log(-np.expm1(-inner)) - np.log(inner)) / inner
    small = np.where(r <= SMALL_RANGE, r, 0.0)
    series = small / 24 - small**3 / 2880 + small**5 / 181440 - small**7 / 9676800
    bound = np.where(r <= SMALL_RANGE, 0.5 + series, bound)
    return np.where(np.isposinf(r), 1.0, np.where(np.isnan(r), np.nan, bound))


def widest_range(alpha: ArrayLike) -> ndarray:
    """The largest range of the log-ratio that keeps alpha* in [1 - alpha, alpha]: B's inverse.

    Raises:
        ValueError: An alpha outside [1/2, 0.999].
    """
    at = np.asarray(alpha, dtype=np.float64)
    if not ((at >= 0.5) & (at <= 0.999)).all():
        raise ValueError(
            f"alpha is the upper end of an interval around 1/2 and must lie in [0.5, 0.999]: got "
            f"{at}. For an interval [low, high] pass max(high, 1 - low)."
        )

    def excess(r: ndarray, wanted: ndarray) -> ndarray:
        return range_bound(r) - wanted

    root = elementwise.find_root(excess, (np.zeros(at.shape), np.full(at.shape, 2e4)), args=(at,))
    return np.where(at == 0.5, 0.0, root.x)


def range_extremal_pair(log_ratio_range: float, rarity: float) -> tuple[ndarray, ndarray]:
    """Two coins whose log-ratio has a given range, and whose alpha* nears `range_bound` from below.

    The teacher's heads have odds `rarity`, the policy's odds are e^R times as long. As the rarity
    vanishes the coins become Poisson distributions, and alpha* rises to B(R).

    Args:
        log_ratio_range: R in nats, positive.
        rarity: The teacher's odds of heads; small against e^-R for an alpha* near the bound.

    Returns:
        (log_policy, log_teacher) over (heads, tails). Shape (two,).

    Raises:
        ValueError: A range or a rarity that is not positive and finite.
    """
    for name, value in (("log_ratio_range", log_ratio_range), ("rarity", rarity)):
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite: got {value}.")
    odds = np.log(rarity) + np.array([log_ratio_range, 0.0])
    policy, teacher = np.stack([log_expit(odds), log_expit(-odds)], axis=-1)
    return policy, teacher


def local_law(log_policy: ArrayLike, log_teacher: ArrayLike) -> ndarray:
    """1/2 + k3 / (24 k2), cumulants of the log-ratio under q_1/2: alpha* where the parents agree.

    Its error is of third order in the log-ratio. No bound: far apart it may leave [0, 1]. Equal
    parents give 1/2.

    Raises:
        ValueError: A row is not a normalised distribution, or the shapes differ.
    """
    half = np.full(np.shape(log_policy)[:-1], 0.5)
    _, variance, third = cumulants(log_policy, log_teacher, half)
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = third / (24 * variance)
    return np.where(variance == 0, 0.5, 0.5 + shift)


def contamination_limit(tail_index: ArrayLike) -> ndarray:
    """Where alpha* goes as a policy (1 - e) teacher + e other nears its teacher by e -> 0.

    With g = other / teacher, the chance of g > t under the teacher falls like t^-s, up to a slowly
    varying factor. For 1 < s < 2 the places where e g is of order one decide, and log Z is
    asymptotically in proportion to Gamma(-s) Gamma(s - alpha) / Gamma(-alpha): the limit is the
    root of digamma(-alpha) = digamma(s - alpha), which is single, as the left side falls faster.
    A Gaussian contaminated by one of v > 2 times its variance has s = v / (v - 1). From s = 2 on
    the bulk decides, and the limit is 1/2.

    Raises:
        ValueError: An index s that is not above 1: then g would have no mean, and it has.
    """
    s = np.asarray(tail_index, dtype=np.float64)
    if not (s > 1).all():
        raise ValueError(f"the index of the tail must be above 1: got {s}.")
    inner = np.where(s < 2, s, 1.5)

    def gap(alpha: ndarray, index: ndarray) -> ndarray:
        return np.asarray(digamma(-alpha) - digamma(index - alpha))

    root = elementwise.find_root(
        gap, (np.full(s.shape, 1e-9), np.full(s.shape, 1 - 1e-9)), args=(inner,)
    )
    return np.where(s < 2, root.x, 0.5)


def fixed_exponent_bound(chernoff: ArrayLike, alpha: ArrayLike) -> ndarray:
    """C / min(alpha, 1 - alpha): at most so far is q_alpha from the parent that it serves worse.

    KL(q_alpha || teacher) = -F + alpha F', and F lies below zero at alpha with a tangent that is
    below zero at 1, so that F' <= -F / (1 - alpha) and the divergence is at most
    -F(alpha) / (1 - alpha) <= C / (1 - alpha); likewise C / alpha for the policy. So alpha = 1/2 is
    never worse than twice what q* achieves, and no other fixed exponent promises as much.

    Raises:
        ValueError: A negative C, or an alpha outside (0, 1).
    """
    (c,) = _not_negative(chernoff=chernoff)
    at = np.asarray(alpha, dtype=np.float64)
    if not ((at > 0) & (at < 1)).all():
        raise ValueError(f"the exponent must lie strictly between 0 and 1: got {at}.")
    return c / np.minimum(at, 1 - at)


def _not_negative(**numbers: ArrayLike) -> list[ndarray]:
    values = [np.asarray(value, dtype=np.float64) for value in numbers.values()]
    for name, value in zip(numbers, values, strict=True):
        if (value < 0).any():
            raise ValueError(f"{name} is never negative: got {value[value < 0].flat[0]} nats.")
    return [np.asarray(value) for value in np.broadcast_arrays(*values)]
