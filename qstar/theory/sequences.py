"""Whole sequences: the geometric mean of two distributions of them, and the one token by token.

Two distributions of sequences y of `length` tokens have two natural geometric means at an exponent
alpha. The sequence-level one, Q, is the geometric mean of the joint distributions. The token-level
one, q~, takes the geometric mean of the next-token distributions at every prefix, as a decoder
does. With Z(prefix) the partition function of the two next-token distributions,

    Q(y) / q~(y) = prod_t Z(y[:t]) / Z_seq,        Z_seq = E_q~ prod_t Z(Y[:t]).

`SequenceDistribution` holds a distribution as tables and makes all of this exact (it can be a
parent for `qstar.families.montecarlo`); `PerronPair` is the limit of long Markov chains; `smc`
draws from Q, given two parents that read particles. NumPy float64; divergences in nats.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy import ndarray
from numpy.random import Generator
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import logsumexp

from ..arguments import check_alphas
from ..result import Balance
from ..rows import check_pair, log_geometric_mean, log_partition
from ..solve import solve_kl_symmetry

EPS = np.finfo(np.float64).eps

# --- Distributions as tables ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SequenceDistribution:
    """Sequences of fixed length over a small vocabulary, by their next-token distributions.

    Attributes:
        log_next: Entry t has shape (vocab,) * (t + 1): the log-probabilities of token t, on the
            last axis, after every prefix of t tokens. float64, normalised. Shape (*prefix, vocab).

    Raises:
        ValueError: A shape is another, or a row is not normalised.
    """

    log_next: tuple[ndarray, ...]

    def __post_init__(self) -> None:
        tables = [np.asarray(table) for table in self.log_next]
        vocab = tables[0].shape[-1] if tables and tables[0].ndim else 0
        for t, table in enumerate(tables):
            if table.shape != (vocab,) * (t + 1) or vocab == 0:
                raise ValueError(
                    f"log_next must hold, for token t, one row of log-probabilities after every "
                    f"prefix of t tokens: expected shape {(vocab,) * (t + 1)} at t = {t}, got "
                    f"{table.shape}."
                )
        if not tables:
            raise ValueError("log_next needs the distribution of at least one token: got none.")
        checked = tuple(check_pair(table, table).log_policy for table in tables)
        object.__setattr__(self, "log_next", checked)

    @property
    def length(self) -> int:
        """How many tokens a sequence has."""
        return len(self.log_next)

    @property
    def vocab(self) -> int:
        """How many tokens there are to choose from."""
        return self.log_next[0].shape[-1]

    @cached_property
    def log_joint(self) -> ndarray:
        """The log-probability of every sequence, one axis a token."""
        joint = self.log_next[0]
        for table in self.log_next[1:]:
            joint = joint[..., None] + table
        return joint

    def log_rows(self, prefixes: ndarray) -> ndarray:
        """The distribution of the next token after each prefix."""
        rows = self.log_next[prefixes.shape[1]][tuple(prefixes.T)]
        return np.broadcast_to(rows, (len(prefixes), self.vocab))

    def log_density(self, x: ndarray) -> ndarray:
        """The log-probability of each sequence."""
        return self.log_joint[tuple(np.asarray(x).T)]

    def sample(self, count: int, *, generator: Generator) -> ndarray:
        """Independent sequences, one a row."""
        tokens = np.empty((count, 0), dtype=np.int64)
        for _ in range(self.length):
            new = _draw(self.log_rows(tokens), generator)
            tokens = np.column_stack([tokens, new])
        return tokens


def markov_chain(
    log_first: ArrayLike, log_transition: ArrayLike, length: int
) -> SequenceDistribution:
    """The distribution of the first `length` states of a Markov chain.

    Args:
        log_first: Log-probabilities of the first state. Shape (vocab,).
        log_transition: Row i holds those of the state after state i. Shape (vocab, vocab).
        length: How many states, the first one included.

    Raises:
        ValueError: The shapes do not fit, or a row is not normalised.
    """
    first, rows = np.asarray(log_first, dtype=float), np.asarray(log_transition, dtype=float)
    if length < 1 or rows.shape != (len(first), len(first)):
        raise ValueError(
            f"a chain needs length >= 1 and a square transition matrix for its {len(first)} "
            f"states: got length {length} and shape {rows.shape}."
        )
    tables = [first]
    for t in range(1, length):
        tables.append(np.broadcast_to(rows, (len(first),) * (t + 1)))
    return SequenceDistribution(tuple(tables))


def from_joint(log_joint: ArrayLike) -> SequenceDistribution:
    """The distribution with these log-probabilities; impossible prefixes go on evenly.

    Raises:
        ValueError: The axes differ in length, or the probabilities do not sum to one.
    """
    joint = np.asarray(log_joint, dtype=float)
    tables: list[ndarray] = []
    while joint.ndim:
        with np.errstate(divide="ignore", invalid="ignore"):  # a prefix of no mass
            total = np.asarray(logsumexp(joint, axis=-1))
            table = joint - total[..., None]
        tables.append(np.where(np.isneginf(total)[..., None], -np.log(joint.shape[-1]), table))
        joint = total
    if not abs(float(joint)) <= 1e-6:
        raise ValueError(
            f"log_joint must be normalised: its probabilities sum to {np.exp(float(joint)):.6g}."
        )
    return SequenceDistribution(tuple(reversed(tables)))


# --- The two means -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class TokenLevel:
    """The distribution q~ of a decoder that takes the geometric mean at every position, exactly.

    Attributes:
        distribution: q~.
        alpha: The exponent at each prefix; entry t has shape (vocab,) * t. Shape (*prefix).
        log_partition: log Z at each prefix, in nats; minus the Chernoff information where alpha is
            alpha*. The same shapes. Shape (*prefix).
    """

    distribution: SequenceDistribution
    alpha: tuple[ndarray, ...]
    log_partition: tuple[ndarray, ...]

    @property
    def log_correction(self) -> ndarray:
        """sum_t log Z(y[:t]) of every sequence: log Q - log q~ up to the constant log Z_seq."""
        total = np.zeros(())
        for table in self.log_partition:
            total = (total + table)[..., None]
        return np.broadcast_to(total, self.distribution.log_joint.shape)

    @property
    def expected_sum(self) -> float:
        """E_q~ of -sum_t log Z(Y[:t]), in nats. With per-position alpha*: KL from q~ to either
        parent."""
        q = np.exp(self.distribution.log_joint)
        return float(-np.where(q > 0, q * self.log_correction, 0.0).sum())


def token_level(
    policy: SequenceDistribution, teacher: SequenceDistribution, alpha: float | None = None
) -> TokenLevel:
    """The distribution of decoding token by token.

    Args:
        policy: One parent.
        teacher: The other, over the same sequences.
        alpha: One exponent for all positions; None solves for alpha* at every prefix.

    Raises:
        ValueError: The parents are of different shapes, alpha leaves [0, 1], or the parents share
            no token after some prefix, so that the decoder would be stuck there.
    """
    _check_parents(policy, teacher)
    if alpha is not None:
        check_alphas(alpha, allow_nan=False)
    laws, alphas, partitions = [], [], []
    for t, (ours, theirs) in enumerate(zip(policy.log_next, teacher.log_next, strict=True)):
        if alpha is None:
            at = np.asarray(solve_kl_symmetry(ours, theirs).alpha)
        else:
            at = np.full(ours.shape[:-1], float(alpha))
        log_z = np.asarray(log_partition(ours, theirs, at))
        stuck = ~np.isfinite(log_z)
        if stuck.any():
            prefix = tuple(int(i) for i in np.argwhere(stuck)[0])
            raise ValueError(
                f"policy and teacher share no token after the prefix {prefix} (token {t}): the "
                f"token-level distribution does not exist there. The sequence-level one may."
            )
        laws.append(log_geometric_mean(ours, theirs, at))
        alphas.append(at)
        partitions.append(log_z)
    return TokenLevel(SequenceDistribution(tuple(laws)), tuple(alphas), tuple(partitions))


@dataclass(frozen=True, slots=True, eq=False)
class SequenceLevel:
    """The geometric mean Q of two distributions of whole sequences, exactly.

    Attributes:
        distribution: Q, by its next-token distributions.
        alpha: The exponent.
        log_partition: log Z_seq, in nats; minus the Chernoff information of the two joint
            distributions where alpha is alpha*.
        balance: alpha*, the Chernoff information and the divergences of the joint distributions.
    """

    distribution: SequenceDistribution
    alpha: float
    log_partition: float
    balance: Balance[ndarray, ndarray, ndarray]


def sequence_level(
    policy: SequenceDistribution, teacher: SequenceDistribution, alpha: float | None = None
) -> SequenceLevel:
    """The geometric mean of the two joint distributions, by enumeration of all sequences.

    `alpha` None solves for alpha* of the joint distributions.

    Raises:
        ValueError: The parents are of different shapes, share no sequence, or alpha leaves [0, 1].
    """
    _check_parents(policy, teacher)
    ours, theirs = policy.log_joint.ravel(), teacher.log_joint.ravel()
    balance = solve_kl_symmetry(ours, theirs)
    if balance.status == "disjoint":
        raise ValueError("policy and teacher share no sequence: no geometric mean exists.")
    at = float(balance.alpha if alpha is None else check_alphas(alpha, allow_nan=False))
    joint = log_geometric_mean(ours, theirs, at).reshape(policy.log_joint.shape)
    return SequenceLevel(from_joint(joint), at, float(log_partition(ours, theirs, at)), balance)


def look_ahead(token: TokenLevel) -> tuple[ndarray, ...]:
    """log E_q~[prod_(s>t) Z(Y[:s]) | y[:t+1]] after every token: what q~ does not look at.

    The next-token distribution of Q is that of q~ times the exp of this, normalised: it is the
    twist that turns one into the other.
    """
    tables = [np.zeros(token.distribution.log_joint.shape)]
    for t in range(token.distribution.length - 1, 0, -1):
        ahead = logsumexp(token.distribution.log_next[t] + tables[-1], axis=-1)
        tables.append(np.asarray(token.log_partition[t] + ahead))
    return tuple(reversed(tables))


def _check_parents(policy: SequenceDistribution, teacher: SequenceDistribution) -> None:
    ours, theirs = (policy.length, policy.vocab), (teacher.length, teacher.vocab)
    if ours != theirs:
        raise ValueError(
            f"policy and teacher must be distributions of the same sequences: got (length, "
            f"vocabulary) {ours} and {theirs}."
        )


# --- Markov chains in the limit ------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PerronPair:
    """Two Markov chains, per token of a long sequence.

    log Z of the first T states grows like T log rho(alpha), with rho the Perron root of the matrix
    policy^alpha teacher^(1-alpha) (entry by entry). Its right eigenvector v turns that matrix into
    the transition matrix of the sequence-level mean, M_ij v_j / (rho v_i): Doob's transform.

    Attributes:
        log_policy: The policy's log transition matrix; row i is the distribution after state i.
        log_teacher: The teacher's.

    Raises:
        ValueError: Not two square matrices of one shape with normalised rows, or the transitions
            that both allow do not connect all states (the limit would depend on the start).

    Source: Dembo and Zeitouni (1998), section 3.1; Watanabe and Hayashi (2017).
    """

    log_policy: ndarray
    log_teacher: ndarray

    def __post_init__(self) -> None:
        pair = check_pair(self.log_policy, self.log_teacher)
        size = pair.log_policy.shape
        if len(size) != 2 or size[0] != size[1]:
            raise ValueError(f"transition matrices must be square: got shape {size}.")
        reach = np.linalg.matrix_power(np.eye(len(pair.shared)) + pair.shared, len(pair.shared))
        if not (reach > 0).all():
            raise ValueError(
                "the transitions that policy and teacher both allow must connect every state with "
                "every other (an irreducible matrix): otherwise the rate depends on the start."
            )
        object.__setattr__(self, "log_policy", pair.log_policy)
        object.__setattr__(self, "log_teacher", pair.log_teacher)

    def log_partition(self, alpha: float) -> float:
        """log rho(alpha), in nats per token."""
        return self._solve(alpha)[0]

    def kl_gap(self, alpha: float) -> float:
        """The slope of `log_partition`: KL rate to the teacher minus KL rate to the policy."""
        log_chain = self.log_transition(alpha)
        weights = stationary(log_chain)[:, None] * np.exp(log_chain)
        return float(np.where(weights > 0, weights * self._log_ratio(), 0.0).sum())

    def log_transition(self, alpha: float) -> ndarray:
        """The log transition matrix of the sequence-level mean, after Doob's transform."""
        log_root, log_vector = self._solve(alpha)
        rows = self._log_path(alpha) + log_vector[None, :] - log_vector[:, None] - log_root
        return rows - np.asarray(logsumexp(rows, axis=-1))[:, None]

    def solve(self) -> Balance[float, str, bool]:
        """alpha* and the Chernoff information per token: -min log rho.

        On partly shared supports the slope may keep one sign; the status then names the boundary.
        """
        if np.abs(self._log_ratio()).max() <= 4 * EPS and not self._unshared():
            at, status, passes, converged = 0.5, "degenerate_all", 2, True
        elif self.kl_gap(0.0) >= 0:
            at, status, passes, converged = 0.0, "boundary_0", 1, True
        elif self.kl_gap(1.0) <= 0:
            at, status, passes, converged = 1.0, "boundary_1", 2, True
        else:
            at, root = brentq(self.kl_gap, 0.0, 1.0, xtol=1e-15, rtol=4 * EPS, full_output=True)
            status, passes, converged = "interior", root.function_calls + 2, root.converged
        chernoff, slope = max(-self.log_partition(at), 0.0), self.kl_gap(at)
        step = 1e-4 if 1e-4 < at < 1 - 1e-4 else 0.0
        ends = at - step, at + step
        curvature = (self.kl_gap(ends[1]) - self.kl_gap(ends[0])) / (2 * step) if step else np.nan
        return Balance(
            alpha=float(at),
            chernoff=chernoff,
            kl_to_policy=max(chernoff - (1 - at) * slope, 0.0),
            kl_to_teacher=max(chernoff + at * slope, 0.0),
            status=status,
            converged=bool(converged),
            slope=slope,
            curvature=float(curvature),
            passes=int(passes),
        )

    def token_level_rate(self) -> float:
        """KL per token from the token-level chain, alpha* solved for in every state, to either
        parent: the stationary mean of the states' Chernoff informations, in nats."""
        solved = solve_kl_symmetry(self.log_policy, self.log_teacher)
        log_chain = log_geometric_mean(self.log_policy, self.log_teacher, solved.alpha)
        return float(stationary(log_chain) @ solved.chernoff)

    def log_partition_of(
        self, log_first_policy: ArrayLike, log_first_teacher: ArrayLike, length: int, alpha: float
    ) -> float:
        """log Z_seq of the first `length` states exactly, by `length` products with a matrix, from
        the log-probabilities of either parent's first state."""
        first = check_pair(log_first_policy, log_first_teacher)
        log_row, log_path = first.log_path(np.asarray(alpha)), self._log_path(alpha)
        for _ in range(length - 1):
            log_row = np.asarray(logsumexp(log_row[:, None] + log_path, axis=0))
        return float(logsumexp(log_row))

    def _log_path(self, alpha: float) -> ndarray:
        pair = check_pair(self.log_policy, self.log_teacher)
        return pair.log_path(np.full(len(self.log_policy), float(alpha)))

    def _log_ratio(self) -> ndarray:
        return check_pair(self.log_policy, self.log_teacher).log_ratio

    def _unshared(self) -> bool:
        return bool((np.isfinite(self.log_policy) != np.isfinite(self.log_teacher)).any())

    def _solve(self, alpha: float) -> tuple[float, ndarray]:
        """log of the Perron root and of its right eigenvector."""
        values, vectors = np.linalg.eig(np.exp(self._log_path(alpha)))
        top = int(np.argmax(values.real))  # real, simple and positive by Perron and Frobenius
        return float(np.log(values[top].real)), np.log(np.abs(vectors[:, top].real))


