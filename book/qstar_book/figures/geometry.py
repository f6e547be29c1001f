"""The geometry of three tokens: the simplex with the path, the bisector and the balls."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy import ndarray
from scipy.special import rel_entr

from qstar.rows import log_geometric_mean
from qstar.solve import solve_kl_symmetry

from .style import COLOURS, FILL, INK, LINES, note, star

CORNERS = np.array([[0.5, np.sqrt(0.75)], [0.0, 0.0], [1.0, 0.0]])


def simplex(
    policy: ndarray, teacher: ndarray, *, ax: Axes, names: tuple[str, str, str] = ("A", "B", "C")
) -> Axes:
    """Three tokens: the path from teacher to policy meets the bisector at q*.

    The dotted line holds the distributions that are equally far from both parents. The filled ball
    around q* is the smallest that holds both: KL(q* || .) is at most C in it. The two thin lines
    are where KL(. || policy) and KL(. || teacher) are C; they touch at q*.

    Args:
        policy: Probabilities, all positive. Shape (3,).
        teacher: The same for the teacher. Shape (3,).
        names: What the corners are called.
    """
    logs = np.log(policy), np.log(teacher)
    balance = solve_kl_symmetry(*logs)
    level = float(balance.chernoff)
    q = np.exp(log_geometric_mean(*logs, balance.alpha))
    ax.set_aspect("equal")
    ax.set_axis_off()
    ax.fill(*CORNERS.T, facecolor="none", edgecolor="#555555", linewidth=0.9)
    ball = _ball(q, level, lambda other: _divergence(q, other))
    ax.fill(*ball.T, facecolor=COLOURS["q*"], alpha=FILL, linewidth=0)
    ax.plot(*ball.T, color=COLOURS["q*"], linewidth=1, linestyle=(0, (2, 2)))
    for role, parent in (("policy", policy), ("teacher", teacher)):
        edge = _ball(parent, level, partial(_divergence, from_=parent))
        ax.plot(*edge.T, **LINES[role] | {"linewidth": 1.1})
    ratio = logs[0] - logs[1]
    crossing = []
    for i, j in ((0, 1), (1, 2), (2, 0)):
        if ratio[i] * ratio[j] < 0:
            share = ratio[i] / (ratio[i] - ratio[j])
            crossing.append((1 - share) * CORNERS[i] + share * CORNERS[j])
    bisector = LINES["guide"] | {"color": COLOURS["ink"], "linewidth": 1.4}
    ax.plot(*np.transpose(crossing), **bisector)
    right_end = max(crossing, key=lambda point: float(point[0]))
    note(ax, "equally far\nfrom both", right_end, (6, 0), clear=False, va="center")
    along = [log_geometric_mean(*logs, alpha) for alpha in np.linspace(0, 1, 61)]
    path = np.exp(along)
    ax.plot(*(path @ CORNERS).T, **LINES["q*"])
    for role, parent, mark, up in (("policy", policy, "o", 9), ("teacher", teacher, "s", -17)):
        x, y = parent @ CORNERS
        look: dict[str, Any] = {"color": COLOURS[role], "markersize": 9, "zorder": 6}
        ax.plot([x], [y], mark, markeredgecolor="white", **look)
        note(ax, role, (x, y), (0, up), ha="center", color=INK[role])
    star(ax, *(q @ CORNERS))
    offsets = ((0, 6, "center"), (0, -16, "center"), (0, -16, "center"))
    for name, (x, y), (right, up, ha) in zip(names, CORNERS, offsets, strict=True):
        note(ax, name, (x, y), (right, up), clear=False, ha=ha)
    ax.set(xlim=(-0.1, 1.1), ylim=(-0.1, 0.95))
    return ax


def _divergence(p: ndarray, from_: ndarray) -> float:
    return float(rel_entr(p, from_).sum())


def _ball(centre: ndarray, level: float, divergence: Callable[[ndarray], float]) -> ndarray:
    """The edge of a convex ball in the plane of the simplex, ray by ray from its centre."""
    edge = []
    for turn in np.linspace(0, 2 * np.pi, 181):
        up = np.sin(turn) / np.sqrt(0.75)
        right = np.cos(turn)
        way = np.array([up, -up / 2 - right, right - up / 2])
        low, high = 0.0, float((-centre[way < 0] / way[way < 0]).min())
        for _ in range(40):
            middle = (low + high) / 2
            inside = divergence(np.maximum(centre + middle * way, 0)) < level
            low, high = (middle, high) if inside else (low, middle)
        edge.append((centre + low * way) @ CORNERS)
    return np.array(edge)
