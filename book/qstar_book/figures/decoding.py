"""Decoding with drafts: one round, what it costs, what it saves, and who proposed each token."""

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from numpy import ndarray

from .style import COLOURS, INK, LINES, halo

PARENTS = ("policy", "teacher")
DASHES = {"policy": "-", "teacher": (0, (4.5, 2.2))}


def one_round(steps: Sequence[tuple[str, Sequence[tuple[str, str]], str]], *, ax: Axes) -> Axes:
    """Forward passes one below the other, over the same positions: who proposes, and who judges.

    An arrow leads from a proposal to the forward pass that judges it.

    Args:
        steps: For each forward pass the parent that makes it, the positions of the text from left
            to right as (word, kind), and what comes of it. Kinds: "cached", "read" (in this
            forward pass), "draft" (a proposal, read in this forward pass and kept), "masked" (a
            proposal, read and rejected), "next" (a proposal for the position after the last).
    """
    looks: dict[str, dict[str, Any]] = {
        "cached": {"facecolor": "#ECECEC", "edgecolor": "#AAAAAA"},
        "read": {"facecolor": "white", "edgecolor": COLOURS["ink"]},
        "draft": {"facecolor": "white", "edgecolor": COLOURS["ink"]},
        "masked": {"facecolor": "white", "edgecolor": COLOURS["quiet"], "hatch": "////"},
        "next": {"facecolor": "none", "edgecolor": COLOURS["ink"]},
    }
    widest = max(len(slots) for _, slots, _ in steps)
    pitch, begun = 1.4, None
    for row, (parent, slots, note) in enumerate(steps):
        y = -pitch * row
        ax.text(-0.12, y + 0.4, parent, ha="right", va="center", color=INK[parent], weight="bold")
        for place, (word, kind) in enumerate(slots):
            look = looks[kind] | {"linewidth": 1.2}
            if kind in ("draft", "next"):
                proposer = parent if kind == "next" else _other(parent)
                look |= {
                    "edgecolor": COLOURS[proposer],
                    "linestyle": DASHES[proposer],
                    "linewidth": 2.2,
                }
            ax.add_patch(Rectangle((place + 0.05, y), 0.9, 0.8, **look))
            if kind in ("draft", "masked") and begun is not None:
                colour = COLOURS[_other(parent)]
                ax.plot([place + 0.5] * 2, [begun - 0.04, y + 0.98], color=colour, linewidth=1.6)
                ax.plot([place + 0.5], [y + 0.94], marker="v", markersize=6, color=colour)
            shade = COLOURS["quiet"] if kind in ("cached", "masked") else COLOURS["ink"]
            label = ax.text(place + 0.5, y + 0.4, word, ha="center", va="center", color=shade)
            if kind == "masked":
                halo(label)
        begun = y if slots[-1][1] == "next" else None
        ax.text(len(slots) + 0.15, y + 0.4, note, va="center").set_in_layout(False)
    handles = [
        Patch(**looks["cached"], label="read before"),
        Patch(**looks["read"], label="read now"),
        Patch(facecolor="none", edgecolor=COLOURS["policy"], linewidth=2, label="proposed"),
        Patch(**looks["masked"], label="rejected"),
    ]
    ax.legend(
        handles=handles,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=4,
        handlelength=1.2,
        handletextpad=0.4,
        columnspacing=0.9,
        borderaxespad=0.2,
    )
    ax.set(xlim=(-1.2, widest + 2.1), ylim=(-pitch * (len(steps) - 1) - 0.1, 0.95))
    ax.axis("off")
    return ax


def width_costs(curves: Mapping[str, tuple[ndarray, ndarray]], *, ax: Axes) -> Axes:
    """v(w): what a forward over w positions takes, in forwards over one.

    Args:
        curves: Name -> (widths, times over that of width 1). Shape (widths,).
    """
    looks = ((COLOURS["ink"], "-", "o"), (COLOURS["other"], (0, (4.5, 2.2)), "s"))
    for (name, (widths, ratio)), (colour, dash, marker) in zip(curves.items(), looks, strict=False):
        ax.plot(
            widths, ratio, color=colour, linestyle=dash, marker=marker, markersize=5, label=name
        )
    ax.axhline(1, **LINES["guide"])
    ax.set(xlabel="positions in one forward, $w$", ylabel="$v(w)$", xscale="log", ylim=(0, None))
    ticks = next(iter(curves.values()))[0]
    ax.set_xticks(ticks, [str(w) for w in ticks])
    ax.minorticks_off()
    ax.legend(loc="lower right")
    return ax