def stationary(log_transition: ndarray) -> ndarray:
    """The stationary distribution of an irreducible chain."""
    size = len(log_transition)
    system = np.vstack([np.exp(log_transition).T - np.eye(size), np.ones(size)])
    return np.linalg.lstsq(system, np.r_[np.zeros(size), 1.0], rcond=None)[0]


# --- Drawing -------------------------------------------------------------------------------------


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
        _check_parents(policy, teacher)
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
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1]: got {alpha}.")
    return _run(pair, length, num_particles, generator, resample_below, lambda *rows: alpha)


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
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1]: got {alpha}.")
    choose: Callable[[ndarray, ndarray], Any] = (
        (lambda ours, theirs: solve_kl_symmetry(ours, theirs).alpha)
        if alpha is None
        else (lambda ours, theirs: alpha)
    )
    drawn = _run(pair, length, num_particles, generator, 0.0, choose)
    if not np.isfinite(drawn.log_partitions).all():
        raise ValueError(
            "policy and teacher share no token after a prefix that was drawn: the token-level "
            "distribution does not exist there. Use `smc`, which leaves such prefixes behind."
        )
    even = np.full(num_particles, -np.log(num_particles))
    fields = {name: getattr(drawn, name) for name in Particles.__slots__}
    return Particles(**{**fields, "log_weights": even})


