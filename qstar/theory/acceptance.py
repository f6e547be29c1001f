"""Acceptance as a property of the pair: what the Chernoff information says about it, and alpha not.

The acceptance probability of a draft is 1 - TV(draft, target). Here the target is q*, the draft is
one of its parents (the bounds hold for either), and every function is NumPy float64, in nats.
"""

import numpy as np
from numpy import ndarray
from numpy.typing import ArrayLike
from scipy.optimize import brentq, elementwise
from scipy.special import gammaln, log_expit, logit, logsumexp

from ..rows import acceptance_probability, check_pair
from .bounds import _not_negative

TINY_CHERNOFF = 1e-10
"""Below it the sharp bound is Pinsker's, to within 1e-15."""

LARGE_CHERNOFF = 40.0
"""Above it the sharp bound is exp(-chernoff), to within rounding."""


def sharpest_acceptance_bound(chernoff: ArrayLike) -> ndarray:
    """The smallest acceptance probability that a Chernoff information allows.

    It holds for either parent as the draft. At alpha*, KL(q* || draft) = C for both, and among all
    pairs of distributions at total variation V that divergence is at least L(V) = min_b kl(b + V,
    b), between coins. So the acceptance is at least 1 - V, where L(V) = C. The bound is sharp:
    `tightest_pair` attains it. From above there is only 1: given C, every acceptance in [bound, 1)
    occurs.

    With t > 0 the minimising coin is b = (1 - coth t + 1/t) / 2, and V = 2 t b (1 - b). Of a C that
    is inf the bound is 0, of nan nan; a negative one raises ValueError.

    Source: Fedotov, Harremoes and Topsoe (2003), "Refinements of Pinsker's inequality", IEEE
        Transactions on Information Theory 49(6).
    """
    (values,) = _not_negative(chernoff=chernoff)
    inner = (values > TINY_CHERNOFF) & (values < LARGE_CHERNOFF)
    t = _sharp_parameter(np.where(inner, values, 1.0))
    coin = _sharp_coin(t)
    with np.errstate(over="ignore"):
        bound = coin + (1 - coin) * 2 * t / np.expm1(2 * t)  # 1 - V, without the cancellation
    bound = np.where(inner, bound, np.exp(-values))
    return np.where(values <= TINY_CHERNOFF, pinsker_acceptance_bound(values), bound)


def pinsker_acceptance_bound(chernoff: ArrayLike) -> ndarray:
    """max(0, 1 - sqrt(C / 2)): Pinsker's inequality; says nothing beyond 2 nats."""
    (values,) = _not_negative(chernoff=chernoff)
    return np.maximum(0.0, 1 - np.sqrt(values / 2))


def bretagnolle_huber_acceptance_bound(chernoff: ArrayLike) -> ndarray:
    """1 - sqrt(1 - exp(-C)): weaker than Pinsker's for small C, and never empty.

    Source: Bretagnolle and Huber (1979), "Estimation des densites: risque minimax".
    """
    (values,) = _not_negative(chernoff=chernoff)
    return 1 - np.sqrt(-np.expm1(-values))


def tightest_pair(chernoff: float) -> tuple[ndarray, ndarray]:
    """Two coins whose Chernoff information is `chernoff` and whose policy drafts the worst.

    Returns:
        (log_policy, log_teacher), over two outcomes: the policy's acceptance probability against
        q* is `sharpest_acceptance_bound(chernoff)`. Shape (two,).

    Raises:
        ValueError: A Chernoff information outside [1e-10, 3] nats: beyond, alpha* of the pair is
            too close to 1 for float64 (1 - alpha* falls like exp(-exp(C))).
    """
    if not TINY_CHERNOFF <= chernoff <= 3:
        raise ValueError(
            f"the tightest pair is made for a Chernoff information in [{TINY_CHERNOFF:g}, 3] "
            f"nats: got {chernoff}. Beyond, its alpha* is 1 to float64; the bound itself goes on."
        )
    t = float(_sharp_parameter(np.array(chernoff)))
    coin, rest = float(_sharp_coin(np.array(t))), 1 / np.expm1(2 * t)
    log_policy = np.array([np.log(coin), np.log1p(-coin)])
    # 1 - b - V = (1 - b)(1 - 2 t b), and 1 - 2 t b = 2 t / (e^(2t) - 1).
    log_last = np.log1p(-coin) + np.log(2 * t * rest)
    log_target = np.array([np.log1p(-np.exp(log_last)), log_last])
    return log_policy, teacher_for(log_policy, log_target)[0]


