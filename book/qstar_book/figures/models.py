"""Two language models: what a decoder sees, token by token."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from .style import COLOURS, LINES, halo, note

PARENTS = ("policy", "teacher")
TYPICAL = 0.3, 0.7
"""The range of alpha that is shaded."""


def decode_trace(
    trace: Any,
    words: Sequence[str] = (),
    *,
    fig: Figure,
    most: int | None = None,
) -> Figure:
    """A decode, token by token: alpha*, the divergences around q*, and both acceptances.

    The token that is accepted least is named.

    Args:
        trace: The `qstar.decoding.diagnostics.Comparison` of one sequence, on the CPU.
        words: Its tokens as text, one a position; numbers stand for them if there are none.
        fig: Where to draw, in three panels that share the axis of tokens.
        most: How many tokens to show, from the first; None for all.
    """
    top, middle, bottom = fig.subplots(3, 1, sharex=True, height_ratios=(1, 1.25, 1))
    at = np.arange(1, len(trace.alpha) + 1)[:most]
    words = words[:most]
    dots: dict[str, Any] = {"marker": "o", "markersize": 3}
    thin = {party: LINES[party] | {"linewidth": 1.3} for party in ("policy", "teacher", "q*")}
    top.axhspan(*TYPICAL, color="#EFEFEF", linewidth=0, zorder=0)
    top.axhline(0.5, **LINES["guide"], zorder=1)
    top.plot(at, trace.balance.alpha[:most], **thin["q*"], **dots)
    top.set(ylabel=r"$\alpha^\star$", ylim=(0, 1), yticks=(0, *TYPICAL, 1))
    curves = {
        "policy ‖ teacher": (trace.policy_to_teacher, "policy"),
        "teacher ‖ policy": (trace.teacher_to_policy, "teacher"),
        r"$q^\star$ ‖ either ($C$)": (trace.balance.chernoff, "q*"),
    }
    for label, (values, party) in curves.items():
        middle.plot(
            at, values[:most], **thin[party], **(dots if party == "q*" else {}), label=label
        )
    middle.set(ylabel="KL (nats)", yscale="log")
    middle.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, columnspacing=1.1)
    accepts = {who: np.asarray(getattr(trace, f"accept_{who}"))[:most] for who in PARENTS}
    for who, values in accepts.items():
        bottom.plot(at, values, **thin[who], label=f"draft: {who}")
    bottom.set(xlabel="new token", ylabel="acceptance\nprobability", ylim=(None, 1.005))
    bottom.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    bottom.set_xlim(0.5, len(at) + 0.5)
    if words:
        shown = [word.strip().replace("$", r"\$") or "␣" for word in words]
        bottom.set_xticks(at, shown, rotation=90)
        bottom.set_xlabel("new token, as drawn")
        lower = np.minimum(*accepts.values())
        least, right = int(lower.argmin()), lower.argmin() > len(at) / 2
        beside = {"ha": "right" if right else "left", "va": "center"}
        place = at[least] + (-0.4 if right else 0.4), lower[least]
        halo(bottom.text(*place, f"“{shown[least]}”: {lower[least]:.2f}", **beside))
    fig.align_ylabels()
    return fig


def spoken(
    words: Sequence[str],
    proposers: Sequence[str],
    kept: Sequence[bool],
    alpha: Sequence[float],
    chernoff: Sequence[float],
    *,
    fig: Figure,
) -> Figure:
    """A decoded text: of each token alpha* and the Chernoff information, by who proposed it.

    Args:
        words: The tokens as text.
        proposers: Of each token "policy", "teacher" or "none".
        kept: Whether the proposal was kept; else the token was drawn in its place.
        alpha: alpha*, where it was drawn.
        chernoff: The Chernoff information there, in nats.
        fig: Where to draw, in two panels.
    """
    top, bottom = fig.subplots(2, 1, sharex=True)
    at = np.arange(1, len(words) + 1)
    party = [who if k and who in LINES else "q*" for who, k in zip(proposers, kept, strict=True)]
    colours, markers = [COLOURS[who] for who in party], {"policy": "o", "teacher": "s", "q*": "D"}
    labels = {"policy": "policy, kept", "teacher": "teacher, kept", "q*": "replaced"}
    top.axhline(0.5, **LINES["guide"])
    for who, marker in markers.items():
        these = [i for i, name in enumerate(party) if name == who]
        where, values = at[these], np.asarray(alpha)[these]
        top.plot(where, values, marker, color=COLOURS[who], markersize=6, label=labels[who])
    top.set(ylabel=r"$\alpha^\star$", ylim=(0, 1))
    top.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    bottom.bar(at, chernoff, color=colours, width=0.7)
    bottom.set(ylabel="$C$ (nats)")
    shown = [word.strip().replace("$", r"\$") or "␣" for word in words]
    bottom.set_xticks(at, shown, rotation=90, fontsize=8, family="DejaVu Sans Mono")
    fig.align_ylabels()
    return fig


def alpha_by_kind(
    alphas: Mapping[str, ArrayLike],
    *,
    ax: Axes,
) -> Axes:
    """alpha* at every position, one row of dots for each kind of pair, with the row's median.

    Args:
        alphas: Kind of pair -> alpha* at each of its positions. Shape (positions,).
    """
    ax.axvspan(*TYPICAL, color="#EFEFEF", linewidth=0, zorder=0)
    ax.axvline(0.5, **LINES["guide"], zorder=1)
    for row, values in enumerate(alphas.values()):
        alpha = np.asarray(values)
        # A fixed sequence that fills the row evenly: it only keeps the dots apart.
        height = row + 0.6 * ((np.arange(len(alpha)) * 0.618034) % 1 - 0.5)
        ax.plot(
            alpha, height, "o", markersize=2.6, markeredgewidth=0, alpha=0.55, color=COLOURS["q*"]
        )
        ax.plot([np.median(alpha)] * 2, [row - 0.38, row + 0.38], color=COLOURS["ink"], zorder=3)
    ax.set(
        xlabel=r"$\alpha^\star$  (0: teacher, 1: policy)",
        xlim=(0, 1),
        ylim=(len(alphas) - 0.45, -0.55),
        yticks=range(len(alphas)),
    )
    ax.set_xticks((0, TYPICAL[0], 0.5, TYPICAL[1], 1))
    ax.set_yticklabels([kind.replace(" and ", "\nand ") for kind in alphas])
    ax.tick_params(axis="y", length=0)
    return ax


def solving_gain(
    pairs: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    ax: Axes,
) -> Axes:
    """What solving for alpha* buys over alpha = 1/2 at each position, against C.

    Args:
        pairs: Kind of pair -> (C, KL(q* || q_1/2)) at each of its positions, in nats. Shape
            (positions,).
        ax: Where to draw; guides mark a hundredth and a tenth of C.
    """
    # Not the hues of the three parties: a kind of pair is none of them.
    looks = ((COLOURS["ink"], "o"), ("#56B4E9", "^"), ("#E69F00", "s"), (COLOURS["other"], "D"))
    for (kind, (chernoff, gain)), (colour, marker) in zip(pairs.items(), looks, strict=False):
        look: dict[str, Any] = {"marker": marker, "color": colour, "markersize": 3.6}
        look |= {"linestyle": "none", "markeredgewidth": 0, "alpha": 0.6}
        ax.plot(chernoff, gain, **look, label=kind)
    ax.set(
        xlabel="$C$ (nats)",
        ylabel=r"KL($q^\star$ ‖ $q_{1/2}$) (nats)",
        xscale="log",
        yscale="log",
        ylim=(1e-9, 1),
    )
    ends = np.array(ax.get_xlim())
    for share, label in ((0.1, "10% of $C$"), (0.01, "1% of $C$")):
        ax.plot(ends, share * ends, **LINES["guide"], zorder=1)
        at = (ends[1], share * ends[1])
        note(ax, label, at, (-2, -12), ha="right", va="top")
    ax.set_xlim(*ends)
    legend = ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, handletextpad=0.3)
    for handle in legend.legend_handles:
        if isinstance(handle, Line2D):
            handle.set(markersize=6, alpha=1)
    return ax
