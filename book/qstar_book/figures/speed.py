"""Decoding on an accelerator: what a forward, a solve and a round take, and what drafting gains.

Text is at least 10 points, to be read on a phone: draw them at most 5 inches wide.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy import ndarray

from .decoding import grouped_rows
from .style import COLOURS, INK, LINES

LOOKS: tuple[dict[str, Any], ...] = (
    {"color": COLOURS["quiet"], "marker": "s", "markerfacecolor": "white"},
    {"color": INK["q*"], "marker": "o"},
    {"color": INK["other"], "marker": "^", "markerfacecolor": "white"},
)
"""How ways are told apart, in order: marks differ, so that they do in grey."""
DASHES: tuple[Any, ...] = (":", "-", (0, (4.5, 2.2)))
STREAMS: tuple[dict[str, Any], ...] = (
    {"color": COLOURS["quiet"], "linestyle": "-"},
    {"color": COLOURS["ink"], "linestyle": ":"},
    {"color": INK["q*"], "linestyle": "-"},
    {"color": INK["other"], "linestyle": (0, (4.5, 2.2))},
)
"""The same of ways whose tokens are streamed."""


def forward_times(
    panels: Mapping[str, tuple[ndarray, Mapping[str, ndarray], float]], *, fig: Figure
) -> Figure:
    """Milliseconds of a forward against its width, a panel for each model, on a shared log axis.

    Args:
        panels: Heading -> widths, name -> milliseconds, and the milliseconds in which the weights
            could be read once. Shape (widths,).
    """
    axes = fig.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    handles: list[Line2D] = []
    for ax, (heading, (widths, ways, floor)) in zip(axes, panels.items(), strict=True):
        handles = []
        for (name, spent), look, dash in zip(ways.items(), LOOKS, DASHES, strict=False):
            handles += ax.plot(widths, spent, linestyle=dash, markersize=6, label=name, **look)
        floors = ax.axhline(floor, **LINES["guide"] | {"linewidth": 1.8, "color": COLOURS["ink"]})
        floors.set_label("reading the weights once")
        handles.append(floors)
        ax.set(xscale="log", yscale="log")
        ax.set_xticks(widths, [str(w) for w in widths])
        ax.set_xlabel("positions, " + heading, fontsize=10.5)
        ax.minorticks_off()
        ax.tick_params(labelsize=10.5)
    low, high = axes[0].get_ylim()
    ticks = [t for t in (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100) if low <= t <= high]
    axes[0].set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes[0].set_ylabel("ms per forward pass")
    fig.legend(handles=handles, loc="outside upper center", ncols=2, fontsize=10.5)
    return fig


def solver_times(rows: Mapping[str, Mapping[str, float]], *, ax: Axes) -> Axes:
    """Milliseconds of a call, on a log axis, a line of marks for each size of the problem.

    Args:
        rows: Label -> way -> milliseconds; every row has the same ways.
    """
    for y, spent in enumerate(rows.values()):
        values = list(spent.values())
        ax.plot([min(values), max(values)], [y, y], color="#CCCCCC", linewidth=1.0, zorder=1)
        for (name, value), look in zip(spent.items(), LOOKS, strict=False):
            label = name if y == 0 else None
            ax.plot([value], [y], linestyle="none", markersize=7.5, label=label, **look)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set(xscale="log", xlabel="ms per call", ylabel="vocabulary × rows")
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.tick_params(which="both", labelsize=10.5)
    ax.tick_params(axis="y", length=0)
    handles, _ = ax.get_legend_handles_labels()
    _above(ax, handles)
    return ax


def round_shares(
    rows: Mapping[str, Mapping[str, float]], *, ax: Axes, xlabel: str = "ms per round"
) -> Axes:
    """Milliseconds of a round as stacked bars, one for each way.

    Args:
        rows: Way -> part -> milliseconds; every row has the same parts, at most four.
        ax: To draw on.
        xlabel: What the milliseconds are.
    """
    looks: tuple[dict[str, Any], ...] = (
        {"facecolor": INK["q*"]},
        {"facecolor": "#BDD9EA", "hatch": "////", "edgecolor": INK["policy"]},
        {"facecolor": COLOURS["ink"]},
        {"facecolor": "#E9E3D3", "hatch": "....", "edgecolor": COLOURS["ink"]},
    )
    for y, parts in enumerate(rows.values()):
        left = 0.0
        for value, look in zip(parts.values(), looks, strict=False):
            ax.barh(y, value, left=left, height=0.62, linewidth=0.6, **look)
            left += value
        ax.text(left, y, f"  {left:.1f}", va="center", fontsize=10.5)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set(xlabel=xlabel, ylim=(len(rows) - 0.45, -0.55))
    ax.set_xlim(0, 1.12 * max(sum(parts.values()) for parts in rows.values()))
    ax.tick_params(labelsize=10.5)
    ax.tick_params(axis="y", length=0)
    names = next(iter(rows.values()))
    patches = [Patch(**look, label=name) for name, look in zip(names, looks, strict=False)]
    _above(ax, patches)
    return ax


def speed_by_acceptance(
    measured: Mapping[str, Sequence[tuple[float, float, float, float]]],
    in_models: Mapping[str, Sequence[tuple[float, float]]],
    predicted: Mapping[str, tuple[ndarray, ndarray]],
    *,
    ax: Axes,
) -> Axes:
    """How many times faster than plain decoding, against the acceptance, measured and predicted.

    Args:
        measured: Way -> for each pair (acceptance, median, low, high), by the clock.
        in_models: Way -> for each pair (acceptance, median), of the time in the models alone.
        predicted: Way -> acceptances and what the cost model promises there. Shape (points,).
        ax: Where to draw; the line at 1 is plain decoding.
    """
    looks = (LOOKS[1], LOOKS[2])
    cross: dict[str, Any] = {"marker": "x", "markersize": 7, "markeredgewidth": 1.8}
    cross["linestyle"] = "none"
    sides = (-0.004, 0.004)  # so that no mark hides another
    for (way, points), look, dash, aside in zip(
        measured.items(), looks, DASHES[1:], sides, strict=False
    ):
        at, curve = predicted[way]
        ax.plot(at, curve, color=look["color"], linestyle=dash, linewidth=1.8)
        for acceptance, median, low, high in points:
            x = acceptance + aside
            ax.plot([x, x], [low, high], color=look["color"], linewidth=1.6)
            ax.plot([x], [median], linestyle="none", markersize=8, zorder=5, **look)
        for acceptance, median in in_models[way]:
            ax.plot([acceptance + aside], [median], color=look["color"], zorder=4, **cross)
        ax.plot([], [], linestyle=dash, markersize=8, label=way, **look)
    if any(in_models.values()):
        ax.plot([], [], color=COLOURS["ink"], label="in the models", **cross)
    ax.axhline(1, color=COLOURS["ink"], linewidth=1.0)
    ax.set(
        xlabel="acceptance probability of a parent's draft",
        ylabel="times as fast as plain decoding",
        ylim=(min(0.9, ax.get_ylim()[0]), None),
    )
    ax.tick_params(labelsize=10.5)
    ax.legend(loc="upper left", fontsize=10.5, handlelength=3.2)
    return ax


def arrivals(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, int]]]], *, fig: Figure
) -> Figure:
    """How many tokens of a streamed answer are there, against the time, a panel for each pair.

    Args:
        panels: Heading -> way -> (seconds since the call began, new tokens) of each arrival.
        fig: Where to draw.
    """
    axes = fig.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    every = dict.fromkeys(way for ways in panels.values() for way in ways)
    looks = dict(zip(every, STREAMS, strict=False))
    for ax, (heading, ways) in zip(axes, panels.items(), strict=True):
        for way, came in ways.items():
            seconds, tokens = (np.array(part) for part in zip(*came, strict=True))
            times, there = np.append(0.0, seconds), np.append(0, tokens.cumsum())
            ax.step(times, there, where="post", label=way, linewidth=1.8, **looks[way])
        ax.set(ylabel="tokens", ylim=(0, None), xlim=(0, None))
        ax.set_title(heading, loc="left", fontsize=10.5, weight="bold")
        ax.tick_params(labelsize=10.5)
    axes[-1].set_xlabel("seconds since the call began")
    handles = {line.get_label(): line for ax in axes for line in ax.lines}
    fig.legend(handles=handles.values(), loc="outside upper center", ncols=2, fontsize=10.5)
    return fig


def count_to_clock(
    groups: Mapping[str, Mapping[str, Sequence[float]]], ceilings: Mapping[str, float], *, ax: Axes
) -> Axes:
    """From what fewer forward passes promise to what the clock shows, way by way.

    Args:
        groups: Heading -> way -> speed-up as counted, within the models, by the clock, and the low
            and high end of the last one's interval.
        ceilings: Heading -> the most that the clock can show with one forward pass a token.
        ax: Where to draw; the line at 1 is plain decoding.
    """
    looks: dict[str, dict[str, Any]] = {
        "counted": LOOKS[0],
        "in the models": {"color": COLOURS["ink"], "marker": "x", "markeredgewidth": 1.8},
        "by the clock": LOOKS[1],
    }
    for y, heading, way, (*found, low, high) in grouped_rows(groups, ax=ax):
        if way == next(iter(groups[heading])):
            ceiling = ceilings[heading]
            ax.plot([ceiling] * 2, [y - 0.4, y + len(groups[heading]) - 0.6], **LINES["guide"])
        ax.plot([found[0], found[-1]], [y, y], color="#CCCCCC", linewidth=1.0, zorder=1)
        ax.plot([low, high], [y, y], color=INK["q*"], linewidth=1.8)
        for value, look in zip(found, looks.values(), strict=True):
            ax.plot([value], [y], linestyle="none", markersize=6.5, **look)
    ax.set_xlim(min(0.7, ax.get_xlim()[0]), None)
    ax.tick_params(labelsize=10.5)
    handles = [
        Line2D([], [], linestyle="none", markersize=6.5, label=name, **look)
        for name, look in looks.items()
    ]
    _above(ax, [*handles, Line2D([], [], label="ceiling of the clock", **LINES["guide"])], ncols=2)
    return ax


def _above(ax: Axes, handles: Sequence[Any], ncols: int = 1) -> None:
    """A legend above the whole figure."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.legend(handles=handles, loc="outside upper center", fontsize=10.5, ncols=ncols)