def pair_at(chernoff: float, acceptance: float) -> tuple[ndarray, ndarray]:
    """Two coins with a given Chernoff information and a given acceptance of the policy.

    There are such coins for every acceptance from `sharpest_acceptance_bound(chernoff)` up to 1,
    without 1: at V = 1 - acceptance, kl(b + V, b) rises from its least value to infinity as b falls
    to 0, and so takes the value `chernoff`.

    Returns:
        (log_policy, log_teacher), over two outcomes. Shape (two,).

    Raises:
        ValueError: An acceptance below the bound, or so near 1 that chernoff / (1 - acceptance)
            exceeds 300 (b falls like the exponential of it).
    """
    bound = float(sharpest_acceptance_bound(chernoff))
    if not (bound < acceptance < 1 and chernoff / (1 - acceptance) <= 300):
        raise ValueError(
            f"at a Chernoff information of {chernoff} nats the acceptance must lie above "
            f"{bound:.6g} and below 1 by at least chernoff / 300: got {acceptance}."
        )
    variation = 1 - acceptance

    def excess(log_coin: float) -> float:
        coin = np.exp(log_coin)
        heads = (coin + variation) * (np.log(coin + variation) - log_coin)
        tails = (1 - coin - variation) * np.log1p(-variation / (1 - coin))
        return float(heads + tails - chernoff)

    def extremal(t: float) -> tuple[float, float]:
        coin = float(_sharp_coin(np.array(t)))
        return coin, 2 * t * coin * (1 - coin)

    # The divergence is least at the extremal coin of this variation, and rises from there to b = 0.
    least = brentq(lambda t: extremal(t)[1] - variation, 1e-9, 1e9)
    log_coin = brentq(excess, -700.0, float(np.log(extremal(least)[0])), xtol=1e-14)
    coin = np.exp(log_coin)
    log_policy = np.array([log_coin, np.log1p(-coin)])
    log_target = np.array([np.log(coin + variation), np.log1p(-coin - variation)])
    return log_policy, teacher_for(log_policy, log_target)[0]


def teacher_for(log_policy: ArrayLike, log_target: ArrayLike) -> tuple[ndarray, float]:
    """The teacher that makes `target` the q* of (policy, teacher), and the alpha* of that pair.

    There is one for any two distributions whose ratio is not constant on the target's support: take
    teacher ~ target^s policy^(1-s), so that the target is the geometric mean at alpha = 1 - 1/s.
    The two divergences agree where (1 - 1/s) D_s(target || policy) = KL(target || policy), with
    Renyi's D_s; the left side grows from 0 at s = 1 to the largest log-ratio, so that one s does
    it. So a distribution and its draft may be any two distributions at all, which is why the bounds
    on the acceptance through C alone are sharp.

    Returns:
        (log_teacher, alpha). Shape (vocab,).

    Raises:
        ValueError: The target puts mass where the policy has none, their ratio is constant on the
            target's support, or a row is not a distribution.
    """
    pair = check_pair(log_target, log_policy, names=("target", "policy"))
    if pair.log_policy.ndim != 1:
        raise ValueError(f"one pair at a time: got shape {pair.log_policy.shape}.")
    support = np.isfinite(pair.log_policy)
    if not pair.shared[support].all():
        raise ValueError(
            "the target must have no mass where the policy has none: it could not be a geometric "
            "mean of the policy and anything."
        )
    log_target, log_ratio = pair.log_policy[support], pair.log_ratio[support]
    divergence = float(pair.kl())
    if np.ptp(log_ratio) == 0:
        raise ValueError(
            "target / policy must not be constant on the target's support: every teacher that is "
            "proportional to the target there would do, and none has an alpha* of its own."
        )

    def excess(log_order: float) -> float:  # log_order = log(s - 1); same sign as the slope
        order = np.exp(log_order)
        log_moment = logsumexp(log_target + order * log_ratio)
        return float(log_moment / (1 + order) - divergence)

    low, high = -1.0, 1.0
    while excess(low) > 0:
        low -= 2
    while excess(high) < 0:
        high += 2
    order = np.exp(brentq(excess, low, high, xtol=1e-14, rtol=1e-14))
    log_tilted = log_target + order * log_ratio
    log_teacher = np.full(support.shape, -np.inf)
    log_teacher[support] = log_tilted - logsumexp(log_tilted)
    return log_teacher, float(order / (1 + order))


