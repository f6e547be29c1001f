"""Distributions made of two models and what they answer; draft models, and when they pay."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray

from .style import COLOURS, INK, LINES

Interval = tuple[float, float, float]
NUMBER = re.compile(r"[-+]?[0-9.]+( to [-+]?[0-9.]+)?$")

MARKS: dict[str, dict[str, Any]] = {
    "policy": {"color": COLOURS["policy"], "marker": "s"},
    "teacher": {"color": COLOURS["teacher"], "marker": "D"},
    "q*": {"color": COLOURS["q*"], "marker": "o", "markersize": 8},
}
OTHER = {"color": COLOURS["quiet"], "marker": "^", "markerfacecolor": "white"}


LONG = 16
"""Letters of a word beyond which it may be broken."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """HTML of a table, which scrolls in itself where the page is narrower.

    Args:
        head: What stands above each column, none of it empty.
        rows: The cells, row by row. A column of numbers, or of intervals, ends on one line; words
            that are too long for the page are broken.
    """
    numeric = [all(NUMBER.match(row[i]) for row in rows) for i in range(len(head))]
    longest = [
        max((len(word) for row in rows for word in row[i].split()), default=0)
        for i in range(len(head))
    ]
    styles = ["text-align:left;min-width:7em;overflow-wrap:anywhere"] * len(head)
    for i, letters in enumerate(longest):
        if numeric[i]:
            styles[i] = "text-align:right;white-space:nowrap"
        elif letters <= LONG:
            styles[i] = "text-align:left"

    def line(cells: Sequence[str], tag: str) -> str:
        parts = [
            f'<{tag} style="{style}">{html.escape(cell)}</{tag.split()[0]}>'
            for cell, style in zip(cells, styles, strict=True)
        ]
        return f"<tr>{''.join(parts)}</tr>"

    above, body = line(head, 'th scope="col"'), "".join(line(row, "td") for row in rows)
    return (
        f'<div style="overflow-x:auto"><table class="table"><thead>{above}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def target_scores(
    panels: Mapping[str, Mapping[str, tuple[Interval, Sequence[float]]]], *, fig: Figure
) -> Figure:
    """How often each target answers rightly: a panel for each pair, a line for each target.

    Args:
        panels: Pair -> target -> (mean and the ends of its interval, the mean of each seed).
    """
    rows = -(-len(panels) // 2)
    axes = list(fig.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).flat)
    for ax in axes[len(panels) :]:
        ax.axis("off")
    for ax, (heading, targets) in zip(axes, panels.items(), strict=False):
        for y, (target, ((mean, low, high), seeds)) in enumerate(targets.items()):
            look = {"markersize": 6, **MARKS.get(target, OTHER)}
            ax.plot([low, high], [y, y], color=look["color"], linewidth=2)
            ax.plot(seeds, [y + 0.28] * len(seeds), "|", color=COLOURS["quiet"], markersize=6)
            ax.plot([mean], [y], linestyle="none", **look)
        ax.set_yticks(range(len(targets)), list(targets))
        ax.set(xlim=(-0.04, 1.04), ylim=(len(targets) - 0.5, -0.6))
        ax.set_xticks([0, 0.5, 1], ["0", "½", "1"])
        ax.set_title(heading, fontsize=10.5)
        ax.grid(axis="y", color="#EEEEEE")
    for ax in axes[max(0, len(panels) - 2) : len(panels)]:  # the lowest of each column
        ax.tick_params(labelbottom=True)
    fig.supxlabel("probability of the right answer", fontsize=10.5)
    return fig


def sampler_power(pairs: Mapping[str, tuple[ndarray, ndarray]], level: float, *, ax: Axes) -> Axes:
    """How often a two-sample test finds a sampler out, by how much of it is another one's.

    Args:
        pairs: Name -> shares of answers of the other sampler, and how often. Shape (shares,).
        level: Of the test.
    """
    looks: tuple[dict[str, Any], ...] = (
        {"marker": "o"},
        {"marker": "s", "linestyle": "--", "markerfacecolor": "white"},
    )
    for (name, (shares, power)), look in zip(pairs.items(), looks, strict=True):
        ax.plot(shares, power, color=COLOURS["ink"], label=name, **look)
    ax.axhline(level, **LINES["guide"])
    ax.text(1, level + 0.02, f"level {level:g}", ha="right", va="bottom", fontsize=10.5)
    ax.set(xlim=(0, 1.03), ylim=(0, 1.05))
    ax.set_xlabel("share of answers from the source's loop")
    ax.set_ylabel("tests that detect it")
    ax.legend(loc="center right", fontsize=10.5)
    return ax


def draft_acceptances(
    drafters: Mapping[str, Sequence[Interval]], guides: Mapping[str, float], *, ax: Axes
) -> Axes:
    """Acceptance probabilities by drafter, one mark with its interval for each seed.

    Args:
        drafters: Name -> for each seed the mean and the ends of its interval.
        guides: Label -> a value to compare with.
    """
    for y, (name, seeds) in enumerate(drafters.items()):
        look = {"markersize": 6, **MARKS.get(name, OTHER)}
        for i, (mean, low, high) in enumerate(seeds):
            at = y + 0.22 * (i - (len(seeds) - 1) / 2)
            ax.plot([low, high], [at, at], color=look["color"], linewidth=1.8)
            ax.plot([mean], [at], linestyle="none", **look)
    for label, value in guides.items():
        ax.axvline(value, **LINES["guide"] | {"color": COLOURS["ink"]})
        ax.text(value, -0.75, label, ha="center", va="bottom", fontsize=10.5)
    ax.set_yticks(range(len(drafters)), list(drafters))
    ax.set_ylim(len(drafters) - 0.4, -0.7)
    ax.set_xlabel("acceptance probability, mean over texts of q*")
    return ax


def draft_payoff(
    grid: ndarray, curves: Mapping[str, ndarray], marks: Mapping[str, float], *, ax: Axes
) -> Axes:
    """Expected speed-up over plain decoding against what a forward of the draft model costs.

    Args:
        grid: Costs, in forwards of a parent. Shape (costs,).
        curves: Name -> speed-up. Shape (costs,).
        marks: Label -> a cost to point at.
    """
    looks = [
        {"color": INK["q*"], "linewidth": 2.6},
        {"color": INK["other"], "linestyle": ":", "linewidth": 2.0},
        {"color": COLOURS["ink"], "linestyle": (0, (4.5, 2.2))},
        {"color": COLOURS["quiet"], "linestyle": "-"},
    ]
    for (name, values), look in zip(curves.items(), looks, strict=False):
        ax.plot(grid, values, label=name, **look)  # type: ignore[arg-type]
    for label, cost in marks.items():
        ax.axvline(cost, **LINES["guide"])
        ax.text(cost, 0.02, f" {label}", transform=ax.get_xaxis_transform(), fontsize=10.5)
    ax.axhline(1, color=COLOURS["quiet"], linewidth=0.8)
    ax.set(xscale="log", xlabel="cost of a draft forward pass, in those of a parent")
    ax.set_ylabel("times as fast as plain decoding")
    ax.legend(loc="lower left", bbox_to_anchor=(0.0, 0.2))
    return ax


def length_costs(panels: Mapping[str, Mapping[str, Interval]], *, fig: Figure) -> Figure:
    """What a token costs under each rule for the draft length, over the best fixed length.

    Args:
        panels: Heading -> rule -> mean and the ends of its interval.
    """
    axes = fig.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (heading, rules) in zip(axes, panels.items(), strict=True):
        for y, (mean, low, high) in enumerate(rules.values()):
            ax.plot([low, high], [y, y], color=COLOURS["ink"], linewidth=1.8)
            ax.plot([mean], [y], "o", color=COLOURS["ink"], markersize=5)
        ax.axvline(0, **LINES["guide"])
        ax.set_yticks(range(len(rules)), list(rules))
        ax.set_ylim(len(rules) - 0.5, -0.5)
        ax.set_xlabel(heading, fontsize=10.5)
        ax.locator_params(axis="x", nbins=2)
        ax.grid(axis="y", color="#EEEEEE")
    return fig
