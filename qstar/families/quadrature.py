"""Parents that share no exponential family: quadrature and summation, to near machine precision.

A quadrature rule with nodes x_i and weights w_i turns two densities into two rows w_i policy(x_i)
and w_i teacher(x_i), whose geometric mean is the rule applied to the geometric mean of the
densities. So the solver for rows (`qstar.solve_kl_symmetry`) solves densities too, with its
statuses for partly shared supports and its precision for close parents; what is left to do here is
to choose nodes, and to say how well they resolve everything that is integrated.

Nodes: Gauss-Legendre on cells that are halved until halving changes nothing, in coordinates in
which power-law tails and power-law ends of the support decay exponentially. The places and scales
that a parent names as its landmarks are resolved from the start. Every rule is checked on what is
known: both parents must have mass one.
"""

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy import ndarray
from numpy.random import Generator
from numpy.typing import ArrayLike

from .. import rows as geometric
from ..gaussian import Gaussian
from ..result import Balance
from ..solve import solve_kl_symmetry as solve_rows
from .base import INTEGERS, LINE, REACH, SPACE, Distribution
from .compounds import Affine, Density, GaussianMixture, GeometricMean, Mixture

MASS_TOLERANCE = 1e-6
"""How far the mass of a parent, found by quadrature, may be from 1 before it is refused."""
CONVERGED_MASS = 1e-10
"""How far it may be from 1 in a result that says `converged`."""
CELL_TOLERANCE = (1e-13, 1e-10)
"""A cell of the line, of the plane, is settled when halving it changes no integral by more than
this part of the whole. What is kept is the halved cell, whose error is far smaller still."""
MAX_NODES = (2**17, 2**20)
"""How many nodes a rule on the line, in the plane, may have before it gives up."""
MAX_OUTCOMES = 2**20
_SUNK = -1e100
"""A log-density below this is a zero by underflow, and is set to the value below; outside the
support it is -inf."""
_SUNK_VALUE = -1e290


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """A pair of laws as a pair of rows, and how well the rows stand for them.

    Attributes:
        log_policy: log(weight x density) at each node, summing to one. Shape (nodes,).
        log_teacher: The same for the teacher, at the same nodes. Shape (nodes,).
        error: The estimated error of the integrals, relative, before the last halving: what
            remains after it is far smaller.
        converged: Whether every cell met `CELL_TOLERANCE` and both masses were one.
        reach: Per node, the number of the tail or end of a support on which it lies (0: none), how
            far along it in logarithms of the distance, and the log of its step there (nan in the
            plane). Shape (nodes, 3).
    """

    log_policy: ndarray
    log_teacher: ndarray
    error: float
    converged: bool
    reach: ndarray


def solve_kl_symmetry(policy: Distribution, teacher: Distribution) -> Balance[float, str, bool]:
    """Find alpha* by quadrature or summation; see `qstar.families`."""
    check_comparable(policy, teacher)
    alpha, settled = 0.5, False
    for _ in range(6):
        nodes = rows(policy, teacher, (alpha,))
        found = solve_rows(nodes.log_policy, nodes.log_teacher)
        settled = found.status == "disjoint" or abs(float(found.alpha) - alpha) < 1e-6
        if settled:
            break
        alpha = float(found.alpha)
    return Balance(
        alpha=float(found.alpha),
        chernoff=float(found.chernoff),
        kl_to_policy=float(found.kl_to_policy),
        kl_to_teacher=float(found.kl_to_teacher),
        status=str(found.status),
        converged=bool(found.converged and nodes.converged and settled),
        slope=float(found.slope),
        curvature=float(found.curvature),
        passes=int(found.passes),
    )


def log_partition(policy: Distribution, teacher: Distribution, alpha: ndarray) -> ndarray:
    """log Z(alpha) by quadrature or summation; see `qstar.families`."""
    return log_partition_and_slope(policy, teacher, alpha)[0]


def log_partition_and_slope(
    policy: Distribution, teacher: Distribution, alpha: ndarray
) -> tuple[ndarray, ndarray]:
    """log Z(alpha) and its derivative, KL(q_alpha || teacher) - KL(q_alpha || policy).

    At an end where that divergence is infinite so is the slope.
    """
    check_comparable(policy, teacher)
    inner = np.unique(alpha[(alpha > 0) & (alpha < 1)])
    if len(inner) > 9:  # the path changes smoothly: what resolves these resolves the rest
        inner = np.quantile(inner, np.linspace(0, 1, 9))
    at_ends = bool(((alpha == 0) | (alpha == 1)).any())
    nodes = _converged(rows(policy, teacher, tuple(inner), divergence=at_ends), "log Z")
    slope = geometric.kl_gap(nodes.log_policy, nodes.log_teacher, alpha)
    if at_ends:
        swapped = replace(nodes, log_policy=nodes.log_teacher, log_teacher=nodes.log_policy)
        at_1 = _diverges(nodes, float(np.abs(_slope(nodes, 1.0))))
        at_0 = _diverges(swapped, float(np.abs(_slope(nodes, 0.0))))
        slope = np.where((alpha == 1) & at_1, np.inf, np.where((alpha == 0) & at_0, -np.inf, slope))
    return geometric.log_partition(nodes.log_policy, nodes.log_teacher, alpha), slope


