"""Training: alpha* and C on the way, learning curves with intervals, what weighting costs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray

from .style import COLOURS, LINES

WAYS: dict[str, tuple[str, str, Any]] = {
    "policy": (COLOURS["policy"], "o", "-"),
    "teacher": (COLOURS["teacher"], "s", (0, (4.5, 2.2))),
    "q*": (COLOURS["q*"], "D", "-"),
    "q*, weighted": (COLOURS["q*"], "^", (0, (1.2, 1.4))),
    "half": (COLOURS["other"], "v", (0, (1.2, 1.4))),
    "mixture": (COLOURS["quiet"], "P", (0, (4.5, 1.4, 1.2, 1.4))),
}
"""Colour, marker and dash of each way to draw rollouts."""


Trajectory = tuple[ndarray, ndarray]
"""Of checkpoints: the mean C in nats, and the 5th, 50th and 95th percentile of alpha* over the
positions; nan where a model meets itself. Shapes (steps,) and (steps, 3)."""


def trajectories(
    steps: Sequence[int], trainings: Mapping[str, Mapping[str, Trajectory]], *, fig: Figure
) -> Figure:
    """C and the quantiles of alpha* of checkpoints against two other models.

    Args:
        steps: After which optimiser steps.
        trainings: What is trained, a column each -> what it is compared with -> its trajectory.
    """
    axes = fig.subplots(2, len(trainings), sharex=True, sharey="row", squeeze=False)
    at = np.asarray(steps, dtype=float) + 1
    for (name, runs), (above, below) in zip(trainings.items(), axes.T, strict=True):
        for (label, (chernoff, quantiles)), colour, marker in zip(
            runs.items(), (COLOURS["q*"], COLOURS["other"]), "os", strict=True
        ):
            above.plot(at, chernoff, marker + "-", color=colour, markersize=4, label=label)
            below.plot(at, quantiles[:, 1], marker + "-", color=colour, markersize=4)
            below.fill_between(at, quantiles[:, 0], quantiles[:, 2], color=colour, alpha=0.18)
        below.axhline(0.5, **LINES["guide"])
        above.set_yscale("log")
        above.set_title(name, fontsize="medium")
        below.set(xscale="log", xlabel="1 + optimiser steps")
    axes[0, 0].set_ylabel("mean $C$ (nats)")
    axes[1, 0].set_ylabel(r"$\alpha^\star$")
    labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(*labels, loc="outside upper center", ncols=2)
    fig.align_ylabels()
    return fig


def away_by_range(
    ranges: ndarray,
    away: ndarray,
    chernoff: ndarray,
    bound: tuple[ndarray, ndarray],
    *,
    ax: Axes,
) -> Axes:
    """How far alpha* is from one half at single positions, against the range of the log-ratio.

    Args:
        ranges: In nats. Shape (positions,).
        away: |alpha* - 1/2|; what is below 1e-4 is drawn there. Shape (positions,).
        chernoff: C in nats, shown by size and shade. Shape (positions,).
        bound: Ranges, and the largest distance that the range bound allows. Shape (points,).
        ax: Where to draw; both axes are logarithmic.
    """
    shade = np.log10(np.maximum(chernoff, 1e-9))
    marks = ax.scatter(ranges, np.maximum(away, 1e-4), c=shade, s=14, cmap="viridis", linewidths=0)
    ax.plot(*bound, color=COLOURS["ink"], linewidth=1.2, label="range bound")
    bar = ax.figure.colorbar(marks, ax=ax)
    bar.set_label("$\\log_{10} C$ (nats)")
    ax.set(
        xscale="log",
        yscale="log",
        ylim=(8e-5, 0.6),
        xlabel="range of the log-ratio (nats)",
        ylabel=r"$|\alpha^\star-\frac{1}{2}|$",
    )
    ax.legend(loc="upper left")
    return ax


def learning_curves(
    steps: Sequence[int],
    panels: Mapping[str, Mapping[str, tuple[ndarray, ndarray, ndarray]]],
    *,
    fig: Figure,
) -> Figure:
    """Curves of several ways to draw rollouts, one panel for each quantity.

    Args:
        steps: After which optimiser steps.
        panels: Quantity -> way -> (mean over seeds, low, high). Shapes (steps,).
    """
    axes = np.atleast_1d(fig.subplots(len(panels), 1, sharex=True))
    at = np.asarray(steps, dtype=float)
    for ax, (quantity, ways) in zip(axes, panels.items(), strict=True):
        for i, (way, (mean, low, high)) in enumerate(ways.items()):
            colour, marker, dash = WAYS[way]
            shift = (i - (len(ways) - 1) / 2) * 0.006 * max(1.0, at[-1])
            bars = np.stack([mean - low, high - mean])
            ax.errorbar(
                at + shift, mean, yerr=bars, color=colour, marker=marker, linestyle=dash,
                markersize=4, capsize=2, linewidth=1.3, elinewidth=0.9,
                label=way.replace("q*", r"$q^\star$").replace("half", "$q_{1/2}$"),
            )  # fmt: skip
        ax.set_ylabel(quantity)
    axes[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    axes[-1].set_xlabel("optimiser steps")
    fig.align_ylabels()
    return fig
