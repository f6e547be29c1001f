"""Nodes at which two densities on the line or in the plane become two rows.

Gauss-Legendre on cells that are halved until halving changes nothing, in coordinates in which
power-law tails and power-law ends of the support decay exponentially. The places and scales that a
parent names as its landmarks are resolved from the start.

Why not `scipy.integrate`: see `qstar.families.quadrature`.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from ._axes import SUNK, SUNK_VALUE, Axis, cells_beyond, checked, checked_log_density, plane_axis
from .base import LINE, REACH, Distribution

CELL_TOLERANCE = (1e-13, 1e-10)
"""A cell of the line, of the plane, is settled when halving it changes no integral by more than
this part of the whole. What is kept is the halved cell, whose error is far smaller still."""
MAX_NODES = (2**17, 2**20)
"""How many nodes a rule on the line, in the plane, may have before it gives up."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """A pair of distributions as a pair of rows, and how well the rows stand for them.

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


def quadrature_rows(
    policy: Distribution, teacher: Distribution, alphas: tuple[float, ...], divergence: bool
) -> Rows:
    """Nodes that resolve both parents, the paths at `alphas`, and their log-ratio; with
    `divergence` policy log(policy / teacher) too."""
    parents = (policy, teacher)
    if policy.outcomes == LINE:
        ends = {end for parent in parents for end in (*parent.support, *parent.gaps)}
        places = [landmark for parent in parents for landmark in parent.landmarks]
        axis = Axis.of(places, sorted(ends), 0.5)
        axis.cells.extend(cells_beyond(parents, axis))
        axes, order = [axis], 16
    else:
        axes, order = [plane_axis(parents, i) for i in range(2)], 10
    cells = np.array(list(itertools.product(*(axis.cells for axis in axes))))
    return _refine(_Rule(parents, axes, order), cells, alphas, divergence)


def drop_sunk(
    log_policy: ndarray, log_teacher: ndarray, error: float, converged: bool, reach: ndarray
) -> Rows:
    """Leave out nodes where only underflow says that a parent is zero, and nodes of no mass.

    A parent that is zero, inside its support, where the other one has mass has a hole there.
    """
    logs = [log_policy.copy(), log_teacher.copy()]
    drop = (log_policy < SUNK) & (log_teacher < SUNK)
    for mine, other in ((logs[0], log_teacher), (logs[1], log_policy)):
        sunk = (mine < SUNK) & (mine > -np.inf)
        alone = sunk & ~drop
        if np.exp(other[alone]).sum() < 1e-13:
            drop = drop | alone
        mine[sunk] = -np.inf
    keep = ~drop if not drop.all() else np.ones(len(drop), dtype=bool)
    return Rows(logs[0][keep], logs[1][keep], error, converged, reach[keep])


def log_path(log_policy: ndarray, log_teacher: ndarray, alpha: float) -> ndarray:
    """alpha log_policy + (1 - alpha) log_teacher; a parent alone at its own end."""
    if alpha in (0.0, 1.0):
        return log_policy if alpha else log_teacher
    with np.errstate(invalid="ignore"):
        return alpha * log_policy + (1 - alpha) * log_teacher


# ---- Refinement ----------------------------------------------------------------------------------