def _slope(nodes: Rows, alpha: float) -> float:
    return float(geometric.kl_gap(nodes.log_policy, nodes.log_teacher, alpha))


def kl(p: Distribution, q: Distribution) -> float:
    """KL(p || q) by quadrature or summation; see `qstar.families`."""
    check_comparable(p, q)
    if p.outcomes != SPACE and (p.support[0] < q.support[0] or p.support[1] > q.support[1]):
        return math.inf  # however little of p is out there
    nodes = _converged(rows(p, q, (0.5,), divergence=True), "KL")
    value = float(geometric.kl(nodes.log_policy, nodes.log_teacher))
    return math.inf if _diverges(nodes, value) else value


def check_comparable(policy: Distribution, teacher: Distribution) -> None:
    """Raise a ValueError unless the two are laws of the same kind of outcome, of one or two
    dimensions."""
    if policy.outcomes != teacher.outcomes:
        raise ValueError(
            f"policy and teacher must be laws of the same kind of outcome: got {policy.outcomes} "
            f"and {teacher.outcomes}. A law of integers has no density on the line; a mixture of "
            f"the two kinds is not supported."
        )
    dimensions = [getattr(parent, "dimension", 2) for parent in (policy, teacher)]
    if policy.outcomes == SPACE and dimensions != [2, 2]:
        raise ValueError(
            f"quadrature serves parents on the line and in the plane: got dimensions {dimensions}. "
            f"Use qstar.families.montecarlo beyond two dimensions; one must match the other."
        )
    if policy.outcomes not in (LINE, INTEGERS, SPACE):
        raise ValueError(
            f"policy and teacher must be members of one family where outcomes are "
            f"{policy.outcomes}: got {policy!r} and {teacher!r}."
        )


def rows(
    policy: Distribution,
    teacher: Distribution,
    alphas: tuple[float, ...],
    *,
    divergence: bool = False,
) -> Rows:
    """Nodes that resolve both parents, the paths at `alphas`, and their log-ratio.

    Args:
        policy: The parent with exponent alpha.
        teacher: The other; of the same kind of outcome.
        alphas: Exponents strictly between 0 and 1.
        divergence: Resolve policy log(policy / teacher) too.

    Raises:
        ValueError: The mass of a parent that the caller made is further than `MASS_TOLERANCE`
            from 1.
        ArithmeticError: That of a parent which has mass 1 by construction is.
    """
    if policy.outcomes == INTEGERS:
        found = _summation(policy, teacher, alphas)
    else:
        found = _quadrature(policy, teacher, alphas, divergence)
    masses = [np.exp(row).sum() for row in (found.log_policy, found.log_teacher)]
    for name, parent, mass in zip(("policy", "teacher"), (policy, teacher), masses, strict=True):
        if not abs(mass - 1) <= MASS_TOLERANCE:
            raise _unresolved(name, parent, mass)
    close = max(abs(mass - 1) for mass in masses) <= CONVERGED_MASS
    return Rows(
        found.log_policy,
        found.log_teacher,
        found.error,
        bool(found.converged and close),
        found.reach,
    )


def _unresolved(name: str, parent: Distribution, mass: float) -> Exception:
    """What to raise where the mass of a parent came out wrong; whose fault it is only the caller
    of an unknown density can tell."""
    work, remedy = "quadrature", "use qstar.families.montecarlo.solve_kl_symmetry"
    if parent.outcomes == INTEGERS:
        work = f"summation of at most {MAX_OUTCOMES} outcomes"
    else:
        remedy = f"change x in both parents so that tails are lighter and peaks wider, or {remedy}"
    if _has_mass_one(parent):
        return ArithmeticError(
            f"the {work} could not resolve the {name} {parent!r}: its mass came out as "
            f"{mass:.9g}, where it is 1. The distribution is not at fault; to go on, {remedy}."
        )
    return ValueError(
        f"either the {name} is not normalised or the {work} did not resolve it: its mass came out "
        f"as {mass:.9g}, for {parent!r}. Normalise it; if it is, name its peaks, kinks and scales "
        f"(`Density.places`), or {remedy}."
    )