def pair_with(alpha: float, acceptance: float) -> tuple[ndarray, ndarray]:
    """A policy and a teacher with a given alpha* and a given acceptance probability of the policy.

    Every pair of numbers in (0, 1) occurs, so alpha* says nothing about acceptance. The
    distributions are the numbers of heads in tosses of two coins: alpha* is that of one toss, while
    the acceptance vanishes with the number of tosses, and rises to 1 as the coins become alike or
    heads rare.

    Args:
        alpha: alpha* of the pair, in [0.05, 0.95].
        acceptance: 1 - TV(policy, q*), in [0.01, 0.99].

    Returns:
        (log_policy, log_teacher), of equal shape. Shape (vocab,).

    Raises:
        ValueError: A number outside its range.
    """
    for name, value, least in (("alpha", alpha, 0.05), ("acceptance", acceptance, 0.01)):
        if not least <= value <= 1 - least:
            raise ValueError(f"{name} must lie in [{least}, {1 - least}]: got {value}.")

    def accepted(tosses: int, log_odds: float) -> float:
        policy, teacher = _coins(alpha, log_odds)
        target = alpha * policy + (1 - alpha) * teacher
        pair = _log_binomial(tosses, policy), _log_binomial(tosses, target)
        return float(acceptance_probability(*pair))

    tosses = 1
    while accepted(tosses, 2.0) > acceptance:
        tosses += 1
    rare = -30.0 if abs(alpha - 0.5) > 1e-5 else 1e-6
    log_odds = brentq(lambda x: accepted(tosses, x) - acceptance, rare, 2.0, xtol=1e-14)
    policy, teacher = _coins(alpha, float(log_odds))
    return _log_binomial(tosses, policy), _log_binomial(tosses, teacher)


def source_loop_distribution(
    log_draft: ArrayLike, log_target: ArrayLike, num_candidates: int
) -> ndarray:
    """The distribution that the source's loop really draws from, with independent candidates.

    It is (1 - (1 - a)^k) m + (1 - a)^k target, where a is the acceptance probability and m =
    min(draft, target) / a the distribution of an accepted candidate: each of k candidates is
    accepted with probability a, and what is left is the target's. The bias grows with k, from none
    at k = 0 to TV(m, target).

    Returns:
        Probabilities (not logarithms). Shape (*batch, vocab).

    Raises:
        ValueError: A row is not a normalised distribution, the shapes differ, or the two
            distributions share no outcome.
    """
    pair = check_pair(log_draft, log_target, names=("draft", "target"))
    shared = np.exp(np.minimum(pair.log_policy, pair.log_teacher))
    acceptance = shared.sum(axis=-1, keepdims=True)
    if (acceptance == 0).any():
        raise ValueError("draft and target share no outcome: no candidate is ever accepted.")
    all_rejected = (1 - np.minimum(acceptance, 1)) ** num_candidates
    return (1 - all_rejected) * shared / acceptance + all_rejected * np.exp(pair.log_teacher)


