r"""More than two parents: the distribution that is nearest, in KL, to the farthest of them.

For K experts the minimax centre q* = argmin_q max_i KL(q || p_i) is a geometric mean
q_w proportional to prod_i p_i^{w_i}, and its weights maximise the concave

    C(w) = -log sum_x prod_i p_i(x)^{w_i} = sum_i w_i KL(q_w || p_i)

over the simplex. Every w gives a certificate, C(w) <= min max <= max_i KL(q_w || p_i); at the
optimum the two meet: KL(q* || p_i) = C where w_i > 0 and <= C elsewhere (Karush-Kuhn-Tucker). An
expert of weight zero lies inside the ball that the others span and changes nothing. Two experts
are a policy and a teacher, and C the Chernoff information. Gaussians of unit covariance make it
the smallest ball around their means, with C = radius^2 / 2.

Source: the master identity sum_i w_i KL(q || p_i) = KL(q || q_w) + C(w), for every q; Csiszar
(1975) for the geometry.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import ndarray
from numpy.typing import ArrayLike

from .. import gaussian
from .. import rows as geometric
from ..gaussian import Gaussian

EPS = float(np.finfo(np.float64).eps)
STATUSES = (
    "interior",  # every expert has a positive weight: all are equally far
    "boundary",  # some expert has weight zero; it is no farther than the others
    "degenerate_all",  # the experts agree on the shared support: all weights give one q*
    "disjoint",  # no outcome is possible to all experts: q* does not exist
)
"""Status names. A `boundary` between two experts is `boundary_0` or `boundary_1` of
`qstar.solve_kl_symmetry`."""

GAP_TOLERANCE = 1e-12
"""The duality gap, over C, at which the solver stops and says `converged`."""


@dataclass(frozen=True, slots=True, eq=False)
class Centre:
    """The minimax centre of K experts.

    Attributes:
        weights: One exponent an expert, at least zero, with sum 1; equal where every choice serves
            (`degenerate_all`); nan for `disjoint` experts. Shape (experts,).
        chernoff: C at these weights, in nats: a lower bound of the smallest radius, and up to
            `gap` that radius; inf for disjoint experts.
        kl_to_experts: KL(q* || expert), in nats. Shape (experts,).
        gap: max(kl_to_experts) - chernoff, at least zero: how far q* can be from optimal, in
            nats. A certificate, whatever the solver did. nan for disjoint experts.
        status: One of `STATUSES`.
        converged: Whether `gap` is at most `GAP_TOLERANCE` times C (or rounding); False for
            disjoint experts.
        passes: How many sets of weights were evaluated.
    """

    weights: ndarray
    chernoff: float
    kl_to_experts: ndarray
    gap: float
    status: str
    converged: bool
    passes: int


Experts = ArrayLike | Sequence[Gaussian]
"""Rows of log-probabilities, or Gaussians of one dimension."""


def solve_minimax(experts: Experts) -> Centre:
    """Find the minimax centre of K >= 2 experts.

    Args:
        experts: Rows of normalised log-probabilities over one vocabulary (-inf off the support),
            or Gaussians of one dimension. Repeated experts are allowed: only their common weight
            is determined.

    Returns:
        A `Centre`; q* itself is `geometric_mean(experts, centre.weights)`.

    Raises:
        ValueError: Fewer than two experts, rows that are no distributions, or Gaussians of
            different dimensions.
    """
    family = _family(experts)
    count = family.count
    if not family.meet:
        blank, infinite = np.full(count, np.nan), np.full(count, np.inf)
        return Centre(blank, float("inf"), infinite, float("nan"), "disjoint", False, 0)
    even = np.full(count, 1 / count)
    divergences, _ = family(even)
    radius = float(divergences.max())
    if family.agree or radius == 0:
        return Centre(even, radius, divergences, 0.0, "degenerate_all", True, 1)
    weights, divergences, passes = _maximise(family, count)
    chernoff = float(weights @ divergences)
    gap = max(float(divergences.max()) - chernoff, 0.0)
    return Centre(
        weights=weights,
        chernoff=chernoff,
        kl_to_experts=divergences,
        gap=gap,
        status="interior" if (weights > 0).all() else "boundary",
        converged=bool(gap <= GAP_TOLERANCE * chernoff + family.noise(weights, chernoff)),
        passes=passes,
    )


def log_partition(experts: Experts, weights: ArrayLike) -> float:
    """log sum_x prod_i p_i(x)^{w_i}, in nats: -C(w), convex in the weights; -inf where disjoint.

    Raises:
        ValueError: The weights are not one an expert, at least zero with sum 1 (to 1e-9);
            otherwise as `solve_minimax`.
    """
    family = _family(experts)
    w = _check_weights(weights, family.count)
    if not family.meet:
        return -float("inf")
    divergences, _ = family(w)
    return -float(w @ divergences) + 0.0


def log_geometric_mean(log_experts: ArrayLike, weights: ArrayLike) -> ndarray:
    """log q_w of rows: the normalised log of prod_i p_i^{w_i} on the shared support.

    An expert of weight zero still restricts the support: q_w is a limit of positive weights.

    Raises:
        ValueError: The experts share no outcome; otherwise as `log_partition`.
    """
    family = _Rows(log_experts)
    if not family.meet:
        raise ValueError(
            "the experts must share an outcome to have a geometric mean: each one is impossible "
            "to some expert. Mix a little of each into the others first, if that is meant."
        )
    return family.log_mean(_check_weights(weights, family.count))


def geometric_mean(experts: Sequence[Gaussian], weights: ArrayLike) -> Gaussian:
    """q_w of Gaussians, again a Gaussian: precisions, and precision-weighted means, are averaged.

    Raises:
        ValueError: As `log_partition`.
    """
    family = _Gaussians(experts)
    return family.mean(_check_weights(weights, family.count))


class _Rows:
    """Experts as rows: divergences from q_w and the covariance of the log-probabilities."""

    def __init__(self, log_experts: ArrayLike) -> None:
        rows = np.asarray(log_experts)
        if rows.ndim != 2 or len(rows) < 2:
            raise ValueError(
                f"experts must be at least two rows of log-probabilities over one vocabulary: got "
                f"shape {rows.shape}. Stack them on the first axis."
            )
        first = np.broadcast_to(rows[0], rows.shape)
        self.log_experts = geometric.check_pair(
            rows, first, names=("experts", "experts")
        ).log_policy
        self.count = len(rows)
        self.shared = np.isfinite(self.log_experts).all(axis=0)
        self.meet = bool(self.shared.any())
        values = self.log_experts[:, self.shared]
        noise = 4 * EPS * (1 + np.abs(values).max(axis=0, initial=0))
        self.agree = self.meet and bool((np.ptp(values, axis=0) <= noise).all())

    def log_mean(self, weights: ndarray) -> ndarray:
        log_q = np.full(self.log_experts.shape[1], -np.inf)
        path = weights @ self.log_experts[:, self.shared]
        top = path.max()
        log_q[self.shared] = path - top - np.log(np.exp(path - top).sum())
        return log_q

    def noise(self, weights: ndarray, chernoff: float) -> float:
        """What rounding of the log-probabilities leaves of a divergence between close experts."""
        log_q = self.log_mean(weights)[self.shared]
        magnitude = np.abs(self.log_experts[:, self.shared]).max(axis=0)
        return float(16 * EPS * (1 + np.exp(log_q) @ magnitude) * np.sqrt(chernoff))

    def __call__(self, weights: ndarray) -> tuple[ndarray, ndarray]:
        log_q = self.log_mean(weights)
        divergences = geometric.kl(np.broadcast_to(log_q, self.log_experts.shape), self.log_experts)
        q, values = np.exp(log_q[self.shared]), self.log_experts[:, self.shared]
        # Against the geometric mean itself, so that close experts keep their small differences.
        ratios = values - log_q[self.shared]
        centred = ratios - (ratios @ q)[:, None]
        return divergences, (centred * q) @ centred.T


class _Gaussians:
    """Experts as Gaussians: the same, in closed form."""

    meet, agree = True, False

    def __init__(self, experts: Sequence[Gaussian]) -> None:
        self.experts = list(experts)
        self.count = len(self.experts)
        dimensions = sorted({expert.dimension for expert in self.experts})
        if self.count < 2 or len(dimensions) != 1:
            raise ValueError(
                f"experts must be at least two Gaussians of one dimension: got {self.count} of "
                f"dimensions {dimensions}."
            )
        self.precisions = np.stack([np.linalg.inv(expert.covariance) for expert in self.experts])
        self.means = np.stack([expert.mean for expert in self.experts])

    def noise(self, weights: ndarray, chernoff: float) -> float:
        """What rounding of the covariances leaves of a divergence between close experts."""
        return float(64 * EPS * self.means.shape[1] * np.sqrt(chernoff))

    def mean(self, weights: ndarray) -> Gaussian:
        # Means relative to one of them, so that a far origin costs no digits.
        origin = self.means[int(np.argmax(weights))]
        precision = np.einsum("i,ijk->jk", weights, self.precisions)
        shift = np.einsum("i,ijk,ik->j", weights, self.precisions, self.means - origin)
        covariance = np.linalg.inv(precision)
        return Gaussian(origin + covariance @ shift, (covariance + covariance.T) / 2)

    def __call__(self, weights: ndarray) -> tuple[ndarray, ndarray]:
        q = self.mean(weights)
        divergences = np.array([gaussian.kl(q, expert) for expert in self.experts])
        # Covariance of the log-densities, quadratic forms of a Gaussian; one common quadratic
        # form is subtracted, which changes no difference.
        common = np.linalg.inv(q.covariance)
        forms = (self.precisions - common) @ q.covariance
        slopes = np.einsum("ijk,ik->ij", self.precisions, q.mean - self.means)
        covariance = 0.5 * np.einsum("ijk,lkj->il", forms, forms)
        return divergences, covariance + slopes @ q.covariance @ slopes.T


Family = _Rows | _Gaussians


def _family(experts: Experts) -> Family:
    if not isinstance(experts, ndarray):
        members: list[Any] = list(experts)  # type: ignore[arg-type]
        if any(isinstance(member, Gaussian) for member in members):
            if all(isinstance(member, Gaussian) for member in members):
                return _Gaussians(members)
            raise ValueError("experts must all be Gaussians or all rows: got both kinds.")
    return _Rows(experts)  # type: ignore[arg-type]


def _check_weights(weights: ArrayLike, count: int) -> ndarray:
    w = np.asarray(weights, dtype=float)
    if w.shape != (count,) or not (w >= 0).all() or not abs(w.sum() - 1) <= 1e-9:
        raise ValueError(
            f"weights must be {count} numbers, one an expert, at least zero and with sum 1: got "
            f"{w}. Divide them by their sum."
        )
    return w / w.sum()


def _maximise(
    family: Callable[[ndarray], tuple[ndarray, ndarray]], count: int
) -> tuple[ndarray, ndarray, int]:
    """Weights that maximise C(w): its quadratic model is maximised on the simplex, again and again.

    A step is kept if it raises C, or if it closes the gap where C is flat to rounding.
    """
    weights = np.full(count, 1 / count)
    divergences, covariance = family(weights)
    passes = 1
    for _ in range(100):
        value, gap = float(weights @ divergences), _gap(weights, divergences)
        if gap <= 2e-16 * value:
            break
        target = _maximise_model(weights, divergences, covariance)
        # Where the gap is down to rounding a shorter step cannot help.
        for length in 0.25 ** np.arange(30 if gap > 1e-11 * value else 1):
            trial = weights + length * (target - weights)
            trial = np.where(target > 0, trial, trial if length < 1 else 0.0)
            trial /= trial.sum()
            found, curvature = family(trial)
            passes += 1
            rise = float(trial @ found) - value
            if rise > 1e-10 * value or (abs(rise) <= 1e-9 * value and _gap(trial, found) < gap):
                break
        else:
            break
        weights, divergences, covariance = trial, found, curvature
    return weights, divergences, passes


def _gap(weights: ndarray, divergences: ndarray) -> float:
    return float(divergences.max()) - float(weights @ divergences)


def _maximise_model(weights: ndarray, gradient: ndarray, curvature: ndarray) -> ndarray:
    """The y on the simplex that maximises gradient.(y - w) - (y - w) curvature (y - w) / 2.

    Active sets, as in Lawson and Hanson's non-negative least squares: finite, because every round
    raises the model and no set of positive weights comes twice. A trace of curvature is added
    where there is none, so that flat directions are followed to the edge of the simplex.
    """
    count = len(weights)
    # Where the log-ratios are constant on the shared support C is linear: no curvature at all.
    scale = max(np.trace(curvature) / count, 1e-6 * np.ptp(gradient))
    if scale <= 0:
        return weights
    matrix = curvature + 1e-13 * scale * np.eye(count)
    linear = gradient + matrix @ weights
    y, positive = weights.copy(), weights > 0
    for _ in range(20 * count):
        z, multiplier = np.zeros(count), 0.0
        size = int(positive.sum())
        system = np.zeros((size + 1, size + 1))
        system[:size, :size] = matrix[np.ix_(positive, positive)] / scale
        system[:size, size] = system[size, :size] = 1.0
        solution = np.linalg.solve(system, np.append(linear[positive] / scale, 1.0))
        z[positive], multiplier = solution[:size], solution[size] * scale
        if (z[positive] > 0).all():
            y = z
            slack = np.where(positive, -np.inf, linear - matrix @ y - multiplier)
            if slack.max() <= 1e-14 * float(np.abs(gradient).max()):
                break
            positive[int(np.argmax(slack))] = True
            continue
        falling = positive & (z <= 0)
        ratios = np.where(falling, y / np.where(falling, y - z, 1.0), np.inf)
        first = int(np.argmin(ratios))
        y = np.maximum(y + ratios[first] * (z - y), 0.0)
        y[first], positive[first] = 0.0, False
    return y
