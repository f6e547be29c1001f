"""Solving for alpha*: how fast, how exactly, and at what cost."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray

from qstar.result import Balance

from .style import COLOURS, INK, LINES, halo, star


def convergence(errors: Mapping[str, ndarray], *, floor: float, ax: Axes) -> Axes:
    """The error of alpha after each pass over the vocabulary, one line per pair and method.

    Args:
        errors: Method name -> |alpha - alpha*| before each pass, one row per pair. Shape (pairs,
            passes).
        floor: The precision reached at the end; smaller errors are drawn on it.
        ax: Where to draw; the vertical axis is logarithmic.
    """
    looks: dict[str, dict[str, Any]] = {
        "bisection": {"color": COLOURS["quiet"], "marker": "s", "linestyle": ":"},
        "Newton": {"color": COLOURS["other"], "marker": "o", "linestyle": "--"},
        "Halley": {"color": COLOURS["ink"], "marker": "D", "linestyle": "-"},
    }
    for method, rows in errors.items():
        lines = ax.plot(np.maximum(rows, floor).T, ms=4.5, lw=1.4, **looks[method])
        lines[0].set_label(method)
    ax.axhline(floor, **LINES["guide"])
    ax.set(
        yscale="log",
        xlabel="passes over the vocabulary",
        ylabel=r"error of $\alpha$",
        ylim=(floor / 4, 1),
    )
    ax.legend(loc="center right")
    return ax


def log_partition_panels(
    panels: Mapping[str, tuple[ndarray, ndarray, Balance]],
    *,
    fig: Figure,
) -> Figure:
    """log Z(alpha) of several pairs, side by side, each with a star where the solver put alpha*.

    Args:
        panels: Panel label -> (alphas, log Z at each, the solved pair). Shape (points,).
        fig: Where to draw; one row of panels that share the vertical axis.
    """
    axes = fig.subplots(2, 2, sharex=True, sharey=True).ravel()
    for ax, (label, (alphas, log_z, balance)) in zip(axes, panels.items(), strict=True):
        ax.plot(alphas, log_z, color=COLOURS["ink"], linewidth=1.8)
        ax.axhline(0, **LINES["guide"])
        star(ax, float(balance.alpha), -float(balance.chernoff))
        halo(ax.text(0.5, 0.13, label, ha="center", family="monospace", fontsize=10.5))
    lowest = min(float(np.min(log_z)) for _, log_z, _ in panels.values())
    for ax in axes:
        ax.set(xlim=(0, 1), ylim=(1.2 * lowest, 0.3))
        ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    for ax in axes[2:]:
        ax.set_xlabel(r"$\alpha$")
    for ax in axes[::2]:
        ax.set_ylabel(r"$\log Z(\alpha)$ (nats)")
    return fig


def alpha_error(
    offsets: ndarray,
    total_variations: Mapping[str, ndarray],
    estimates: Mapping[str, ndarray],
    *,
    ax: Axes,
) -> Axes:
    """How far q_alpha is from q* when alpha is off: total variation against the error of alpha.

    Args:
        offsets: |alpha - alpha*|. Shape (points,).
        total_variations: Pair label -> TV(q_alpha, q*) at each offset (markers). Shape (points,).
        estimates: Pair label -> its first-order estimate (lines). Shape (points,).
        ax: Where to draw; both axes are logarithmic.
    """
    looks = [("o", COLOURS["ink"]), ("s", COLOURS["other"]), ("D", COLOURS["quiet"])]
    for (label, values), (marker, colour) in zip(total_variations.items(), looks, strict=True):
        ax.plot(offsets, estimates[label], color=colour, linewidth=1.2)
        ax.plot(offsets, values, marker, color=colour, markersize=5, linestyle="none", label=label)
    ax.set(
        xscale="log",
        yscale="log",
        xlabel=r"error of $\alpha$",
        ylabel=r"TV($q_\alpha$, $q^\star$)",
    )
    ax.legend(loc="lower right", title="pair", alignment="left")
    return ax


def passes_histogram(counts: Mapping[str, ndarray], *, ax: Axes) -> Axes:
    """How many passes the solver spent on each row of several sets of rows.

    Args:
        counts: Set label -> passes per row. Shape (rows,).
        ax: Where to draw; the vertical axis is the share of each set's rows.
    """
    looks = [(COLOURS["ink"], None), (COLOURS["other"], "////"), (COLOURS["quiet"], "....")]
    most = max(int(np.max(passes)) for passes in counts.values())
    width = 0.8 / len(counts)
    for index, ((label, passes), (colour, hatch)) in enumerate(
        zip(counts.items(), looks, strict=False)
    ):
        share = np.bincount(passes, minlength=most + 1) / len(passes)
        at = np.arange(most + 1) + (index - (len(counts) - 1) / 2) * width
        ax.bar(at, share, width, color=colour, hatch=hatch, edgecolor="white", label=label)
    ax.set(
        xlabel="passes over the vocabulary",
        ylabel="share of the rows",
        xticks=range(1, most + 1),
        xlim=(0.3, most + 0.7),
        ylim=(0, None),
    )
    ax.legend(loc="upper right")
    return ax


def solver_cost(record: Mapping[str, Any], *, threads: int, ax: Axes) -> Axes:
    """Time per row of several ways to solve for alpha*, as ratios to the torch float32 solver.

    Args:
        record: What `qstar-book record solver` writes.
        threads: Which of its thread counts to draw.
        ax: Where to draw; the horizontal axis is logarithmic.
    """
    names = {
        "read": "only read the two rows",
        "torch_float32": "qstar.rows_torch, float32",
        "torch_float64": "qstar.rows_torch, float64",
        "lean_brentq_float32": "lean brentq, float32",
        "lean_brentq": "lean brentq, float64",
        "user_brentq": "brentq + logsumexp",
    }
    cells = [cell for cell in record["cells"] if cell["threads"] == threads]
    greys = [COLOURS["ink"], COLOURS["other"], COLOURS["quiet"], INK["other"]]
    looks = zip("osD^v<>", greys * 2, strict=False)
    for index, (cell, (marker, colour)) in enumerate(zip(cells, looks, strict=False)):
        ratio = cell["ratio"] | {"torch_float32": {"median": 1.0, "low": 1.0, "high": 1.0}}
        ratios = [ratio[name] for name in names]
        at = np.arange(len(names)) + 0.16 * (index - (len(cells) - 1) / 2)
        middle = np.array([one["median"] for one in ratios])
        ends = np.array([[one["low"], one["high"]] for one in ratios]).T
        ax.errorbar(
            middle,
            at,
            xerr=np.abs(ends - middle),
            fmt=marker,
            color=colour,
            markersize=5,
            linewidth=1.2,
            label=f"{cell['vocab']:,} tokens, batch {cell['batch']}",
        )
    ax.axvline(1, **LINES["guide"])
    ax.set(
        xscale="log",
        xlabel="time per row (1: qstar.rows_torch, float32)",
        yticks=range(len(names)),
        yticklabels=names.values(),
        ylim=(len(names) - 0.5, -0.5),
    )
    ax.legend(loc="lower center", bbox_to_anchor=(0.3, 1.0), ncols=2, handletextpad=0.3)
    return ax