def _has_mass_one(parent: Distribution) -> bool:
    """Whether it is normalised by construction, so that no caller can have got its mass wrong."""
    parts = getattr(parent, "components", None) or [getattr(parent, "base", None)]
    if isinstance(parent, (Mixture, Affine)):
        return all(_has_mass_one(part) for part in parts)
    unknown = isinstance(parent, (Density, GeometricMean))
    return type(parent).__module__.startswith(f"{__package__}.") and not unknown


def _converged(nodes: Rows, what: str) -> Rows:
    if not nodes.converged:
        masses = [float(np.exp(row).sum()) for row in (nodes.log_policy, nodes.log_teacher)]
        raise ArithmeticError(
            f"{what} did not converge: {len(nodes.log_policy)} nodes leave a relative error of "
            f"about {nodes.error:.1e}, and masses of {masses} where 1 was expected. Name the "
            f"peaks, kinks and scales of the parents (`Density.places`)."
        )
    return nodes


def _diverges(nodes: Rows, value: float) -> bool:
    """Whether KL(policy || teacher) is infinite, judged by how its integrand leaves for a tail.

    Raises:
        ArithmeticError: The integrand decays, but too slowly to be integrated.
    """
    if not math.isfinite(value):
        return True
    shared = np.isfinite(nodes.log_policy) & np.isfinite(nodes.log_teacher)
    log_ratio = np.where(shared, nodes.log_policy, 0.0) - np.where(shared, nodes.log_teacher, 0.0)
    terms = np.exp(nodes.log_policy) * np.abs(log_ratio)
    for tail in np.unique(nodes.reach[:, 0]):
        here = nodes.reach[:, 0] == tail
        if tail == 0 or not terms[here].any():
            continue
        along, log_step = nodes.reach[here, 1], nodes.reach[here, 2]
        last = along.max()
        if np.isnan(log_step).any():  # in the plane: sums over the last two tenths of the tail
            outer = terms[here][along > 0.9 * last].sum()
            before = terms[here][(along > 0.8 * last) & (along <= 0.9 * last)].sum()
            missing, flat = outer, outer > 0.7 * before
        else:  # how the integrand decays over the outer half, and what an exponential leaves
            height = terms[here] / np.exp(log_step)
            at_last, at_half = (height[np.argmin(np.abs(along - at))] for at in (last, last / 2))
            if at_last == 0:
                continue
            with np.errstate(divide="ignore"):
                decay = float(np.log(at_half) - np.log(at_last))
            flat = decay < 0.05
            missing = at_last * last / 2 / max(decay, 0.05)
        if missing <= 1e-10 * value:
            continue
        if flat:
            return True
        raise ArithmeticError(
            f"KL did not converge: a tail beyond the reach of float64 still holds about "
            f"{missing / value:.1e} of it. Compare the parents after a transformation of x that "
            f"makes their tails lighter."
        )
    return False


# ---- Summation -----------------------------------------------------------------------------------


def _summation(policy: Distribution, teacher: Distribution, alphas: tuple[float, ...]) -> Rows:
    lows, highs = zip(policy.support, teacher.support, strict=True)
    low, high = min(lows), max(highs)
    places = [*policy.landmarks, *teacher.landmarks]
    first = max(low, math.floor(min(place - 12 * scale for place, scale in places)))
    last = min(high, math.ceil(max(place + 12 * scale for place, scale in places)))
    last = max(first, last)
    while True:
        if last - first >= MAX_OUTCOMES:
            first, last, stop = first, first + MAX_OUTCOMES, True
        else:
            stop = False
        x = np.arange(first, last + 1)
        log_policy, log_teacher = (
            np.where(
                (x >= parent.support[0]) & (x <= parent.support[1]),
                _log_density(parent, x),
                -np.inf,
            )
            for parent in (policy, teacher)
        )
        ends = [(row[0] - row.max(), row[-1] - row.max()) for row in (log_policy, log_teacher)]
        low_open = first > low and any(at_low > -50 for at_low, _ in ends)
        high_open = last < high and any(at_high > -50 for _, at_high in ends)
        if stop or not (low_open or high_open):
            break
        width = last - first + 1
        first = max(low, first - width) if low_open else first
        last = min(high, last + width) if high_open else last
    # Where a tail had to be cut, what is beyond the last outcome is about that outcome's share
    # times its distance.
    centre = places[0][0]
    beyond = 0.0
    for alpha in (0.0, *alphas, 1.0):
        path = _path(log_policy, log_teacher, alpha)
        top = path.max()
        if top > -np.inf:
            share = np.exp(path[[0, -1]] - top) * np.abs(x[[0, -1]] - centre)
            beyond += float((share * (low_open, high_open)).sum() / np.exp(path - top).sum())
    cut = np.where(x > centre, high_open, low_open)
    along = np.log1p(np.abs(x - centre))
    reach = np.stack([np.where(cut, 1.0 + (x > centre), 0.0), along, -along], axis=1)
    return _drop_sunk(log_policy, log_teacher, beyond, beyond < 1e-10, reach)


