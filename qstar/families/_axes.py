"""Coordinates in which densities on the line and in the plane are easily integrated.

Power-law tails and power-law ends of a support become exponentials, to float64's reach and beyond.
"""

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from .base import REACH, SPACE, Distribution

SUNK, SUNK_VALUE = -1e100, -1e290
"""A log-density below the first is a zero by underflow, and is set to the second; outside the
support it is -inf."""


@dataclass(frozen=True, eq=False)
class Axis:
    """One coordinate cut into pieces, each with a coordinate u from zero up.

    x = anchor + width exp(direction u): direction 1 in a tail, -1 towards an end of a support; a
    power of the distance becomes an exponential of u. On pieces of direction 0 x = anchor + width u
    for u to 1. Widths are signed. A cell is (piece, start, length), where refinement begins.
    """

    anchor: ndarray
    width: ndarray
    direction: ndarray
    hulls: ndarray  # per piece, the interval that it is part of
    cells: list[tuple[int, float, float]]

    @classmethod
    def of(
        cls,
        places: Sequence[tuple[float, float]],
        ends: Sequence[float],
        first: float,
        extent: Callable[[float, float], float] | None = None,
    ) -> "Axis":
        """Cut at the landmarks and at growing distances from them, and at every end.

        `ends` are sorted, the first and the last are those of the hull of the supports (maybe
        inf); `first` is the first distance, in scales; `extent(anchor, width)` is how far to follow
        a tail, if not as far as float64 reaches.
        """
        inner = [end for end in ends if math.isfinite(end)]
        cuts = _cuts(places, inner, ends[0], ends[-1], first)
        scale = max(scale for _, scale in places)
        pieces: list[tuple[float, float, int, tuple[float, float]]] = []
        for left, right in itertools.pairwise(cuts):
            at = [(end, sign) for end, sign in ((left, 1), (right, -1)) if end in inner]
            width = right / 2 - left / 2 if len(at) == 2 else right - left
            pieces += [(end, sign * width, -1, (left, right)) for end, sign in at]
            pieces += [(left, width, 0, (left, right))] if not at else []
        for end, cut, sign in ((ends[0], cuts[0], -1), (ends[-1], cuts[-1], 1)):
            if math.isinf(end):
                hull = (min(cut, end), max(cut, end))
                pieces += [(cut, sign * scale, direction, hull) for direction in (0, 1)]
        cells: list[tuple[int, float, float]] = []
        for index, (anchor, width, direction, _) in enumerate(pieces):
            # As far as float64 reaches: to 1e300 in a tail, to 1e-300 at an end.
            last = max(REACH - direction * math.log(abs(width)), 1.0) if direction else 1.0
            if extent is not None and direction:
                last = min(last, extent(anchor, width))
            starts = [u for u in (0.0, *2.0 ** np.arange(1, 9)) if u < last]
            starts = starts if first < 1 else starts[::4]
            cells += [(index, u, v - u) for u, v in itertools.pairwise([*starts, last])]
        anchors, widths, directions, hulls = (np.array(part) for part in zip(*pieces, strict=True))
        return cls(anchors, widths, directions, hulls, cells)

    def at(self, piece: ndarray, u: ndarray) -> tuple[ndarray, ndarray]:
        """(offset from the anchor; its log, but on pieces of direction 0 that of the width, which
        everywhere is the log of |dx/du|)."""
        direction, width = self.direction[piece], self.width[piece]
        with np.errstate(over="ignore", under="ignore"):  # beyond float64's reach it is not used
            root = np.exp(0.5 * direction * u)
            offset = np.where(direction == 0, width * u, width * root * root)
        return offset, np.log(np.abs(width)) + direction * u

    def within(self, low: float, high: float) -> ndarray:
        """Which pieces lie between the two."""
        return (self.hulls[:, 0] >= low) & (self.hulls[:, 1] <= high)


def _cuts(
    places: Sequence[tuple[float, float]], inner: list[float], low: float, high: float, first: float
) -> list[float]:
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
    return kept


def cells_beyond(parents: Sequence[Distribution], axis: Axis) -> list[tuple[int, float, float]]:
    """Cells past float64's reach, for tails and ends so slow that a parent is not negligible
    there; each twice as long as what comes before."""
    cells = []
    for piece, last in {piece: start + length for piece, start, length in axis.cells}.items():
        known = [p for p in parents if axis.within(*p.support)[piece] and axis.direction[piece]]
        number, side = np.array([piece]), np.sign(axis.width[[piece]])
        while last < 1e300:
            _, log_distance = axis.at(number, np.array([last * (1 + 1e-12)]))
            where = axis.anchor[number], side, log_distance
            if not any(p.log_density_beyond(*where)[0] > -200 for p in known):
                break
            cells.append((piece, last, last))
            last *= 2
    return cells


def plane_axis(parents: tuple[Distribution, Distribution], i: int) -> Axis:
    """One axis of the plane, its tails followed until both densities are negligible.

    They are probed on the lines along this axis through every landmark: where density times area
    is below exp(-100) of what it is at the landmarks.
    """
    landmarks = [landmark for parent in parents for landmark in parent.landmarks]
    centres, scales = (np.array(part, dtype=float) for part in zip(*landmarks, strict=True))
    log_areas = np.log(scales).sum(axis=1)
    tops = [(checked_log_density(parent, centres) + log_areas).max() for parent in parents]
    u = np.arange(1.0, 690.0)

    def extent(anchor: float, width: float) -> float:
        line = np.repeat(centres[:, None], len(u), axis=1)
        with np.errstate(over="ignore"):
            line[..., i] = anchor + width * np.exp(u)
        seen = np.zeros(len(u), dtype=bool)
        for parent, top in zip(parents, tops, strict=True):
            log_mass = checked_log_density(parent, line) + 2 * (math.log(abs(width)) + u)
            seen |= (log_mass > top - 100).any(axis=0)
        return float(u[seen].max(initial=1.0) + 1)

    places = list(zip(centres[:, i].tolist(), scales[:, i].tolist(), strict=True))
    return Axis.of(places, [-math.inf, math.inf], 2.0, extent)


def checked_log_density(parent: Distribution, x: ndarray) -> ndarray:
    """The log-density, nowhere nan or inf, with zeros by underflow set to one value.

    Raises:
        ValueError: It is nan or inf at a point.
    """
    with np.errstate(all="ignore"):
        if parent.outcomes == SPACE:  # a mixture of many components needs room for each point
            points = x.reshape(-1, 2)
            parts = [points[i : i + 2**15] for i in range(0, len(points), 2**15)]
            found = np.concatenate([np.asarray(parent.log_density(part)) for part in parts])
            return checked(parent, found.reshape(x.shape[:-1]).astype(float), x)
        return checked(parent, np.asarray(parent.log_density(x), dtype=float), x)


def checked(parent: Distribution, values: ndarray, x: ndarray) -> ndarray:
    broken = np.isnan(values) | np.isposinf(values)
    if broken.any():
        raise ValueError(
            f"the log-density of {parent!r} must be finite or -inf: it is not at "
            f"{x[broken][0]!r}. Mend the function, or name the singular place as an end of the "
            f"support."
        )
    return np.where(values > SUNK, values, SUNK_VALUE)