def tokens_per_round(acceptance: ArrayLike, gamma: ArrayLike) -> ndarray:
    """Mean tokens that a round of gamma drafts emits: (1 - a^(gamma+1)) / (1 - a).

    For positions that each accept with the same probability a, independently of the past; at least
    1, at most gamma + 1.

    Source: Leviathan et al. (2023), arXiv:2211.17192, equation 1.
    """
    a = np.asarray(acceptance, dtype=float)
    drafts = np.asarray(gamma, dtype=float)
    with np.errstate(divide="ignore", invalid="ignore"):  # 0/0 at a = 1
        emitted = (1 - a ** (drafts + 1)) / (1 - a)
    return np.where(a == 1, drafts + 1, emitted)


def _sharp_parameter(chernoff: ndarray) -> ndarray:
    """The t at which the extremal coins diverge by `chernoff`."""

    def excess(log_t: ndarray, wanted: ndarray) -> ndarray:
        return np.log(_sharp_divergence(np.exp(log_t)) / wanted)

    low = np.full(chernoff.shape, np.log(np.sqrt(TINY_CHERNOFF) / 10))
    root = elementwise.find_root(
        excess, (low, np.full(chernoff.shape, LARGE_CHERNOFF + 1)), args=(chernoff,)
    )
    return np.where(np.isnan(chernoff), np.nan, np.exp(root.x))


def _sharp_coin(t: ndarray) -> ndarray:
    """b = (1 - coth t + 1/t) / 2 = 1/(2t) - 1/(e^(2t) - 1)."""
    with np.errstate(over="ignore"):
        coin = 1 / (2 * t) - 1 / np.expm1(2 * t)
    return np.where(t < 1e-3, 0.5 - t / 6 + t**3 / 90, coin)


def _sharp_divergence(t: ndarray) -> ndarray:
    """kl(b + V, b) in nats, from terms that stay small where the coins are close."""
    coin = _sharp_coin(t)
    variation = 2 * t * coin * (1 - coin)
    with np.errstate(over="ignore"):
        last = (1 - coin) * 2 * t / np.expm1(2 * t)  # 1 - b - V, which may underflow to 0
    near = np.minimum(variation / (1 - coin), 0.5)
    second = np.where(
        variation / (1 - coin) < 0.5,
        (1 - coin) * ((1 - near) * np.log1p(-near)),
        last * (np.log(2 * t) - 2 * t - np.log(-np.expm1(-2 * t))),
    )
    return (coin + variation) * np.log1p(variation / coin) + second


def _coins(alpha: float, log_odds: float) -> tuple[float, float]:
    """Log-odds of heads of (policy, teacher) with this alpha*, the likelier coin's being given."""
    steeper = max(alpha, 1 - alpha)
    high, near = log_odds, min(-log_odds, log_odds - 1e-4)
    low = near
    if _coin_alpha(high, near) < steeper:  # mirrored coins: 1/2
        low = brentq(lambda low: _coin_alpha(high, low) - steeper, near - 150, near, xtol=1e-13)
    return (high, float(low)) if alpha >= 0.5 else (float(low), high)


def _coin_alpha(policy: float, teacher: float) -> float:
    """alpha* of two coins with the given log-odds of heads: exact."""
    mean = (-log_expit(-policy) + log_expit(-teacher)) / (policy - teacher)
    return float((logit(mean) - teacher) / (policy - teacher))


def _log_binomial(tosses: int, log_odds: float) -> ndarray:
    """The distribution of the number of heads, in logs, normalised exactly."""
    heads = np.arange(tosses + 1)
    log_ways = gammaln(tosses + 1) - gammaln(heads + 1) - gammaln(tosses - heads + 1)
    log_p = log_ways + heads * log_odds + tosses * log_expit(-log_odds)
    return log_p - logsumexp(log_p)