def _log_density(parent: Distribution, x: ndarray) -> ndarray:
    with np.errstate(all="ignore"):
        if parent.outcomes == SPACE:  # a mixture of many components needs room for each point
            points = x.reshape(-1, 2)
            parts = [points[i : i + 2**15] for i in range(0, len(points), 2**15)]
            found = np.concatenate([np.asarray(parent.log_density(part)) for part in parts])
            values = found.reshape(x.shape[:-1]).astype(float)
        else:
            values = np.asarray(parent.log_density(x), dtype=float)
    return _checked(parent, values, x)


def _checked(parent: Distribution, values: ndarray, x: ndarray) -> ndarray:
    if np.isnan(values).any() or np.isposinf(values).any():
        where = x[np.isnan(values) | np.isposinf(values)][0]
        raise ValueError(
            f"the log-density of {parent!r} must be finite or -inf: it is not at {where!r}. Mend "
            f"the function, or name the singular place as an end of the support."
        )
    return _sink(values)


def _sink(values: ndarray) -> ndarray:
    return np.where(values > _SUNK, values, _SUNK_VALUE)


def _path(log_policy: ndarray, log_teacher: ndarray, alpha: float) -> ndarray:
    """alpha log_policy + (1 - alpha) log_teacher; a parent alone at its own end."""
    if alpha in (0.0, 1.0):
        return log_policy if alpha else log_teacher
    with np.errstate(invalid="ignore"):
        return alpha * log_policy + (1 - alpha) * log_teacher


# ---- Quadrature ----------------------------------------------------------------------------------

_LINEAR, _TAIL, _END = 0, 1, 2


