"""What a draft has in common with q*, the share that is kept; and why a coin keeps more."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy import ndarray

from .style import COLOURS, INK, LINES, halo

MIXTURE: dict[str, Any] = {"color": "#555555", "linestyle": "-", "linewidth": 1.8}
SHADES = {"policy": COLOURS["policy"], "teacher": COLOURS["teacher"], "mixture": "#555555"}


def draft_overlaps(
    target: ndarray,
    drafts: Mapping[str, ndarray],
    *,
    axes: Sequence[Axes],
    covered: ndarray | None = None,
) -> Sequence[Axes]:
    """Each draft distribution against q*, and filled in what both have: the acceptance.

    Args:
        target: q*'s probabilities of some tokens. Shape (tokens,).
        drafts: By name, one of `SHADES`, a draft's. Shape (tokens,).
        axes: Where to draw, one for each draft.
        covered: What the mixture is nowhere less than. Shape (tokens,).
    """
    edges = np.arange(len(target) + 1) + 0.5
    for ax, (name, draft) in zip(axes, drafts.items(), strict=True):
        look = MIXTURE if name == "mixture" else LINES[name]
        both = np.minimum(draft, target)
        ax.stairs(both, edges, fill=True, color=SHADES[name], alpha=0.25)
        ax.stairs(target, edges, **LINES["q*"])
        ax.stairs(draft, edges, **look)
        if covered is not None and name == "mixture":
            ax.stairs(covered, edges, color=INK["q*"], linestyle=(0, (1.2, 1.4)), linewidth=1.8)
        ax.set_xticks(range(1, len(target) + 1))
        ax.set_xlabel("a coin chooses" if name == "mixture" else f"{name} proposes")
        ax.set_title(f"keeps {both.sum():.2f}", fontsize=10.5)
    axes[0].set_ylabel("probability")
    return axes


def coin_acceptance(
    weights: ndarray, kept: ndarray, floor: ndarray, alpha: float, *, ax: Axes
) -> Axes:
    """How often a coin's proposals are kept, by its weight, above both of its lower bounds.

    Args:
        weights: The probability that the policy proposes, from 0 to 1. Shape (points,).
        kept: The acceptance probability of the mixture at each. Shape (points,).
        floor: The bound from the Chernoff information at each. Shape (points,).
        alpha: alpha*, where that bound is highest.
    """
    ax.plot(weights, kept, **MIXTURE)
    ax.plot(weights, floor, color=INK["q*"], linestyle=(0, (1.2, 1.4)), linewidth=1.8)
    ax.plot(weights[[0, -1]], kept[[0, -1]], **LINES["guide"])
    for at, name, marker in ((0, "teacher", "s"), (-1, "policy", "o")):
        (mark,) = ax.plot(weights[at], kept[at], marker, color=COLOURS[name], markersize=7)
        mark.set(clip_on=False, zorder=4)
    top = float(np.interp(alpha, weights, floor))
    ax.plot([alpha], [top], marker="o", color=INK["q*"], markersize=6, linestyle="none")
    halo(ax.text(alpha, float(np.max(kept)) + 0.012, "the mixture", ha="center", color="#444444"))
    halo(ax.text(alpha, top - 0.015, r"$e^{-C}$", ha="center", va="top", color=INK["q*"]))
    low = kept[-1] - 0.02
    halo(ax.text(0.985, low, "average", ha="right", va="top", color=COLOURS["quiet"]))
    ax.set(xlabel=r"probability $\beta$ that the policy proposes", ylabel="kept", xlim=(0, 1))
    ax.set_ylim(min(kept[0], kept[-1]) - 0.12, 1.0)
    return ax


def coin_costs(stays: ndarray, spent: Mapping[str, ndarray], *, ax: Axes) -> Axes:
    """Forward passes per token by the probability to stay, with the least of each curve.

    Args:
        stays: The probability that a proposer goes on. Shape (points,).
        spent: By name, forward passes per token. Shape (points,).
        ax: Where to draw; the line at 2 is plain decoding.
    """
    styles = ("-", (0, (4.5, 2.2)), (0, (1.2, 1.4)), (0, (6, 1.5, 1, 1.5)))
    for (name, cost), style in zip(spent.items(), styles, strict=False):
        (line,) = ax.plot(stays, cost, color=INK["q*"], linestyle=style, linewidth=1.8)
        best = int(np.argmin(cost))
        ax.plot(stays[best], cost[best], "o", color=INK["q*"], markersize=6)
        line.set_label(name)
    ax.axhline(2, **LINES["guide"])
    ax.set(xlabel="probability $s$ to stay", ylabel="forward passes per token")
    ax.set(xlim=(stays[0], stays[-1]), ylim=(0.95, 2.75))
    ax.legend(loc="upper left", title="$C$ in nats", handlelength=3.4, ncols=2)
    return ax
