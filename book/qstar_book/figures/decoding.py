"""Decoding with drafts: one round, what it costs, what it saves, and who proposed each token."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from numpy import ndarray

from .style import COLOURS, INK, LINES, halo

PARENTS = ("policy", "teacher")
DASHES = {"policy": "-", "teacher": (0, (4.5, 2.2))}


def one_round(steps: Sequence[tuple[str, Sequence[tuple[str, str]], str]], *, ax: Axes) -> Axes:
    """Forwards one below the other: which slots of its cache a parent has, reads and takes back.

    Args:
        steps: For each forward the parent that makes it, its slots from left to right as (word,
            kind), and what comes of it. Kinds: "cached", "read" (in this forward), "draft" (a
            proposal, read in this forward), "masked" (read, and taken back), "next" (what the law
            after the last slot gives: a proposal).
        ax: Where to draw.
    """
    looks: dict[str, dict[str, Any]] = {
        "cached": {"facecolor": "#ECECEC", "edgecolor": "#AAAAAA"},
        "read": {"facecolor": "white", "edgecolor": COLOURS["ink"]},
        "draft": {"facecolor": "white", "edgecolor": COLOURS["ink"]},
        "masked": {"facecolor": "white", "edgecolor": COLOURS["quiet"], "hatch": "////"},
        "next": {"facecolor": "none", "edgecolor": COLOURS["ink"]},
    }
    widest = max(len(slots) for _, slots, _ in steps)
    for row, (parent, slots, note) in enumerate(steps):
        y = -1.55 * row
        colour = COLOURS[parent]
        ax.text(-0.15, y + 0.4, parent, ha="right", va="center", color=INK[parent], weight="bold")
        for place, (word, kind) in enumerate(slots):
            look = looks[kind] | {"linewidth": 1.2}
            if kind in ("draft", "next"):
                proposer = parent if kind == "next" else _other(parent)
                look |= {
                    "edgecolor": COLOURS[proposer],
                    "linestyle": DASHES[proposer],
                    "linewidth": 2.2,
                }
            ax.add_patch(Rectangle((place + 0.04, y), 0.92, 0.8, **look))
            shade = COLOURS["quiet"] if kind in ("cached", "masked") else COLOURS["ink"]
            label = ax.text(
                place + 0.5, y + 0.4, word, ha="center", va="center", fontsize=10.5, color=shade
            )
            if kind == "masked":
                halo(label)
        first = next(i for i, (_, kind) in enumerate(slots) if kind in ("read", "draft"))
        last = max(i for i, (_, kind) in enumerate(slots) if kind in ("read", "draft", "masked"))
        ax.plot([first + 0.06, last + 0.94], [y + 0.9] * 2, color=colour, linewidth=2.4)
        ax.text(0.04, y - 0.12, note, va="top", fontsize=10.5).set_in_layout(False)
    handles = [
        Patch(**looks["cached"], label="in the cache"),
        Patch(**looks["read"], label="emitted, read now"),
        Patch(facecolor="none", edgecolor=COLOURS["policy"], linewidth=2, label="proposal"),
        Patch(**looks["masked"], label="rejected: masked"),
    ]
    ax.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=4,
        fontsize=10.5,
        handlelength=1.3,
        handletextpad=0.5,
        columnspacing=1.0,
    )
    ax.set(xlim=(-1.35, widest + 0.1), ylim=(-1.55 * (len(steps) - 1) - 0.45, 1.0))
    ax.axis("off")
    return ax


def width_costs(curves: Mapping[str, tuple[ndarray, ndarray]], *, ax: Axes) -> Axes:
    """v(w): what a forward over w positions takes, in forwards over one.

    Args:
        curves: Name -> (widths, times over that of width 1). Shape (widths,).
        ax: Where to draw.
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
        ax: Where to draw.
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
        counted = f"{name}, and as recorded" if name in measured else name
        handles.append(Line2D([], [], **line, **(mark if name in measured else {}), label=counted))
    ax.axhline(2, color=COLOURS["ink"], linewidth=1.2)
    halo(ax.text(0.01, 2.04, "plain", va="bottom"))
    ax.axhline(1, **LINES["guide"])
    ax.set(
        xlabel="acceptance probability of a draft, $a$",
        ylabel="forwards per token",
        xlim=(0, 1),
        ylim=(0, 4),
    )
    ax.legend(handles=handles, loc="upper right", fontsize=10.5, handlelength=3.2)
    return ax


def speed_ratios(
    groups: Mapping[str, Mapping[str, tuple[float, float, float]]], *, ax: Axes
) -> Axes:
    """How many times faster than plain decoding, with intervals, way by way.

    Args:
        groups: Heading -> way -> (median, low, high).
        ax: Where to draw; the line at 1 is plain decoding with two calls a token.
    """
    y, ticks, labels = 0.0, [], []
    for heading, rows in groups.items():
        place: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "va": "center"}
        halo(ax.text(0.01, y, heading, weight="bold", fontsize=10.5, zorder=3, **place))
        y += 1
        for way, (median, low, high) in rows.items():
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
            ticks.append(y)
            labels.append(way)
            y += 1
        y += 0.4
    ax.axvline(1, color=COLOURS["ink"], linewidth=1.0, zorder=1)
    ax.set_yticks(ticks, labels)
    ax.set(xlabel="times faster than plain decoding", ylim=(y - 0.6, -0.6))
    ax.set_xlim(min(0.5, ax.get_xlim()[0]), None)
    ax.tick_params(axis="y", length=0)
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