@dataclass(frozen=True, eq=False)
class _Axis:
    """One coordinate cut into pieces, each with a coordinate u of its own.

    x = anchor + width u on linear pieces (u from 0 to 1), anchor + width expm1(u) on tails, and
    anchor + width exp(-u) at the ends of a support, where a power of the distance becomes an
    exponential. Widths are signed.
    """

    kind: ndarray
    anchor: ndarray
    width: ndarray
    cells: list[tuple[int, float, float]]  # piece, start, length: where refinement begins
    hulls: list[tuple[float, float]]  # per piece, the interval that it is part of

    @classmethod
    def of(
        cls,
        places: list[tuple[float, float]],
        ends: list[float],
        first: float,
        extent: Callable[[float, float], float] | None = None,
    ) -> "_Axis":
        """Cut at the landmarks and at growing distances from them, and at every end.

        `ends` holds all finite ends and, first and last, the hull of the supports (maybe inf);
        `first` is the first distance, in scales; `extent(anchor, width)` is how far to follow a
        tail, if not as far as float64 reaches.
        """
        low, high = ends[0], ends[-1]
        inner = sorted({end for end in ends if math.isfinite(end)})
        points = {place for place, _ in places} | set(inner)
        span = max(points) - min(points)
        wanted = {(0.0, end) for end in inner}  # (how closely to look there, where)
        # On the line every named place is cut at, as it may be a kink or a jump.
        exact = 1e-9 if first < 1 and len(places) <= 500 else 1.0
        for place, scale in places:
            step = first * scale
            wanted.add((exact * step, place))
            while True:
                wanted |= {(step, place - step), (step, place + step)}
                if step > span + 8 * scale:
                    break
                step *= 4
        # The finest first; a cut that an earlier one is near enough to is left out.
        kept: list[float] = []
        for step, cut in sorted(wanted):
            at = bisect.bisect(kept, cut)
            near = min((abs(cut - other) for other in kept[max(at - 1, 0) : at + 1]), default=1e300)
            if low <= cut <= high and (step == 0 or near > 0.3 * step):
                kept.insert(at, cut)
        pieces: list[tuple[int, float, float]] = []
        hulls: list[tuple[float, float]] = []
        scale = max(scale for _, scale in places)
        if math.isinf(low):
            pieces.append((_TAIL, kept[0], -scale))
            hulls.append((low, kept[0]))
        for left, right in itertools.pairwise(kept):
            hulls += [(left, right)] * (2 if left in inner and right in inner else 1)
            if left in inner and right in inner:
                half = right / 2 - left / 2
                pieces += [(_END, left, half), (_END, right, -half)]
            elif left in inner:
                pieces.append((_END, left, right - left))
            elif right in inner:
                pieces.append((_END, right, left - right))
            else:
                pieces.append((_LINEAR, left, right - left))
        if math.isinf(high):
            pieces.append((_TAIL, kept[-1], scale))
            hulls.append((kept[-1], high))
        cells: list[tuple[int, float, float]] = []
        for index, (kind, anchor, width) in enumerate(pieces):
            if kind == _LINEAR:
                cells.append((index, 0.0, 1.0))
                continue
            # As far as float64 reaches: to 1e300 in a tail, to 1e-300 at an end.
            log_width = math.log(abs(width))
            last = max(REACH - log_width if kind == _TAIL else REACH + log_width, 1.0)
            if extent is not None:
                last = min(last, extent(anchor, width))
            starts = [u for u in (0.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0) if u < last]
            starts = starts if first < 1 else starts[::4]
            cells += [(index, u, v - u) for u, v in itertools.pairwise([*starts, last])]
        kinds, anchors, widths = (np.array(column) for column in zip(*pieces, strict=True))
        return cls(kinds, anchors, widths, cells, hulls)

    def at(self, piece: ndarray, u: ndarray) -> tuple[ndarray, ndarray]:
        """(offset from the anchor, log of |dx/du|)."""
        kind, width = self.kind[piece], self.width[piece]
        grown = np.where(kind == _TAIL, u, 0.0)
        shrunk = np.where(kind == _END, -u, 0.0)
        log_jacobian = np.log(np.abs(width)) + grown + shrunk
        unit = np.where(kind == _LINEAR, u, np.exp(shrunk))
        with np.errstate(over="ignore"):  # what is beyond float64's reach is not used
            offset = width * np.where(kind == _TAIL, np.expm1(np.minimum(grown, 600.0)), unit)
        far = np.sign(width) * np.exp(np.minimum(log_jacobian, 700.0))
        return np.where(grown > 600, far, offset), log_jacobian

    def log_distance(self, piece: ndarray, u: ndarray) -> ndarray:
        """Log of the distance from the anchor; zero on linear pieces."""
        kind, log_width = self.kind[piece], np.log(np.abs(self.width[piece]))
        with np.errstate(divide="ignore"):
            grown = u + np.log1p(-np.exp(-np.where(kind == _TAIL, u, 1.0)))
        along = np.where(kind == _TAIL, grown, -u)
        return np.where(kind == _LINEAR, 0.0, log_width + along)

    def within(self, low: float, high: float) -> ndarray:
        """Which pieces lie between the two."""
        return np.array([left >= low and right <= high for left, right in self.hulls])


@dataclass(frozen=True, eq=False)
class _Cells:
    """Boxes in the coordinates u: per axis the piece, the start and the length."""

    piece: ndarray
    start: ndarray
    length: ndarray

    def __len__(self) -> int:
        return len(self.piece)

    def rows(self, keep: ndarray) -> "_Cells":
        return _Cells(self.piece[keep], self.start[keep], self.length[keep])

    def halves(self) -> "_Cells":
        """Every cell cut in two along each axis, the parts of a cell together."""
        dimension = self.piece.shape[1]
        corners = np.array(list(itertools.product((0.0, 0.5), repeat=dimension)))
        start = self.start[:, None] + corners * self.length[:, None]
        parts = len(corners)
        return _Cells(
            np.repeat(self.piece, parts, axis=0),
            start.reshape(-1, dimension),
            np.repeat(self.length / 2, parts, axis=0),
        )


def _quadrature(
    policy: Distribution, teacher: Distribution, alphas: tuple[float, ...], divergence: bool
) -> Rows:
    parents = (policy, teacher)
    if policy.outcomes == LINE:
        order = 16
        lows, highs = zip(policy.support, teacher.support, strict=True)
        ends = {end for parent in parents for end in (*parent.support, *parent.gaps)}
        inner = sorted(end for end in ends if math.isfinite(end))
        hull = [min(lows), *inner, max(highs)]
        places = [landmark for parent in parents for landmark in parent.landmarks]
        axis = _Axis.of(places, hull, 0.5)
        axes = [replace(axis, cells=[*axis.cells, *_beyond(parents, axis)])]
    else:
        order = 10
        axes = [_plane_axis(parents, i) for i in range(2)]
    boxes = list(itertools.product(*(axis.cells for axis in axes)))
    table = np.array(boxes, dtype=float)  # cell, axis, (piece, start, length)
    cells = _Cells(table[..., 0].astype(int), table[..., 1], table[..., 2])
    rule = _Rule(parents, axes, order)
    return _refine(rule, cells, alphas, divergence)


