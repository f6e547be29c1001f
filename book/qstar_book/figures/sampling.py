"""Exact sampling: what acceptance rules do, and what bounds the acceptance."""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray

from .style import COLOURS, INK, LINES, note

BUILT: dict[str, Any] = {
    "linestyle": "none",
    "marker": "D",
    "markerfacecolor": "white",
    "markeredgecolor": COLOURS["ink"],
}
"""Pairs that were made for a purpose."""

OPEN = BUILT | {"marker": "o", "markersize": 7.5, "markeredgewidth": 1.4}
_DOTS = {"color": COLOURS["quiet"], "linestyle": "none", "marker": "o"}
CLOUD: dict[str, Any] = _DOTS | {"markersize": 2.2, "markeredgewidth": 0, "rasterized": True}
RANDOM: dict[str, Any] = _DOTS | {"markersize": 4, "alpha": 0.7, "label": "random pairs"}
"""A cloud of random pairs, and how the legend names it."""


def redraw_panels(
    panels: Mapping[str, tuple[ndarray, ndarray]],
    target: ndarray,
    *,
    fig: Figure,
) -> Figure:
    """What a rule for one position emits, token by token: accepted drafts and redraws, stacked.

    Args:
        panels: By the rule's name, the probability that each token is an accepted draft, and that
            it is redrawn. Shape (tokens,).
        target: The distribution that the sum should follow. Shape (tokens,).
        fig: Where to draw, one panel per rule.
    """
    axes = fig.subplots(1, len(panels), sharey=True)
    tokens = range(1, len(target) + 1)
    for ax, (name, (accepted, redrawn)) in zip(axes, panels.items(), strict=True):
        ax.bar(tokens, accepted, width=0.62, color=COLOURS["policy"], label="accepted draft")
        ax.bar(
            tokens,
            redrawn,
            bottom=accepted,
            width=0.62,
            color="#BFD9E8",
            edgecolor=COLOURS["policy"],
            hatch="////",
            linewidth=0.8,
            label="redrawn",
        )
        for x, height in zip(tokens, target, strict=True):
            (mark,) = ax.plot([x - 0.42, x + 0.42], [height, height], **LINES["q*"])
        mark.set_label(r"$q^\star$")
        ax.set_xticks(list(tokens))
        ax.set_xlabel("token")
        ax.annotate(name, (0.5, 1.0), (0, 3), "axes fraction", "offset points", ha="center")
    axes[0].set_ylabel("probability")
    handles, labels = axes[0].get_legend_handles_labels()
    order = [labels.index(label) for label in ("accepted draft", "redrawn", r"$q^\star$")]
    fig.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="outside upper center",
        ncols=3,
    )
    return fig


def loop_bias(
    num_candidates: ndarray,
    bias: Mapping[str, ndarray],
    without_replacement: Mapping[str, Mapping[int, float]],
    *,
    ax: Axes,
) -> Axes:
    """Distance of what the source's loop draws from its target, against the number of candidates.

    Args:
        num_candidates: How many candidates are tried, from 0. Shape (counts,).
        bias: By the name of the example, TV(output, target) with independent candidates. Shape
            (counts,).
        without_replacement: By the same names, TV at some numbers of candidates that were drawn
            without replacement; drawn as hollow markers.
    """
    looks: tuple[tuple[str, Any, str], ...] = (
        ("ink", "-", "o"),
        ("quiet", (0, (4.5, 2.2)), "s"),
        ("other", (0, (1.2, 1.4)), "^"),
    )
    for (name, values), (colour, dash, marker) in zip(bias.items(), looks, strict=True):
        shade = INK.get(colour, COLOURS[colour])
        ax.plot(num_candidates, values, color=shade, linestyle=dash, marker=marker, markersize=4.5)
        hollow = without_replacement.get(name, {})
        look = OPEN | {"marker": marker, "markeredgecolor": shade}
        ax.plot(list(hollow), list(hollow.values()), **look, zorder=4)
        note(
            ax, name, (num_candidates[-1], values[-1]), (0, 6), ha="right", va="bottom", color=shade
        )
    ax.plot([], [], "o-", color=COLOURS["ink"], markersize=4.5, label="with replacement")
    ax.plot([], [], **OPEN, label="without replacement")
    ax.axhline(0, **LINES["q*"], zorder=1)
    note(
        ax,
        r"exact: $q^\star$",
        (num_candidates[-1], 0),
        (0, 5),
        clear=False,
        ha="right",
        va="bottom",
        color=INK["q*"],
    )
    ax.set(
        xlabel="number of candidates $k$",
        ylabel=r"total variation from $q^\star$",
        xlim=(-0.15, num_candidates[-1] + 0.15),
        ylim=(-0.012, None),
    )
    ax.legend(loc="upper left", bbox_to_anchor=(0.0, 1.02))
    return ax


def alpha_acceptance(
    random: tuple[ndarray, ndarray],
    built: tuple[ndarray, ndarray],
    printed: tuple[ndarray, ndarray],
    *,
    ax: Axes,
) -> Axes:
    """Acceptance probability of the policy against alpha*: no curve, the whole square.

    Args:
        random: (alpha*, acceptance) of random pairs. Shape (pairs,).
        built: The same for pairs constructed to lie on a grid. Shape (pairs,).
        printed: The source's table. Shape (rows,).
    """
    ax.plot(*random, **CLOUD, alpha=0.45)
    ax.plot([], [], **RANDOM)
    ax.plot(*built, **BUILT, markersize=4.2, markeredgewidth=0.9, label="pairs built to order")
    ax.plot(
        *printed,
        **LINES["other"] | {"linewidth": 1.6},
        marker="s",
        markersize=6.5,
        label="the source's table",
    )
    ax.set(
        xlabel=r"$\alpha^\star$",
        ylabel="acceptance probability\n(policy drafts)",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, handletextpad=0.3)
    return ax


def acceptance_bounds(
    chernoff: ndarray,
    accepted: ndarray,
    grid: ndarray,
    bounds: Mapping[str, ndarray],
    attained: tuple[ndarray, ndarray],
    *,
    ax: Axes,
) -> Axes:
    """Acceptance probability against the Chernoff information: random pairs above the bounds.

    Args:
        chernoff: C of each random pair, in nats. Shape (pairs,).
        accepted: Its acceptance probability. Shape (pairs,).
        grid: The values of C at which the bounds are given, increasing. Shape (points,).
        bounds: By name, a lower bound at each; the first is the sharp one. Shape (points,).
        attained: (C, acceptance) of pairs built to attain the sharp bound. Shape (pairs,).
    """
    sharp = next(iter(bounds.values()))
    ax.fill_between(grid, 0, sharp, color="#F1F1F1", linewidth=0, zorder=0)
    ax.plot(chernoff, accepted, **CLOUD, alpha=0.4)
    dashes: tuple[Any, ...] = ("-", (0, (4.5, 2.2)), (0, (1.2, 1.4)))
    for (name, values), dash in zip(bounds.items(), dashes, strict=True):
        width = 2.2 if dash == "-" else 1.5
        ax.plot(grid, values, color=COLOURS["ink"], linestyle=dash, linewidth=width, label=name)
    ax.plot(*attained, **BUILT, markersize=5, label="two coins that attain it")
    ax.plot([], [], **RANDOM)
    ax.set(
        xlabel="Chernoff information $C$ (nats)",
        ylabel="acceptance probability",
        xscale="log",
        xlim=(grid[0], grid[-1]),
        ylim=(0, 1),
    )
    ax.legend(loc="lower left", handletextpad=0.5)
    return ax
