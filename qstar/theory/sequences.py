"""Whole sequences: the geometric mean of two distributions of them, and the one token by token.

Two distributions of sequences y of `length` tokens have two natural geometric means at an exponent
alpha. The sequence-level one, Q, is the geometric mean of the joint distributions. The token-level
one, q~, takes the geometric mean of the next-token distributions at every prefix, as a decoder
does. With Z(prefix) the partition function of the two next-token distributions,

    Q(y) / q~(y) = prod_t Z(y[:t]) / Z_seq,        Z_seq = E_q~ prod_t Z(Y[:t]).

`SequenceDistribution` holds a distribution as tables and makes all of this exact (it can be a
parent for `qstar.families.montecarlo`); `qstar.theory.markov_chains` has the limit of long chains;
`qstar.theory.particles` draws from Q. NumPy float64; divergences in nats.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy import ndarray
from numpy.random import Generator
from numpy.typing import ArrayLike
from scipy.special import logsumexp

from ..arguments import check_alphas
from ..result import Balance
from ..rows import check_pair, log_geometric_mean, log_partition
from ..solve import solve_kl_symmetry

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
            new = draw_tokens(self.log_rows(tokens), generator)
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
    check_parents(policy, teacher)
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
    check_parents(policy, teacher)
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


def check_parents(policy: SequenceDistribution, teacher: SequenceDistribution) -> None:
    """Raise a ValueError unless both are distributions of the same sequences."""
    ours, theirs = (policy.length, policy.vocab), (teacher.length, teacher.vocab)
    if ours != theirs:
        raise ValueError(
            f"policy and teacher must be distributions of the same sequences: got (length, "
            f"vocabulary) {ours} and {theirs}."
        )


def draw_tokens(log_rows: ndarray, generator: Generator) -> ndarray:
    """One token from each row of log-probabilities.

    It is the first whose cumulative probability exceeds the row's uniform number.
    """
    cumulative = np.exp(log_rows).cumsum(axis=-1)
    total = cumulative[:, -1]
    at = np.minimum(generator.random(len(log_rows)) * total, np.nextafter(total, 0.0))
    return (cumulative <= at[:, None]).sum(axis=-1)