def _beyond(parents: Sequence[Distribution], axis: _Axis) -> list[tuple[int, float, float]]:
    """Cells past float64's reach, for tails and ends so slow that a parent is not negligible
    there; each twice as long as what comes before."""
    cells = []
    reached = {piece: start + length for piece, start, length in axis.cells}
    for piece, last in reached.items():
        if axis.kind[piece] == _LINEAR:
            continue
        known = [p for p in parents if axis.within(*p.support)[piece]]
        u, number = np.array([last * (1 + 1e-12)]), np.array([piece])
        while u[0] < 1e300:
            log_distance = axis.log_distance(number, u)
            side = np.sign(axis.width[number])
            seen = [p.log_density_beyond(axis.anchor[number], side, log_distance) for p in known]
            if not any(values[0] > -200 for values in seen):
                break
            cells.append((piece, last, last))
            last *= 2
            u = np.array([last])
    return cells


def _plane_axis(parents: tuple[Distribution, Distribution], i: int) -> _Axis:
    """One axis of the plane, its tails followed until both densities are negligible.

    They are probed on the lines along this axis through every landmark: where density times area
    is below exp(-100) of what it is at the landmarks.
    """
    landmarks = [landmark for parent in parents for landmark in parent.landmarks]
    centres = np.array([place for place, _ in landmarks], dtype=float)
    scales = np.array([scale for _, scale in landmarks], dtype=float)
    tops = [
        (_log_density(parent, centres) + np.log(scales).sum(axis=1)).max() for parent in parents
    ]
    u = np.arange(1.0, 690.0)

    def extent(anchor: float, width: float) -> float:
        with np.errstate(over="ignore"):
            along = anchor + width * np.expm1(u)
        line = np.repeat(centres[:, None], len(u), axis=1)
        line[..., i] = along
        seen = np.zeros(len(u), dtype=bool)
        for parent, top in zip(parents, tops, strict=True):
            log_area = 2 * (math.log(abs(width)) + u)
            seen |= (_log_density(parent, line) + log_area > top - 100).any(axis=0)
        return float(u[seen].max(initial=1.0) + 1)

    places = [(float(c[i]), float(s[i])) for c, s in zip(centres, scales, strict=True)]
    return _Axis.of(places, [-math.inf, math.inf], 2.0, extent)


class _Rule:
    """Log(weight x density) of both parents at the Gauss nodes of cells."""

    def __init__(
        self, parents: tuple[Distribution, Distribution], axes: list[_Axis], order: int
    ) -> None:
        nodes, weights = np.polynomial.legendre.leggauss(order)
        dimension = len(axes)
        grid = itertools.product(range(order), repeat=dimension)
        index = np.array(list(grid))
        self.parents, self.axes = parents, axes
        self.blind = False  # whether a density could not be followed where the other one was
        self.nodes = (nodes + 1) / 2
        self.unit = (nodes[index] + 1) / 2
        self.log_weight = np.log(weights[index] / 2).sum(axis=-1)
        self.inside = [
            axes[0].within(*parent.support)
            if dimension == 1
            else np.ones(len(axes[0].kind), dtype=bool)
            for parent in parents
        ]

    def __call__(self, cells: _Cells) -> tuple[ndarray, ndarray, ndarray]:
        """Two (cells, nodes) arrays of log weight x density, and the reach of each node."""
        u = cells.start[:, None] + self.unit * cells.length[:, None]  # cells, nodes, axes
        log_weight = self.log_weight + np.log(cells.length).sum(axis=-1)[:, None]
        offsets, anchors = [], []
        reach = np.zeros((*u.shape[:2], 3))
        reach[..., 2] = np.nan
        for i, axis in enumerate(self.axes):
            piece = np.repeat(cells.piece[:, i, None], u.shape[1], axis=1)
            offset, log_jacobian = axis.at(piece, u[..., i])
            log_weight = log_weight + log_jacobian
            offsets.append(offset)
            anchors.append(axis.anchor[piece])
            curved = axis.kind[piece] != _LINEAR
            number = 1.0 + piece + i * len(self.axes[0].kind)
            reach[..., 0] = np.where(curved, number, reach[..., 0])
            reach[..., 1] = np.where(curved, u[..., i], reach[..., 1])
        if len(self.axes) == 1:
            reach[..., 2] = self.log_weight + np.log(cells.length)
            log_distance = self.axes[0].log_distance(piece, u[..., 0])
            # Beyond float64's reach u is the log-distance, and a log-density that of the
            # log-distance: the Jacobian is one.
            log_weight = np.where(np.abs(log_distance) > REACH, reach[..., 2], log_weight)
        rows = []
        for parent, inside in zip(self.parents, self.inside, strict=True):
            if len(self.axes) == 1:
                log_density = self._on_line(
                    parent, inside[piece], piece, anchors[0], offsets[0], log_distance
                )
            else:
                points = np.stack([a + o for a, o in zip(anchors, offsets, strict=True)], axis=-1)
                log_density = _log_density(parent, points)
            rows.append(log_density + log_weight)
        return rows[0], rows[1], reach

    def _on_line(
        self,
        parent: Distribution,
        inside: ndarray,
        piece: ndarray,
        anchors: ndarray,
        offsets: ndarray,
        log_distance: ndarray,
    ) -> ndarray:
        log_density = np.full(anchors.shape, -np.inf)
        beyond = np.abs(log_distance) > REACH
        here = inside & ~beyond
        if here.any():
            with np.errstate(all="ignore"):
                values = np.asarray(parent.log_density_at(anchors[here], offsets[here]))
            # Where x is rounded to the end itself a density may be nan or inf there. Such nodes
            # are left out; if they held mass, the check of the masses says so.
            at_end = self.axes[0].kind[piece[here]] == _END
            values = np.where(at_end & ~(values < np.inf), _SUNK_VALUE, values)
            log_density[here] = _checked(parent, values, anchors[here] + offsets[here])
        here = inside & beyond
        if here.any():
            side = np.sign(self.axes[0].width[piece[here]])
            with np.errstate(all="ignore"):
                values = parent.log_density_beyond(anchors[here], side, log_distance[here])
            self.blind |= bool(np.isnan(values).any())
            log_density[here] = _sink(np.where(np.isnan(values), -np.inf, values))
        return log_density


