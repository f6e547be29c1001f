"""Sequential Monte Carlo: whole sequences drawn from Q, given two parents that read particles.

Q is the geometric mean of two distributions of whole sequences, and q~ that of a decoder, which
takes it at every position (`qstar.theory.sequences`). NumPy float64; divergences in nats.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy import ndarray
from numpy.random import Generator
from numpy.typing import ArrayLike
from scipy.special import logsumexp

from ..rows import log_geometric_mean, log_partition
from ..solve import solve_kl_symmetry
from .markov_chains import PerronPair
from .sequences import SequenceDistribution, check_parents, draw_tokens


class Pair(Protocol):
    """Two parents that read the same tokens, in many particles at once."""

    def log_rows(self) -> tuple[ndarray, ndarray]:
        """The next-token distributions of policy and teacher after what each particle has read."""
        ...

    def keep(self, rows: ndarray) -> None:
        """Let every particle become a copy of the particle that `rows` names; called between
        `log_rows` and `extend`."""
        ...

    def extend(self, tokens: ndarray) -> None:
        """Read one token in every particle."""
        ...


class TablePair:
    """Two `SequenceDistribution`s as a `Pair`."""

    def __init__(
        self, policy: SequenceDistribution, teacher: SequenceDistribution, num_particles: int
    ):
        check_parents(policy, teacher)
        self._laws = policy, teacher
        self._read = np.empty((num_particles, 0), dtype=np.int64)

    def log_rows(self) -> tuple[ndarray, ndarray]:
        ours, theirs = (law.log_rows(self._read) for law in self._laws)
        return ours, theirs

    def keep(self, rows: ndarray) -> None:
        self._read = self._read[rows]

    def extend(self, tokens: ndarray) -> None:
        self._read = np.column_stack([self._read, tokens])


class ChainPair:
    """Two Markov chains as a `Pair`, of any length, from log-probabilities of the first states."""

    def __init__(
        self,
        log_first_policy: ArrayLike,
        log_first_teacher: ArrayLike,
        transitions: PerronPair,
        num_particles: int,
    ):
        self._matrices = transitions.log_policy, transitions.log_teacher
        self._rows = [
            np.tile(np.asarray(first, dtype=float), (num_particles, 1))
            for first in (log_first_policy, log_first_teacher)
        ]

    def log_rows(self) -> tuple[ndarray, ndarray]:
        return self._rows[0], self._rows[1]

    def keep(self, rows: ndarray) -> None:
        """See `Pair`; only the last state counts, and the next one is still to be drawn."""
        self._rows = [own[rows] for own in self._rows]

    def extend(self, tokens: ndarray) -> None:
        self._rows = [matrix[tokens] for matrix in self._matrices]


@dataclass(frozen=True, slots=True, eq=False)
class Particles:
    """Weighted sequences: with their weights they stand for the sequence-level mean Q.

    Attributes:
        tokens: The sequences. Shape (particles, length).
        log_weights: Normalised log-weights; all equal where the last step resampled.
        log_policy: The policy's log-probability of each sequence.
        log_teacher: The teacher's.
        log_partitions: log Z at every prefix of every sequence, in nats. Shape (particles, length).
        alphas: The exponent at every prefix. Shape (particles, length).
        log_partition: The log of an unbiased estimate of Z_seq, in nats; -inf if every particle ran
            into a prefix after which the parents share no token.
        effective: The effective number of particles, (sum w)^2 / sum w^2, before each token.
        resampled: Whether the particles were resampled before each token.
        origin: The index of the initial particle that each sequence descends from.
    """

    tokens: ndarray
    log_weights: ndarray
    log_policy: ndarray
    log_teacher: ndarray
    log_partitions: ndarray
    alphas: ndarray
    log_partition: float
    effective: ndarray
    resampled: tuple[bool, ...]
    origin: ndarray


def smc(
    pair: Pair,
    length: int,
    *,
    alpha: float,
    num_particles: int,
    generator: Generator,
    resample_below: float = 0.5,
) -> Particles:
    """Sequential Monte Carlo for the sequence-level mean Q, proposing from the token-level one.

    The weight that a token adds is Z(y[:t]), which does not depend on the token itself: particles
    are weighted and, where the weights have become uneven, resampled *before* the token is drawn,
    so that no draw is wasted. The estimate of Z_seq is unbiased for every number of particles, and
    so is estimate times weighted average for Z_seq times the mean under Q.

    Args:
        pair: The parents, with `num_particles` particles that have read nothing yet.
        length: How many tokens to draw.
        alpha: The exponent on the policy, in [0, 1].
        num_particles: How many sequences.
        generator: The only source of randomness.
        resample_below: Resample (systematically) where fewer than this share of the particles is
            effective. 0 never does: independent draws from q~, weighted. 1 always does, unless all
            weights agree.

    Raises:
        ValueError: An argument makes no sense, or the pair's rows are not distributions.

    Source: Pitt and Shephard (1999), perfect adaptation; Naesseth et al. (2019).
    """
    return _run(pair, length, num_particles, generator, resample_below, alpha)


def sample_token_level(
    pair: Pair, length: int, *, num_particles: int, generator: Generator, alpha: float | None = None
) -> Particles:
    """Independent draws from the token-level distribution q~; weights are equal.

    Args:
        pair: As the three that follow, see `smc`.
        length: How many tokens to draw.
        num_particles: How many sequences.
        generator: The only source of randomness.
        alpha: One exponent for all positions (1 draws from the policy, 0 from the teacher, where
            their supports agree); None solves for alpha* at every position.

    Raises:
        ValueError: As `smc`; or the parents share no token at some position.
    """
    drawn = _run(pair, length, num_particles, generator, 0.0, alpha)
    if not np.isfinite(drawn.log_partitions).all():
        raise ValueError(
            "policy and teacher share no token after a prefix that was drawn: the token-level "
            "distribution does not exist there. Use `smc`, which leaves such prefixes behind."
        )
    return replace(drawn, log_weights=np.full(num_particles, -np.log(num_particles)))


def _run(
    pair: Pair,
    length: int,
    count: int,
    generator: Generator,
    resample_below: float,
    alpha: float | None,
) -> Particles:
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1]: got {alpha}.")
    if length < 1 or count < 1 or not 0 <= resample_below <= 1:
        raise ValueError(
            f"expected a length and a number of particles of at least 1, and resample_below in "
            f"[0, 1]: got {length}, {count} and {resample_below}."
        )
    tokens = np.empty((count, length), dtype=np.int64)
    log_z, alphas = np.empty((count, length)), np.empty((count, length))
    log_parents, log_w = np.zeros((2, count)), np.zeros(count)
    origin, log_total = np.arange(count), 0.0
    effective, resampled = np.empty(length), []
    for t in range(length):
        ours, theirs = pair.log_rows()
        if ours.shape[0] != count:
            raise ValueError(f"the pair holds {ours.shape[0]} particles, not {count}.")
        alphas[:, t] = solve_kl_symmetry(ours, theirs).alpha if alpha is None else alpha
        log_z[:, t] = log_partition(ours, theirs, alphas[:, t])
        log_w = log_w + log_z[:, t]
        effective[t] = _effective(log_w)
        resampled.append(bool(effective[t] < resample_below * count * (1 - 1e-9)))
        if resampled[-1] and np.isfinite(log_w).any():
            log_total += float(logsumexp(log_w) - np.log(count))
            rows = _systematic(log_w, float(generator.random()))
            pair.keep(rows)
            ours, theirs = ours[rows], theirs[rows]
            tokens, log_z, alphas = tokens[rows], log_z[rows], alphas[rows]
            log_parents, origin, log_w = log_parents[:, rows], origin[rows], np.zeros(count)
        alive = np.isfinite(log_z[:, t])
        # A particle without a shared token has weight zero for ever; any token will do.
        at = np.where(alive, alphas[:, t], 0.5)
        log_q = np.where(alive[:, None], log_geometric_mean(ours, theirs, at), ours)
        tokens[:, t] = draw_tokens(log_q, generator)
        chosen = np.arange(count), tokens[:, t]
        log_parents = log_parents + np.stack([ours[chosen], theirs[chosen]])
        pair.extend(tokens[:, t])
    with np.errstate(divide="ignore"):
        log_mass = float(logsumexp(log_w))
    dead = np.isneginf(log_mass)
    return Particles(
        tokens=tokens,
        log_weights=np.full(count, -np.log(count)) if dead else log_w - log_mass,
        log_policy=log_parents[0],
        log_teacher=log_parents[1],
        log_partitions=log_z,
        alphas=alphas,
        log_partition=-np.inf if dead else float(log_total + log_mass - np.log(count)),
        effective=effective,
        resampled=tuple(resampled),
        origin=origin,
    )


def _effective(log_w: ndarray) -> float:
    if not np.isfinite(log_w).any():
        return 0.0
    return float(np.exp(2 * logsumexp(log_w) - logsumexp(2 * log_w)))


def _systematic(log_weights: ndarray, uniform: float) -> ndarray:
    """Which particle each new one copies: a comb of equal steps over the cumulative weights."""
    count = len(log_weights)
    cumulative = np.exp(log_weights - log_weights.max()).cumsum()
    total = cumulative[-1]
    comb = np.minimum((np.arange(count) + uniform) / count * total, np.nextafter(total, 0.0))
    return np.searchsorted(cumulative, comb, side="right")
