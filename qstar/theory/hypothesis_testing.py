"""Telling policy and teacher apart from independent draws: the error of the best judge.

One parent is chosen by a coin, n tokens are drawn from it, and a judge who knows both says which it
was. The best judge compares likelihoods, and errs with probability sum min(w policy^n,
(1 - w) teacher^n). It falls like exp(-n C), for every coin: that is what C measures, and the draws
that mislead the judge look like draws from q*.

NumPy float64, one pair of rows at a time, in nats.
"""

import math
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy import ndarray
from numpy.typing import ArrayLike
from scipy.special import gammaln, logsumexp

from ..arguments import check_count
from ..rows import Pair, check_pair

MOST_TYPES = 2_000_000
"""The largest number of tallies that `log_error` goes through."""


@dataclass(frozen=True, slots=True, eq=False)
class Verdicts:
    """What a simulated judge did.

    Attributes:
        error: The estimated probability that the judge errs.
        standard_error: Of that estimate.
        misled: The mean share of each token in the draws that misled the judge; nan if none did.
            Shape (vocab,).
    """

    error: float
    standard_error: float
    misled: ndarray


def log_error(
    log_policy: ArrayLike, log_teacher: ArrayLike, draws: int, *, prior: float = 0.5
) -> float:
    """log of the error probability of the best judge after `draws` tokens, exactly.

    Only how often each token came matters, so it is a sum over tallies.

    Args:
        log_policy: One row of log-probabilities. Shape (vocab,).
        log_teacher: The same of the teacher.
        draws: How many tokens are drawn.
        prior: The probability that the policy was chosen.

    Returns:
        In nats; -inf if the judge never errs.

    Raises:
        ValueError: An argument makes no sense, or there are more tallies than `MOST_TYPES`.
    """
    pair = _one_pair(log_policy, log_teacher, draws, prior)
    # On the shared support: whatever else is drawn gives the parent away.
    ours, theirs = pair.log_policy[pair.shared], pair.log_teacher[pair.shared]
    vocab = len(ours)
    if vocab == 0:
        return -math.inf
    types = math.comb(draws + vocab - 1, vocab - 1)
    if types > MOST_TYPES:
        raise ValueError(
            f"{draws} draws from {vocab} shared tokens have {types} tallies, more than "
            f"{MOST_TYPES}: draw fewer, or use simulate_tilted."
        )
    tallies = _tallies(draws, vocab)
    log_ways = gammaln(draws + 1) - gammaln(tallies + 1).sum(axis=-1)
    as_policy = math.log(prior) + tallies @ ours
    as_teacher = math.log1p(-prior) + tallies @ theirs
    return float(logsumexp(log_ways + np.minimum(as_policy, as_teacher)))


def simulate(
    log_policy: ArrayLike,
    log_teacher: ArrayLike,
    draws: int,
    trials: int,
    *,
    generator: np.random.Generator,
) -> Verdicts:
    """Let the best judge judge, `trials` times for each parent; a tie counts as half an error."""
    pair = _one_pair(log_policy, log_teacher, draws, 0.5)
    trials = check_count("trials", trials)
    policy, teacher = np.exp(pair.log_policy), np.exp(pair.log_teacher)
    wrong, misled, variance = [], np.zeros(len(policy)), 0.0
    for parent, side in ((policy, 1.0), (teacher, -1.0)):
        tallies = generator.multinomial(draws, parent, size=trials)
        evidence = side * _evidence(pair, tallies)
        errs = np.where(evidence < 0, 1.0, np.where(evidence == 0, 0.5, 0.0))
        wrong.append(float(errs.mean()))
        variance += float(errs.var()) / trials
        misled += errs @ tallies
    total = misled.sum()
    share = misled / total if total else np.full(len(policy), np.nan)
    return Verdicts(sum(wrong) / 2, math.sqrt(variance) / 2, share)


def simulate_tilted(
    log_policy: ArrayLike,
    log_teacher: ArrayLike,
    alpha: float,
    draws: int,
    trials: int,
    *,
    generator: np.random.Generator,
) -> Verdicts:
    """The same error, with the tokens drawn from q_alpha: so even the rarest errors are seen.

    With L the sum of log-ratios of n tokens from q_alpha, the error is the mean of
    min(policy^n, teacher^n) / q_alpha^n / 2 = Z^n exp(min((1 - alpha) L, -alpha L)) / 2, which is
    never above Z^n / 2. Unbiased at every alpha in [0, 1]; at alpha* L is centred, and the least is
    wasted.

    Raises:
        ValueError: An alpha outside [0, 1], or the parents share no token.
    """
    pair = _one_pair(log_policy, log_teacher, draws, 0.5)
    trials = check_count("trials", trials)
    if not 0 <= float(alpha) <= 1:  # nan included
        raise ValueError(f"alpha is the exponent on the policy, in [0, 1]: got {alpha}.")
    if not pair.shared.any():
        raise ValueError("policy and teacher share no token: the judge never errs.")
    at = np.asarray(float(alpha))
    log_z = float(pair.log_partition(at))
    tallies = generator.multinomial(draws, np.exp(pair.log_geometric_mean(at)), size=trials)
    evidence = tallies @ pair.log_ratio
    relative = np.exp(np.minimum((1 - at) * evidence, -at * evidence))
    scale = 0.5 * math.exp(draws * log_z)
    return Verdicts(
        error=scale * float(relative.mean()),
        standard_error=scale * float(relative.std()) / math.sqrt(trials),
        misled=relative @ tallies / (draws * relative.sum()),
    )


def _one_pair(log_policy: ArrayLike, log_teacher: ArrayLike, draws: int, prior: float) -> Pair:
    pair = check_pair(log_policy, log_teacher)
    if pair.log_policy.ndim != 1:
        raise ValueError(f"one pair of rows at a time: got shape {pair.log_policy.shape}.")
    check_count("draws", draws)
    if not 0 < prior < 1:
        raise ValueError(f"the prior is a probability strictly between 0 and 1: got {prior}.")
    return pair


def _evidence(pair: Pair, tallies: ndarray) -> ndarray:
    """The log-likelihood ratio of each tally; infinite where a token belongs to one parent only."""
    evidence = tallies @ pair.log_ratio
    only_policy = np.isneginf(pair.log_teacher) & np.isfinite(pair.log_policy)
    only_teacher = np.isneginf(pair.log_policy) & np.isfinite(pair.log_teacher)
    evidence = np.where(tallies[:, only_policy].any(axis=-1), np.inf, evidence)
    return np.where(tallies[:, only_teacher].any(axis=-1), -np.inf, evidence)


def _tallies(draws: int, vocab: int) -> ndarray:
    """Every way in which `draws` tokens can fall on `vocab` outcomes, one a row."""
    slots = np.array(list(combinations(range(draws + vocab - 1), vocab - 1)), dtype=np.int64)
    slots = slots.reshape(math.comb(draws + vocab - 1, vocab - 1), vocab - 1)
    walls = np.pad(slots, ((0, 0), (1, 1)), constant_values=((0, 0), (-1, draws + vocab - 1)))
    return np.diff(walls, axis=-1) - 1