def _refine(rule: _Rule, cells: _Cells, alphas: tuple[float, ...], divergence: bool) -> Rows:
    """Halve the cells until halving changes no integral."""
    log_policy, log_teacher, _ = rule(cells)
    whole, _ = _log_moments(log_policy, log_teacher, alphas, divergence, rule.nodes, len(rule.axes))
    settled = np.full(whole.shape[1], -np.inf)
    kept: list[tuple[ndarray, ndarray, ndarray]] = []
    count, error, converged = 0, 0.0, True
    paths = len(alphas) + 2
    while len(cells):
        parts = cells.halves()
        log_policy, log_teacher, reach = rule(parts)
        moments, bound = _log_moments(
            log_policy, log_teacher, alphas, divergence, rule.nodes, len(rule.axes)
        )
        share = len(parts) // len(cells)
        grouped = moments.reshape(len(cells), share, -1)
        fine = _logsumexp(grouped, axis=1)
        total = np.logaddexp(settled, _logsumexp(fine, axis=0))
        with np.errstate(invalid="ignore", over="ignore"):
            change = np.abs(np.expm1(whole - fine))
            change = np.where(np.isneginf(whole) & np.isneginf(fine), 0.0, change)
            part = np.exp(np.where(np.isneginf(total), -np.inf, fine - total))
            off = np.where(part > 0, change * part, 0.0)
        allowed = np.full(off.shape[1], CELL_TOLERANCE[len(rule.axes) - 1])
        # The log-ratio of close parents is known to its rounding only.
        with np.errstate(invalid="ignore"):  # -inf - -inf: nothing shared
            noise = 0.5 * (total[np.arange(len(allowed)) % paths] - total)
            could = bound.reshape(len(cells), share, -1).max(axis=1) - total[:paths]
        ratio_noise = 1e-13 * np.exp(np.minimum(noise, 700))
        weighted = np.arange(len(allowed)) >= paths
        allowed = np.where(weighted, allowed + np.nan_to_num(ratio_noise, posinf=1.0), allowed)
        # A cell whose nodes are far below the top may hide the top: judge what it could hold.
        hidden = (change[:, :paths] > 1e-2) & (could > -40)
        done = ((off <= allowed) & np.isfinite(off)).all(axis=1) & ~hidden.any(axis=1)
        done |= parts.length.reshape(len(cells), share, -1).max(axis=(1, 2)) < 1e-13
        count += int(done.sum()) * share * log_policy.shape[1]
        if count + (~done).sum() * share * log_policy.shape[1] > MAX_NODES[len(rule.axes) - 1]:
            done, converged = np.ones(len(cells), dtype=bool), False
        error += float(np.nan_to_num(off[done][:, :paths], nan=1.0, posinf=1.0).sum())
        per_part = np.repeat(done, share)
        kept.append((log_policy[per_part], log_teacher[per_part], reach[per_part]))
        settled = np.logaddexp(settled, _logsumexp(fine[done], axis=0))
        cells = parts.rows(~per_part)
        whole = moments[~per_part]
    log_policy, log_teacher = (
        np.concatenate([piece[i].ravel() for piece in kept]) for i in range(2)
    )
    reach = np.concatenate([piece[2].reshape(-1, 3) for piece in kept])
    return _drop_sunk(log_policy, log_teacher, error, converged and not rule.blind, reach)


