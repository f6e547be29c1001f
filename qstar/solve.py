"""alpha*: where the geometric mean is equally far, in KL, from both of its parents.

The reference solver: float64, to the last digits that the rows determine.
`qstar.rows_torch.solve_kl_symmetry` is the fast one, and is tested against this.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy import ndarray
from numpy.typing import ArrayLike

from .result import STATUSES, Balance
from .rows import Pair, _logsumexp, check_pair

EPS = np.finfo(np.float64).eps
MAX_PASSES = 200
NAME = np.array(STATUSES).dtype
FEW = 64
"""Outcomes up to which a single row is solved in plain floats: calls into NumPy would cost more."""
NDArrayBalance = Balance[ndarray, ndarray, ndarray]


def solve_kl_symmetry(log_policy: ArrayLike, log_teacher: ArrayLike) -> NDArrayBalance:
    """Find alpha* for each row: KL(q* || policy) = KL(q* || teacher).

    log Z is convex, and its slope at alpha is KL(q_alpha || teacher) - KL(q_alpha || policy).
    alpha* minimises log Z on [0, 1]; q* is the distribution whose larger KL divergence to the two
    parents is smallest. If the supports agree and the parents differ the minimum is interior and
    equalises the two divergences. On partly shared supports the slope may keep one sign; then q*
    sits at an end, the status says which, and the divergences are not equal.

    Args:
        log_policy: Log-probabilities, computed in float64; -inf off the support. Shape (*batch,
            vocab).
        log_teacher: The same, over the same vocabulary. Shape (*batch, vocab).

    Returns:
        A `Balance` of NumPy arrays with one entry per row; 0-d arrays for one-dimensional input.
        A row with disjoint supports never raises: its alpha is nan, its divergences are inf.
        q* itself is `log_geometric_mean(log_policy, log_teacher, balance.alpha)`.

    Raises:
        ValueError: Shapes differ, or a row is not a distribution; the message says which and why.

    Source: the analysis, problem 2; Chernoff (1952); Nielsen (2013),
        doi:10.1109/LSP.2013.2243726.
    """
    pair = check_pair(log_policy, log_teacher)
    *batch, vocab = pair.log_policy.shape
    if pair.log_policy.size == vocab <= FEW:
        found = _solve_row(pair)
        if found is not None:
            kinds = ((value, NAME if isinstance(value, str) else None) for value in found)
            return Balance(*(np.array(value, dtype=kind).reshape(batch) for value, kind in kinds))
    flat = Pair(*(getattr(pair, name).reshape(-1, vocab) for name in Pair.__slots__))
    status = _classify(flat)
    alpha, passes, converged = _minimise(flat, status)
    slope, curvature = flat.slope_and_curvature(alpha)
    chernoff = np.where(status == "disjoint", np.inf, -flat.log_partition(alpha))
    chernoff = np.maximum(chernoff, 0.0)  # and no -0.0
    to_policy, to_teacher = (
        np.where(status == "disjoint", np.inf, np.maximum(chernoff + share * slope, 0.0))
        for share in (alpha - 1, alpha)
    )
    divergences = chernoff, to_policy, to_teacher
    columns = alpha, *divergences, status, converged, slope, curvature, passes
    return Balance(*(values.reshape(tuple(batch)) for values in columns))


class _Row(NamedTuple):
    """One row of few outcomes: `Pair`'s formulas in plain floats, over the shared outcomes only.

    An outcome is (log policy, log teacher, log-ratio, policy - teacher, teacher).
    """

    outcomes: list[tuple[float, float, float, float, float]]
    gap_off: float  # policy - teacher, summed off the shared support
    teacher_off: float  # the teacher's mass there

    def log_path(self, alpha: float) -> tuple[list[float], float]:
        """The unnormalised log of the path, and log Z as a plain log-sum-exp."""
        path = [alpha * p + (1 - alpha) * r for p, r, *_ in self.outcomes]
        top = max(path)
        return path, top + math.log(math.fsum([math.exp(x - top) for x in path]))

    def slope(self, path: list[float], log_z: float) -> float:
        """See `Pair.slope_and_curvature`."""
        if log_z > -0.5:
            terms = [
                math.exp(x) * ratio - gap
                for x, (_, _, ratio, gap, _) in zip(path, self.outcomes, strict=True)
            ]
            return math.fsum((*terms, -self.gap_off)) / math.exp(log_z)
        return self._mean(path, log_z)

    def _mean(self, path: list[float], log_z: float) -> float:
        ratios = (outcome[2] for outcome in self.outcomes)
        return math.fsum([math.exp(x - log_z) * y for x, y in zip(path, ratios, strict=True)])

    def curvature(self, path: list[float], log_z: float) -> float:
        """See `Pair.slope_and_curvature`."""
        mean = self._mean(path, log_z)
        apart = (outcome[2] - mean for outcome in self.outcomes)
        return math.fsum([math.exp(x - log_z) * y * y for x, y in zip(path, apart, strict=True)])

    def log_partition(self, alpha: float, path: list[float], log_z: float) -> float:
        """See `qstar.log_partition`."""
        if not log_z > -0.5:
            return log_z
        gaps = [alpha * self.gap_off + self.teacher_off]
        for x, (_, _, ratio, gap, teacher) in zip(path, self.outcomes, strict=True):
            close = abs(ratio) < 1
            grown = teacher * math.expm1(alpha * ratio) if close else math.exp(x) - teacher
            gaps.append(alpha * gap - grown)
        return math.log1p(-max(math.fsum(gaps), 0.0))

    def log_odds(self, path: list[float]) -> tuple[float, float, float]:
        """See `Pair.log_odds`; there are outcomes on both sides."""
        sides = []
        for sign in (1.0, -1.0):
            pulls = [
                (x, sign * outcome[2])
                for x, outcome in zip(path, self.outcomes, strict=True)
                if sign * outcome[2] > 0
            ]
            top = max(x for x, _ in pulls)
            weights = [math.exp(x - top) * pull for x, pull in pulls]
            total = math.fsum(weights)
            mean = math.fsum([w * pull for w, (_, pull) in zip(weights, pulls, strict=True)])
            sides.append((top + math.log(total), mean / total))
        (up, mean_up), (down, mean_down) = sides
        return up - down, mean_up + mean_down, down


_Found = tuple[float, float, float, float, str, bool, float, float, int]


def _solve_row(pair: Pair) -> _Found | None:
    """The fields of a `Balance` for one row of few outcomes, by the same rules as a batch.

    None where the status hangs on rounding, or squares could overflow: the batch decides.
    """
    columns = (
        values.ravel().tolist()
        for values in (pair.log_policy, pair.log_teacher, pair.log_ratio, pair.mass_gap)
    )
    outcomes, gap_off, teacher_off, same_support = [], 0.0, 0.0, True
    for p, r, ratio, gap in zip(*columns, strict=True):
        if p > -math.inf and r > -math.inf:
            outcomes.append((p, r, ratio, gap, math.exp(r)))
        else:
            gap_off, teacher_off = gap_off + gap, teacher_off + math.exp(r)
            same_support = same_support and p == r
    if not outcomes:
        return math.nan, math.inf, math.inf, math.inf, "disjoint", False, math.nan, math.nan, 0
    row = _Row(outcomes, gap_off, teacher_off)
    size = max(abs(p) + abs(r) for p, r, *_ in outcomes)
    ratios = [outcome[2] for outcome in outcomes]
    status, alpha, passes, converged = "interior", 0.5, 0, True
    if all(abs(ratio) <= 2 * EPS * (1 + (abs(p) + abs(r))) for p, r, ratio, *_ in outcomes):
        status = "degenerate_all"
    elif not same_support:
        at_0, at_1 = (row.slope(*row.log_path(end)) for end in (0.0, 1.0))
        if not min(abs(at_0), abs(at_1)) > 16 * EPS * (1 + size):
            return None
        if at_0 > 0:
            status, alpha = "boundary_0", 0.0
        elif at_1 < 0:
            status, alpha = "boundary_1", 1.0
    if status == "interior":
        if not min(ratios) < 0 < max(ratios) or size > 1e150:
            return None
        alpha, passes, converged = _root_of_row(row)
    path, log_z = row.log_path(alpha)
    slope, curvature = row.slope(path, log_z), row.curvature(path, log_z)
    chernoff = max(-row.log_partition(alpha, path, log_z), 0.0) + 0.0  # and no -0.0
    to_policy = max(chernoff - (1 - alpha) * slope, 0.0)
    to_teacher = max(chernoff + alpha * slope, 0.0)
    return alpha, chernoff, to_policy, to_teacher, status, converged, slope, curvature, passes


def _root_of_row(row: _Row) -> tuple[float, int, bool]:
    """`_root`, for one row."""
    at, low, high, last = 0.5, 0.0, 1.0, math.inf
    for passes in range(1, MAX_PASSES + 1):
        path, log_z = row.log_path(at)
        slope = row.slope(path, log_z)
        if slope == 0:
            return at, passes, True
        log_odds, gain, log_down = row.log_odds(path)
        lift = slope * math.exp(min(log_z - log_down, 700.0))
        if abs(lift) < 0.5:
            log_odds = math.log1p(lift)
        low, high = (at, high) if slope < 0 else (low, at)
        size, step = abs(log_odds), log_odds / gain if gain > 0 else math.inf
        helps = low <= at - step <= high and size <= last / 2
        new = at - step if helps else (low + high) / 2
        if (helps and abs(step) <= 2 * EPS * at) or high - low <= 4 * EPS * high:
            return new, passes, True
        at, last = new, size
    return at, MAX_PASSES, False


def _classify(pair: Pair) -> ndarray:
    """The status of each row, from the supports and the slopes of log Z at the two ends."""
    magnitude = np.where(pair.shared, np.abs(pair.log_policy) + np.abs(pair.log_teacher), 0.0)
    # What rounding alone may leave of a log-ratio that is zero.
    noise = 2 * EPS * (1 + magnitude)
    equal = (np.abs(pair.log_ratio) <= noise).all(axis=-1)
    disjoint = ~pair.shared.any(axis=-1)
    same_support = (np.isfinite(pair.log_policy) == np.isfinite(pair.log_teacher)).all(axis=-1)
    left = right = np.zeros(len(equal), dtype=bool)
    if not same_support.all():  # else the slopes at the ends are known to differ in sign
        ends = [np.full(len(equal), end) for end in (0.0, 1.0)]
        at_0, at_1 = (pair.slope_and_curvature(end)[0] for end in ends)
        # E(|log policy| + |log teacher|) there: the scale of their rounding.
        sizes = ((np.exp(pair.log_geometric_mean(end)) * magnitude).sum(axis=-1) for end in ends)
        floor_0, floor_1 = (2 * EPS * (1 + size) for size in sizes)
        with np.errstate(invalid="ignore"):
            left = ~same_support & (at_0 >= -floor_0)
            right = ~same_support & (at_1 <= floor_1)
    return np.select(
        [disjoint, equal, left, right],
        ["disjoint", "degenerate_all", "boundary_0", "boundary_1"],
        default="interior",
    )


def _minimise(pair: Pair, status: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    """alpha* per row, the slope evaluations spent, and whether the stopping rule was met."""
    ends = {"boundary_0": 0.0, "boundary_1": 1.0, "degenerate_all": 0.5}
    alpha = np.full(len(status), np.nan)
    for name, end in ends.items():
        alpha[status == name] = end
    passes = np.zeros(len(status), dtype=int)
    converged = status != "disjoint"
    rows = np.flatnonzero(status == "interior")
    if len(rows) < len(status):
        pair = pair.rows(rows)
    if len(rows):
        alpha[rows], passes[rows], converged[rows] = _root(pair)
    return alpha, passes, converged


def _root(pair: Pair) -> tuple[ndarray, ndarray, ndarray]:
    """Where the slope of log Z is zero, from 1/2, in brackets: alpha, evaluations, success.

    Newton's method on `Pair.log_odds`, whose zero is that of the slope. A step that leaves the
    bracket, or does not halve them, is replaced by the middle of the bracket. A row stops where its
    step or its bracket is at the last digit of alpha, or the slope is zero.
    """
    count = len(pair.log_policy)
    alpha, passes = np.full(count, 0.5), np.zeros(count, dtype=int)
    converged = np.zeros(count, dtype=bool)
    live = np.arange(count)
    at, low, high, last = alpha.copy(), np.zeros(count), np.ones(count), np.full(count, np.inf)
    for _ in range(MAX_PASSES):
        slope = pair.slope_and_curvature(at)[0]
        log_odds, gain, log_down = pair.log_odds(at)
        with np.errstate(all="ignore"):
            # Near the root the slope is the more exact of the two.
            log_z = _logsumexp(pair.log_path(at))
            lift = slope * np.exp(log_z - log_down)
            log_odds = np.where(np.abs(lift) < 0.5, np.log1p(lift), log_odds)
            low, high = np.where(slope < 0, at, low), np.where(slope > 0, at, high)
            size = np.abs(log_odds)
            step = log_odds / gain
            new = at - step
            helps = (low <= new) & (new <= high) & (size <= last / 2)
            new = np.where(helps, new, (low + high) / 2)
            small = helps & (np.abs(step) <= 2 * EPS * at)
            done = (slope == 0) | small | (high - low <= 4 * EPS * high)
        alpha[live], passes[live], converged[live] = (
            np.where(slope == 0, at, new),
            passes[live] + 1,
            done,
        )
        if done.all():
            break
        at, last = new, size
        if done.any():
            keep = ~done
            live, at, last, low, high = live[keep], at[keep], last[keep], low[keep], high[keep]
            pair = pair.rows(keep)
    return alpha, passes, converged
