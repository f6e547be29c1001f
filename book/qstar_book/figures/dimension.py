"""High dimension: what collapses, what stays, and where distributions lie."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray
from numpy.typing import ArrayLike

from .style import COLOURS, FILL, LINES, halo, role_legend


def collapse(
    dimensions: ndarray,
    acceptances: Mapping[str, tuple[str, ndarray]],
    exponents: Mapping[str, float],
    *,
    ax: Axes,
) -> Axes:
    """Acceptance probabilities against the dimension, and the exponential bound of each.

    Args:
        dimensions: Numbers of independent coordinates, increasing. Shape (dimensions,).
        acceptances: Label -> (party whose line it is, acceptance probability at each). Shape
            (dimensions,).
        exponents: By the same labels, what each falls by per coordinate, in nats: drawn dotted, and
            shaded down to the curve that it bounds.
        ax: Where to draw; the vertical axis is logarithmic.
    """
    lowest = 1.0
    for label, (party, values) in acceptances.items():
        line = LINES[party] | {"linewidth": 2.0}
        ax.plot(dimensions, values, **line, label=label)
        bound = np.exp(-exponents[label] * dimensions)
        ax.plot(dimensions, bound, color=COLOURS[party], linestyle=(0, (1, 2)), linewidth=1.2)
        ax.fill_between(dimensions, values, bound, color=COLOURS[party], alpha=FILL, linewidth=0)
        lowest = min(lowest, float(values[-1]))
    ax.plot([], [], color=COLOURS["quiet"], linestyle=(0, (1, 2)), linewidth=1.0, label="its bound")
    ax.set(xlabel="coordinates $n$", ylabel="acceptance probability", yscale="log")
    ax.set(xlim=(0, dimensions[-1]), ylim=(lowest / 2, 1.3))
    ax.legend(loc="lower left")
    return ax


def shells(
    dimensions: Sequence[int],
    radii: ndarray,
    densities: Sequence[Mapping[str, ndarray]],
    *,
    fig: Figure,
) -> Figure:
    """Where policy, teacher and q* have their mass, by the mean square of a coordinate.

    Args:
        dimensions: The number of coordinates in each panel.
        radii: Values of |x|^2 / n. Shape (points,).
        densities: For each panel, the density of |x|^2 / n under policy, teacher and q*. Shape
            (points,).
        fig: Where to draw, one panel above the other.
    """
    axes = fig.subplots(len(dimensions), 1, sharex=True)
    for ax, n, curves in zip(axes, dimensions, densities, strict=True):
        for party, values in curves.items():
            ax.fill_between(radii, 0, values, color=COLOURS[party], alpha=FILL, linewidth=0)
            ax.plot(radii, values, **LINES[party] | {"linewidth": 1.6})
        ax.set(yticks=(), ylim=(0, 1.12 * max(float(v.max()) for v in curves.values())))
        ax.spines["left"].set_visible(False)
        ax.text(0.99, 0.8, f"$n={n}$", transform=ax.transAxes, ha="right", va="center")
    axes[-1].set(xlabel=r"$|x|^2/n$", xlim=(radii[0], radii[-1]))
    role_legend(fig)
    return fig


def precision_shares(
    ratios: ndarray,
    shares: ndarray,
    grid: ndarray,
    curve: ndarray,
    alpha: float,
    *,
    ax: Axes,
) -> Axes:
    """The policy's share of the precision of q* on each axis: many shares, one exponent.

    Args:
        ratios: Variance of the teacher over that of the policy, on each axis. Shape (axes,).
        shares: The policy's share of the precision of q* there. Shape (axes,).
        grid: Ratios, increasing. Shape (points,).
        curve: The share at each, by the formula. Shape (points,).
        alpha: The exponent, common to all axes.
        ax: Where to draw; the horizontal axis is logarithmic.
    """
    style: dict[str, Any] = {"markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.6}
    ax.plot(grid, curve, color=COLOURS["quiet"], linewidth=1.2)
    ax.plot(ratios, shares, "o", color=COLOURS["q*"], **style)
    ax.axhline(alpha, **LINES["guide"])
    ax.axvline(1, **LINES["guide"])
    halo(ax.text(grid[-1], alpha, r"$\alpha^\star$: one for all axes", ha="right", va="bottom"))
    ax.set(
        xscale="log",
        xlim=(grid[0], grid[-1]),
        ylim=(0, 1),
        xlabel="teacher's variance over policy's, along an axis",
        ylabel="policy's share of\nthe precision of $q^\\star$",
    )
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if x >= 1 else f"1/{1 / x:g}")
    return ax


def overlap_law(
    dimensions: ArrayLike,
    divergences: Mapping[str, ndarray],
    *,
    ax: Axes,
) -> Axes:
    """Divergence per coordinate from the overlap's distribution, against the dimension.

    Args:
        dimensions: Numbers of coordinates, increasing.
        divergences: Party -> KL(overlap || party) per coordinate, in nats. Shape (dimensions,).
        ax: Where to draw; both axes are logarithmic.
    """
    names = {"policy": "policy", "teacher": "teacher", "q*": r"$q^\star$"}
    for party, values in divergences.items():
        ax.plot(dimensions, values, **LINES[party], label=f"to {names[party]}")
    ax.set(xlabel="coordinates $n$", ylabel="KL from the overlap\nper coordinate (nats)")
    ax.set(xscale="log", yscale="log")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return ax
