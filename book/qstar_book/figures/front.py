"""q* itself, as the first picture of the book shows it."""

import numpy as np
from matplotlib.axes import Axes
from numpy import ndarray

from qstar.gaussian import SolvedPair

from .style import COLOURS, FILL, INK, LINES, note

NAMES = {"policy": r"policy $\pi_\theta$", "teacher": r"teacher $\pi_t$", "q*": r"$q^\star$"}


def balanced(case: SolvedPair, x: ndarray, rows: ndarray, *, ax: Axes) -> Axes:
    """Two parents on a line and q* between them, with its divergence to either, which is C.

    Args:
        case: The solved pair, each parent with one peak.
        x: The points. Shape (points,).
        rows: The densities of policy, teacher and q* there. Shape (3, points).
    """
    top, chernoff = float(rows.max()), float(case.balance.chernoff)
    peaks = {}
    for role, density in zip(NAMES, rows, strict=True):
        ax.fill_between(x, density, color=COLOURS[role], alpha=FILL, linewidth=0)
        ax.plot(x, density, **LINES[role])
        peaks[role] = float(x[np.argmax(density)])
        note(
            ax,
            NAMES[role],
            (peaks[role], float(density.max())),
            (0, 6),
            ha="center",
            va="bottom",
            color=INK[role],
            fontsize=13 if role == "q*" else 11,
        )
    height = -0.13 * top
    for role in ("policy", "teacher"):
        side = 1 if peaks[role] < peaks["q*"] else -1
        ends = (peaks["q*"], height), (peaks[role], height)
        ax.annotate("", *ends, arrowprops={"arrowstyle": "<->", "color": INK[role], "lw": 1.3})
        note(
            ax,
            rf"KL($q^\star$ ‖ {role}) = {chernoff:.2f}",
            (peaks["q*"], height),
            (-6 * side, -5),
            clear=False,
            ha="right" if side > 0 else "left",
            va="top",
            color=INK[role],
            fontsize=10.5,
        )
    ax.vlines(peaks["q*"], height * 1.25, rows[2].max(), **LINES["guide"])
    ax.axhline(0, color="#555555", linewidth=0.8)
    ax.set(xlim=(x[0], x[-1]), ylim=(-0.36 * top, 1.22 * top), yticks=[], xticks=[])
    ax.spines[:].set_visible(False)
    return ax
