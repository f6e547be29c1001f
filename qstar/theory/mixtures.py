"""Other distributions between the two parents than q*, and what each of them costs.

q* makes the larger of KL(q || policy) and KL(q || teacher) as small as it can be, C. Its rivals are
the geometric means at a fixed exponent and the arithmetic mixtures, among them the Jensen-Shannon
midpoint and the two mixtures that balance the divergences in one direction or the other.
NumPy float64 on log-probabilities, vocabulary last, in nats.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy import ndarray
from numpy.typing import ArrayLike
from scipy.optimize import elementwise

from ..rows import Pair, check_pair, kl


@dataclass(frozen=True, slots=True, eq=False)
class Cost:
    """What a distribution q between two parents costs them, in nats per token.

    Attributes:
        to_policy: KL(q || policy), the reverse divergence. Shape (*batch).
        to_teacher: KL(q || teacher). Shape (*batch).
        from_policy: KL(policy || q), the forward one. Shape (*batch).
        from_teacher: KL(teacher || q). Shape (*batch).
    """

    to_policy: ndarray
    to_teacher: ndarray
    from_policy: ndarray
    from_teacher: ndarray

    @property
    def worse(self) -> ndarray:
        """The larger reverse divergence: at least C, and C only for q*."""
        return np.maximum(self.to_policy, self.to_teacher)

    @property
    def worse_forward(self) -> ndarray:
        """The larger forward divergence: smallest for `forward_mixture`."""
        return np.maximum(self.from_policy, self.from_teacher)


def cost(log_q: ArrayLike, log_policy: ArrayLike, log_teacher: ArrayLike) -> Cost:
    """The four divergences between q and its two parents; inf where a support is left."""
    return Cost(
        kl(log_q, log_policy),
        kl(log_q, log_teacher),
        kl(log_policy, log_q),
        kl(log_teacher, log_q),
    )


def log_mixture(log_policy: ArrayLike, log_teacher: ArrayLike, weight: ArrayLike) -> ndarray:
    """log of weight * policy + (1 - weight) * teacher; at 1/2 the Jensen-Shannon midpoint."""
    pair = check_pair(log_policy, log_teacher)
    weights = np.asarray(weight, dtype=np.float64)
    if not ((weights >= 0) & (weights <= 1)).all():
        raise ValueError(f"a mixture's weight on the policy must lie in [0, 1]: got {weights}.")
    return _log_mixture(pair, weights)


def reverse_mixture(log_policy: ArrayLike, log_teacher: ArrayLike) -> tuple[ndarray, ndarray]:
    """The mixture m with KL(m || policy) = KL(m || teacher): the best one can do without powers.

    KL(m_w || policy) is convex in the weight w and 0 at w = 1, so it falls; the other one rises:
    they cross once, and there their larger one is smallest among all mixtures.

    Returns:
        (the weight on the policy, the log-probabilities of the mixture). Equal parents get 1/2.
        Shape (*batch) and (*batch, vocab).

    Raises:
        ValueError: The supports differ: both divergences are then infinite.
    """
    pair = check_pair(log_policy, log_teacher)
    if not (np.isfinite(pair.log_policy) == np.isfinite(pair.log_teacher)).all():
        raise ValueError(
            "policy and teacher must have one support: a mixture has mass where one parent has "
            "none, so that its divergence to it is infinite. Cut both parents to the same set."
        )
    return _balance(pair, _reverse_gap)


def forward_mixture(log_policy: ArrayLike, log_teacher: ArrayLike) -> tuple[ndarray, ndarray]:
    """The m whose larger forward divergence, KL(policy || m) or KL(teacher || m), is smallest.

    It is a mixture, and the common divergence is the capacity of the channel that sends one bit as
    a draw from one parent or the other: at most log 2, whatever the parents.

    Returns:
        (the weight on the policy, the log-probabilities of the mixture). Equal parents get 1/2.
        Shape (*batch) and (*batch, vocab).

    Source: the redundancy-capacity theorem; Cover and Thomas (2006), chapter 13.
    """
    return _balance(check_pair(log_policy, log_teacher), _forward_gap)


def _log_mixture(pair: Pair, weight: ndarray) -> ndarray:
    with np.errstate(divide="ignore"):  # a weight of 0 leaves the other parent
        first, second = np.log(weight)[..., None], np.log1p(-weight)[..., None]
    return np.logaddexp(first + pair.log_policy, second + pair.log_teacher)


def _reverse_gap(pair: Pair, weight: ndarray) -> ndarray:
    """KL(m || teacher) - KL(m || policy) = E_m[log policy - log teacher]; it rises with w."""
    mass = np.exp(_log_mixture(pair, weight))
    return (mass * pair.log_ratio).sum(axis=-1)


def _forward_gap(pair: Pair, weight: ndarray) -> ndarray:
    """KL(teacher || m) - KL(policy || m); it rises with w."""
    log_m = _log_mixture(pair, weight)
    terms = 0.0
    for log_parent, sign in ((pair.log_teacher, 1.0), (pair.log_policy, -1.0)):
        with np.errstate(invalid="ignore"):  # -inf - -inf where neither has mass
            ratio = np.where(np.isfinite(log_parent), log_parent - log_m, 0.0)
        terms = terms + sign * np.exp(log_parent) * ratio
    return np.asarray(terms).sum(axis=-1)


def _balance(pair: Pair, gap: Callable[[Pair, ndarray], ndarray]) -> tuple[ndarray, ndarray]:
    *batch, vocab = pair.log_policy.shape
    flat = Pair(*(getattr(pair, name).reshape(-1, vocab) for name in Pair.__slots__))
    count = len(flat.log_policy)
    weight = np.full(count, 0.5)
    edges = [gap(flat, np.full(count, end)) for end in (0.0, 1.0)]
    apart = np.flatnonzero((edges[0] < 0) & (edges[1] > 0))
    if len(apart):

        def gap_at(at, row):  # `row` keeps it elementwise while SciPy drops finished rows
            return np.clip(gap(flat.rows(row), at), -1e300, 1e300)  # disjoint: infinite at the ends

        root = elementwise.find_root(
            gap_at,
            (np.zeros(len(apart)), np.ones(len(apart))),
            args=(apart,),
            tolerances={"xatol": 1e-14, "xrtol": 1e-14},
        )
        weight[apart] = root.x
    return weight.reshape(tuple(batch)), _log_mixture(flat, weight).reshape(pair.log_policy.shape)