def forwards_by_acceptance(
    acceptance: ndarray,
    curves: Mapping[str, ndarray],
    measured: Mapping[str, tuple[float, float]],
    *,
    ax: Axes,
) -> Axes:
    """Forwards per token of each scheme against the acceptance, and what was counted.

    Args:
        acceptance: The acceptance probability of the drafter. Shape (points,).
        curves: Scheme -> forwards of the parents per token. Shape (points,).
        measured: Scheme -> (acceptance rate, forwards per token) of recorded runs.
    """
    looks: tuple[tuple[str, Any, str], ...] = (
        (INK["q*"], "-", "o"),
        (INK["q*"], (0, (4.5, 2.2)), "s"),
        (INK["q*"], (0, (1.2, 1.4)), "^"),
        (COLOURS["quiet"], (0, (6, 1.6, 1.2, 1.6)), "D"),
        (INK["other"], "-", "v"),
    )
    handles: list[Line2D] = []
    for (name, values), (colour, dash, marker) in zip(curves.items(), looks, strict=False):
        line: dict[str, Any] = {"color": colour, "linestyle": dash, "linewidth": 1.9}
        mark: dict[str, Any] = {
            "marker": marker,
            "markerfacecolor": "white",
            "markeredgewidth": 1.6,
        }
        ax.plot(acceptance, values, **line)
        if name in measured:  # the first ones larger: one may lie on another
            size = max(11 - 3 * len(handles), 7)
            ax.plot(
                *measured[name], **mark, markersize=size, linestyle="none", color=colour, zorder=5
            )
        counted = f"{name}, recorded" if name in measured else name
        handles.append(Line2D([], [], **line, **(mark if name in measured else {}), label=counted))
    ax.axhline(2, color=COLOURS["ink"], linewidth=1.2)
    halo(ax.text(0.99, 2.04, "plain decoding", va="bottom", ha="right"))
    ax.axhline(1, **LINES["guide"])
    ax.set(
        xlabel="acceptance probability of a draft, $a$",
        ylabel="forward passes per token",
        xlim=(0, 1),
        ylim=(0, 4),
    )
    above: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0)}
    ax.legend(handles=handles, **above, ncols=2, handlelength=2.6, columnspacing=1.0)
    return ax


def grouped_rows(
    groups: Mapping[str, Mapping[str, Any]], *, ax: Axes
) -> Iterator[tuple[float, str, str, Any]]:
    """Headings and ways of a figure of speed ratios, one below the other; the caller draws each.

    Args:
        groups: Heading -> way -> what is drawn of it.
        ax: Where to draw; it has its axes once the last row is taken.

    Yields:
        Height, heading, way, and what is drawn of it.
    """
    y, ticks, labels = 0.0, [], []
    for heading, rows in groups.items():
        place: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "va": "center"}
        halo(ax.text(0.01, y, heading, weight="bold", fontsize=10.5, zorder=3, **place))
        y += 1
        for way, found in rows.items():
            yield y, heading, way, found
            ticks.append(y)
            labels.append(way)
            y += 1
        y += 0.4
    ax.axvline(1, color=COLOURS["ink"], linewidth=1.0, zorder=1)
    ax.set_yticks(ticks, labels)
    ax.set(xlabel="times as fast as plain decoding", ylim=(y - 0.6, -0.6))
    ax.tick_params(axis="y", length=0)


def speed_ratios(
    groups: Mapping[str, Mapping[str, tuple[float, float, float]]], *, ax: Axes
) -> Axes:
    """How many times faster than plain decoding, with intervals, way by way.

    Args:
        groups: Heading -> way -> (median, low, high).
        ax: Where to draw; the line at 1 is plain decoding with two calls a token.
    """
    for y, _, way, (median, low, high) in grouped_rows(groups, ax=ax):
        theirs = way.startswith("transformers")
        colour = COLOURS["quiet"] if theirs else INK["q*"]
        ax.plot([low, high], [y, y], color=colour, linewidth=1.8)
        ax.plot(
            [median],
            [y],
            marker="s" if theirs else "o",
            color=colour,
            markersize=6.5,
            markerfacecolor="white" if theirs else colour,
        )
    ax.set_xlim(min(0.5, ax.get_xlim()[0]), None)
    if any(way.startswith("transformers") for rows in groups.values() for way in rows):
        handles = [
            Line2D([], [], color=INK["q*"], marker="o", label="qstar.generate"),
            Line2D([], [], color=COLOURS["quiet"], marker="s", markerfacecolor="white",
                   label="transformers"),
        ]  # fmt: skip
        ax.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.35, 1.0), ncols=2)
    return ax


def proposed_text(
    words: Sequence[str],
    proposers: Sequence[str],
    accepted: Sequence[bool],
    acceptance: Sequence[float],
) -> str:
    """HTML of a decoded text: who proposed each token, and whether it was kept.

    A kept token is underlined in its proposer's colour (policy solid, teacher dashed), a token that
    was drawn in place of a rejected proposal, or that nobody proposed, doubly in that of q*. The
    number that shows where the pointer rests is the acceptance probability of the proposal.

    Args:
        words: The tokens as text.
        proposers: Of each token: "policy", "teacher", another drafter, or "none".
        accepted: Whether the proposal was kept.
        acceptance: The probability that it would be.
    """
    lines = {"policy": "solid", "teacher": "dashed"}
    spans = []
    for word, who, kept, chance in zip(words, proposers, accepted, acceptance, strict=True):
        party = who if kept and who in lines else "q*" if not kept else "other"
        line = "double" if party == "q*" else lines.get(party, "dotted")
        width = 4 if line == "double" else 3
        fate = "kept" if kept else "replaced"
        title = f"{who} proposed, {fate}; acceptance probability {chance:.2f}"
        if who == "none":
            title = "drawn from q*, not proposed"
        shown = html.escape(word).replace("\n", "⏎\n")
        spans.append(
            f'<span title="{title}" style="border-bottom:{width}px {line} {COLOURS[party]};'
            f'padding:0 1px">{shown}</span>'
        )
    key = "".join(
        f'<span style="border-bottom:{width}px {line} {COLOURS[party]};margin-right:1.2em">'
        f"{label}</span>"
        for label, party, line, width in (
            ("policy proposed, kept", "policy", "solid", 3),
            ("teacher proposed, kept", "teacher", "dashed", 3),
            ("replaced by a token of q*", "q*", "double", 4),
        )
    )
    return (
        f'<p style="font-size:.9em;line-height:2">{key}</p>'
        f'<p style="white-space:pre-wrap;overflow-wrap:anywhere;line-height:2">{"".join(spans)}</p>'
    )


def _other(parent: str) -> str:
    return PARENTS[parent == "policy"]