class _Rule:
    """Log(weight x density) of both parents at the Gauss nodes of cells."""

    def __init__(
        self, parents: tuple[Distribution, Distribution], axes: list[Axis], order: int
    ) -> None:
        nodes, weights = np.polynomial.legendre.leggauss(order)
        index = np.array(list(itertools.product(range(order), repeat=len(axes))))
        self.parents, self.axes = parents, axes
        self.nodes = (nodes + 1) / 2
        self.unit = self.nodes[index]
        self.log_weight = np.log(weights[index] / 2).sum(axis=-1)
        self.blind = False  # whether a density could not be followed where the other one was

    def __call__(self, cells: ndarray) -> tuple[ndarray, ndarray, ndarray]:
        """Two (cells, nodes) arrays of log weight x density, and the reach of each node."""
        u = cells[:, None, :, 1] + self.unit * cells[:, None, :, 2]  # cells, nodes, axes
        log_step = self.log_weight + np.log(cells[..., 2]).sum(axis=-1)[:, None]
        log_weight, anchors, offsets = log_step, np.empty(u.shape), np.empty(u.shape)
        reach = np.zeros((*u.shape[:2], 3))
        for i, axis in enumerate(self.axes):
            piece = np.repeat(cells[:, i, :1].astype(int), u.shape[1], axis=1)
            offsets[..., i], log_distance = axis.at(piece, u[..., i])
            anchors[..., i] = axis.anchor[piece]
            log_weight = log_weight + log_distance
            curved = axis.direction[piece] != 0
            reach[curved, 0] = 1.0 + piece[curved] + i * len(self.axes[0].anchor)
            reach[curved, 1] = u[curved, i]
        if len(self.axes) == 2:
            reach[..., 2] = np.nan
            ours, theirs = (checked_log_density(p, anchors + offsets) for p in self.parents)
            return ours + log_weight, theirs + log_weight, reach
        reach[..., 2] = log_step
        beyond = curved & (np.abs(log_distance) > REACH)
        # There u is the log-distance, and a log-density that of the log-distance.
        log_weight = np.where(beyond, log_step, log_weight)
        points = piece, anchors[..., 0], offsets[..., 0], log_distance, beyond
        ours, theirs = (self._on_line(parent, *points) for parent in self.parents)
        return ours + log_weight, theirs + log_weight, reach

    def _on_line(
        self,
        parent: Distribution,
        piece: ndarray,
        anchors: ndarray,
        offsets: ndarray,
        log_distance: ndarray,
        beyond: ndarray,
    ) -> ndarray:
        (axis,) = self.axes
        inside = axis.within(*parent.support)[piece]
        log_density = np.full(anchors.shape, -np.inf)
        here, far = inside & ~beyond, inside & beyond
        with np.errstate(all="ignore"):
            values = np.asarray(parent.log_density_at(anchors[here], offsets[here]))
        # Where x is rounded to the end itself a density may be nan or inf there. Such nodes are
        # left out; if they held mass, the check of the masses says so.
        at_end = axis.direction[piece[here]] == -1
        values = np.where(at_end & ~(values < np.inf), SUNK_VALUE, values)
        log_density[here] = checked(parent, values, anchors[here] + offsets[here])
        if far.any():
            side = np.sign(axis.width[piece[far]])
            with np.errstate(all="ignore"):
                values = parent.log_density_beyond(anchors[far], side, log_distance[far])
            self.blind |= bool(np.isnan(values).any())
            log_density[far] = np.where(values > SUNK, values, SUNK_VALUE)
        return log_density


