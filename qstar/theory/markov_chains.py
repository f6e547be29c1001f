"""Two Markov chains in the limit of long sequences: alpha*, C and the two means, per token.

NumPy float64; rates in nats per token.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy import ndarray
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import logsumexp

from ..result import Balance
from ..rows import Pair, check_pair, log_geometric_mean
from ..solve import solve_kl_symmetry

EPS = np.finfo(np.float64).eps


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
        return float(np.where(weights > 0, weights * self._pair.log_ratio, 0.0).sum())

    def log_transition(self, alpha: float) -> ndarray:
        """The log transition matrix of the sequence-level mean, after Doob's transform."""
        log_root, log_vector = self._solve(alpha)
        rows = self._log_path(alpha) + log_vector[None, :] - log_vector[:, None] - log_root
        return rows - np.asarray(logsumexp(rows, axis=-1))[:, None]

    def solve(self) -> Balance[float, str, bool]:
        """alpha* and the Chernoff information per token: -min log rho.

        On partly shared supports the slope may keep one sign; the status then names the boundary.
        """
        one_support = (np.isfinite(self.log_policy) == np.isfinite(self.log_teacher)).all()
        if np.abs(self._pair.log_ratio).max() <= 4 * EPS and one_support:
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

    @cached_property
    def _pair(self) -> Pair:
        return check_pair(self.log_policy, self.log_teacher)

    def _log_path(self, alpha: float) -> ndarray:
        return self._pair.log_path(np.full(len(self.log_policy), float(alpha)))

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