def _drop_sunk(
    log_policy: ndarray, log_teacher: ndarray, error: float, converged: bool, reach: ndarray
) -> Rows:
    """Leave out nodes where only underflow says that a parent is zero, and nodes of no mass.

    A parent that is zero, inside its support, where the other one has mass has a hole there.
    """
    log_rows = [log_policy.copy(), log_teacher.copy()]
    sunk = [_is_sunk(row) for row in log_rows]
    drop = (log_rows[0] < _SUNK) & (log_rows[1] < _SUNK)
    for mine, other in ((0, 1), (1, 0)):
        alone = sunk[mine] & ~drop
        if np.exp(log_rows[other][alone]).sum() < 1e-13:
            drop |= alone
        log_rows[mine][sunk[mine]] = -np.inf
    keep = ~drop if not drop.all() else np.ones(len(drop), dtype=bool)
    return Rows(log_rows[0][keep], log_rows[1][keep], error, converged, reach[keep])


def _is_sunk(log_row: ndarray) -> ndarray:
    return (log_row < _SUNK) & (log_row > -np.inf)


def _log_moments(
    log_policy: ndarray,
    log_teacher: ndarray,
    alphas: tuple[float, ...],
    divergence: bool,
    nodes: ndarray,
    dimension: int,
) -> tuple[ndarray, ndarray]:
    """Log of what each cell adds to every integral, and of what it could add at most.

    Integrals: policy, teacher and the paths; then each of them times the squared log-ratio (the
    parents only if a divergence is wanted). The bound is `_could_hold`, axis by axis.
    """
    shared = (log_policy > _SUNK) & (log_teacher > _SUNK)
    with np.errstate(invalid="ignore", divide="ignore"):
        log_square = np.where(shared, 2 * np.log(np.abs(log_policy - log_teacher)), -np.inf)
    moments, bounds, weighted = [], [], []
    for alpha in (1.0, 0.0, *alphas):
        path = _path(log_policy, log_teacher, alpha)
        moments.append(_logsumexp(path, axis=1))
        bound = path.reshape(len(path), *(len(nodes),) * dimension)
        for _ in range(dimension):
            bound = _could_hold(bound, nodes)
        bounds.append(bound)
        wanted = divergence if alpha in (0.0, 1.0) else True
        blank = np.full(len(path), -np.inf)
        with np.errstate(invalid="ignore"):
            square = _logsumexp(np.where(shared, path + log_square, -np.inf), axis=1)
        weighted.append(square if wanted else blank)
    return np.stack([*moments, *weighted], axis=1), np.stack(bounds, axis=1)


def _could_hold(log_values: ndarray, nodes: ndarray) -> ndarray:
    """Along the last axis, the most that a concave function with these values could reach.

    Between two nodes it lies below the chords from both sides, continued.
    """
    gaps = np.diff(nodes)
    with np.errstate(invalid="ignore", over="ignore"):
        slopes = np.nan_to_num(np.diff(log_values, axis=-1) / gaps)
    first = log_values[..., 0] + np.maximum(-slopes[..., 0], 0) * nodes[0]
    last = log_values[..., -1] + np.maximum(slopes[..., -1], 0) * (1 - nodes[-1])
    from_left = log_values[..., 1:-1] + np.maximum(slopes[..., :-1], 0) * gaps[1:]
    from_right = log_values[..., 1:-1] + np.maximum(-slopes[..., 1:], 0) * gaps[:-1]
    between = np.minimum(from_left[..., :-1], from_right[..., 1:])
    outer = np.maximum(from_right[..., 0], from_left[..., -1])
    largest = np.maximum(log_values.max(axis=-1), np.maximum(first, last))
    return np.maximum(largest, np.maximum(outer, between.max(axis=-1)))


def _logsumexp(values: ndarray, axis: int) -> ndarray:
    """Plain log-sum-exp: an empty or vanishing sum is -inf."""
    if values.shape[axis] == 0:
        return np.full(np.delete(values.shape, axis), -np.inf)
    top = values.max(axis=axis, keepdims=True)
    safe = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(values - safe).sum(axis=axis)) + np.squeeze(safe, axis)