def _refine(rule: _Rule, cells: ndarray, alphas: tuple[float, ...], divergence: bool) -> Rows:
    """Halve the cells until halving changes no integral."""
    dimension, paths = len(rule.axes), len(alphas) + 2
    share = 2**dimension
    corners = np.array(list(itertools.product((0.0, 0.5), repeat=dimension)))
    log_policy, log_teacher, _ = rule(cells)
    whole, _ = _log_moments(log_policy, log_teacher, alphas, divergence, rule.nodes)
    settled = np.full(whole.shape[1], -np.inf)
    weighted = np.arange(whole.shape[1]) >= paths
    kept: list[tuple[ndarray, ndarray, ndarray]] = []
    count, error, converged = 0, 0.0, True
    while len(cells):
        parts = np.repeat(cells[:, None], share, axis=1)
        parts[..., 1] += corners * parts[..., 2]
        parts[..., 2] /= 2
        log_policy, log_teacher, reach = rule(parts.reshape(-1, dimension, 3))
        moments, bound = _log_moments(log_policy, log_teacher, alphas, divergence, rule.nodes)
        moments, bound = (part.reshape(len(cells), share, -1) for part in (moments, bound))
        fine = _logsumexp(moments, axis=1)
        total = np.logaddexp(settled, _logsumexp(fine, axis=0))
        with np.errstate(invalid="ignore", over="ignore"):  # -inf - -inf: nothing shared
            change = np.abs(np.expm1(whole - fine))
            change = np.where(np.isneginf(whole) & np.isneginf(fine), 0.0, change)
            part = np.exp(np.where(np.isneginf(total), -np.inf, fine - total))
            off = np.where(part > 0, change * part, 0.0)
            # The log-ratio of close parents is known to its rounding only.
            noise = 0.5 * (total[np.arange(len(total)) % paths] - total)
            could = bound.max(axis=1) - total[:paths]
        noise = np.nan_to_num(1e-13 * np.exp(np.minimum(noise, 700)), posinf=1.0)
        allowed = CELL_TOLERANCE[dimension - 1] + np.where(weighted, noise, 0.0)
        # A cell whose nodes are far below the top may hide the top: judge what it could hold.
        # (Two far Gaussians whose peak is just past a cut are wrong in the seventh digit without.)
        hidden = (change[:, :paths] > 1e-2) & (could > -40)
        done = ((off <= allowed) & np.isfinite(off)).all(axis=1) & ~hidden.any(axis=1)
        done |= parts[..., 2].max(axis=(1, 2)) < 1e-13
        nodes = share * log_policy.shape[1]
        count += int(done.sum()) * nodes
        if count + (~done).sum() * nodes > MAX_NODES[dimension - 1]:
            done, converged = np.ones(len(cells), dtype=bool), False
        error += float(np.nan_to_num(off[done][:, :paths], nan=1.0, posinf=1.0).sum())
        keep = np.repeat(done, share)
        kept.append((log_policy[keep].ravel(), log_teacher[keep].ravel(), reach[keep]))
        settled = np.logaddexp(settled, _logsumexp(fine[done], axis=0))
        cells, whole = parts[~done].reshape(-1, dimension, 3), moments[~done]
        whole = whole.reshape(-1, moments.shape[-1])
    log_policy, log_teacher = (np.concatenate([part[i] for part in kept]) for i in range(2))
    reach = np.concatenate([part[2].reshape(-1, 3) for part in kept])
    return drop_sunk(log_policy, log_teacher, error, converged and not rule.blind, reach)


def _log_moments(
    log_policy: ndarray,
    log_teacher: ndarray,
    alphas: tuple[float, ...],
    divergence: bool,
    nodes: ndarray,
) -> tuple[ndarray, ndarray]:
    """Log of what each cell adds to every integral, and of what it could add at most.

    Integrals: policy, teacher and the paths; then each of them times the squared log-ratio (the
    parents only if a divergence is wanted). The bound is `_could_hold`, axis by axis.
    """
    shared = (log_policy > SUNK) & (log_teacher > SUNK)
    with np.errstate(invalid="ignore", divide="ignore"):
        log_square = np.where(shared, 2 * np.log(np.abs(log_policy - log_teacher)), -np.inf)
    moments, bounds, weighted = [], [], []
    for alpha in (1.0, 0.0, *alphas):
        path = log_path(log_policy, log_teacher, alpha)
        moments.append(_logsumexp(path, axis=1))
        bound = path.reshape(len(path), *[len(nodes)] * round(math.log(path.shape[1], len(nodes))))
        while bound.ndim > 1:
            bound = _could_hold(bound, nodes)
        bounds.append(bound)
        wanted = shared & (divergence or alpha not in (0.0, 1.0))
        with np.errstate(invalid="ignore"):
            weighted.append(_logsumexp(np.where(wanted, path + log_square, -np.inf), axis=1))
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
    between = np.minimum(from_left[..., :-1], from_right[..., 1:]).max(axis=-1)
    outer = [first, last, from_right[..., 0], from_left[..., -1], log_values.max(axis=-1)]
    return np.maximum.reduce([between, *outer])


def _logsumexp(values: ndarray, axis: int) -> ndarray:
    """Plain log-sum-exp: an empty or vanishing sum is -inf."""
    top = values.max(axis=axis, keepdims=True, initial=-np.inf)
    safe = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(values - safe).sum(axis=axis)) + np.squeeze(safe, axis)