def _run(
    pair: Pair,
    length: int,
    count: int,
    generator: Generator,
    resample_below: float,
    choose: Callable[[ndarray, ndarray], Any],
) -> Particles:
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
        alphas[:, t] = choose(ours, theirs)
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
        log_q = np.where(alive[:, None], _mean(ours, theirs, alphas[:, t]), ours)
        tokens[:, t] = _draw(log_q, generator)
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


def _mean(ours: ndarray, theirs: ndarray, alphas: ndarray) -> ndarray:
    at = np.where(np.isnan(alphas), 0.5, alphas)  # nan: disjoint, and not used
    return np.asarray(log_geometric_mean(ours, theirs, at))


def _effective(log_w: ndarray) -> float:
    if not np.isfinite(log_w).any():
        return 0.0
    return float(np.exp(2 * logsumexp(log_w) - logsumexp(2 * log_w)))


def _draw(log_rows: ndarray, generator: Generator) -> ndarray:
    """One token a row: the first whose cumulative probability exceeds the row's uniform."""
    cumulative = np.exp(log_rows).cumsum(axis=-1)
    total = cumulative[:, -1]
    at = np.minimum(generator.random(len(log_rows)) * total, np.nextafter(total, 0.0))
    return (cumulative <= at[:, None]).sum(axis=-1)


def _systematic(log_weights: ndarray, uniform: float) -> ndarray:
    """Which particle each new one copies: a comb of equal steps over the cumulative weights."""
    count = len(log_weights)
    cumulative = np.exp(log_weights - log_weights.max()).cumsum()
    total = cumulative[-1]
    comb = np.minimum((np.arange(count) + uniform) / count * total, np.nextafter(total, 0.0))
    return np.searchsorted(cumulative, comb, side="right")
