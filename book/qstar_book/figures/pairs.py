"""Pairs of language models: where two real sets of weights part."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from .style import COLOURS, INK, LINES

# Not the hues of the three parties: a kind of question is none of them.
_MARKS = ((COLOURS["ink"], "o"), ("#56B4E9", "^"), ("#E69F00", "s"), (COLOURS["other"], "D"))


def divergence_by_question(
    pairs: Mapping[str, Mapping[str, ArrayLike]],
    *,
    ax: Axes,
) -> Axes:
    """C of every answer, a row for each pair and in it a line for each kind of question.

    Args:
        pairs: Pair -> kind of question -> the mean C of each answer, nats. Shape (answers,).
    """
    kinds = list(dict.fromkeys(kind for found in pairs.values() for kind in found))
    for row, found in enumerate(pairs.values()):
        for kind, values in found.items():
            colour, marker = _MARKS[kinds.index(kind)]
            height = row + 0.22 * (kinds.index(kind) - (len(kinds) - 1) / 2)
            each = np.asarray(values)
            look: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": "none"}
            label = kind if row == 0 else None
            ax.plot(each, [height] * len(each), **look, markersize=5, alpha=0.8, label=label)
            middle = float(np.mean(each))
            ax.plot([middle] * 2, [height - 0.1, height + 0.1], color=colour, linewidth=1.6)
    ax.set(xscale="log", xlabel="$C$ of an answer, mean over its tokens (nats)")
    ax.set(ylim=(len(pairs) - 0.45, -0.55), yticks=range(len(pairs)))
    ax.set_yticklabels(list(pairs))
    ax.tick_params(axis="y", length=0)
    ax.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=len(kinds), handletextpad=0.2)
    return ax


def concentration(
    pairs: Mapping[str, ArrayLike],
    *,
    ax: Axes,
    synthetic: Sequence[str] = (),
) -> Axes:
    """How much of the sum of C the positions with the largest C hold.

    Args:
        pairs: Pair -> C at each position, nats. Shape (positions,).
        synthetic: Which of them to dash.
    """
    for (pair, values), (colour, _) in zip(pairs.items(), _MARKS, strict=False):
        largest = np.sort(np.asarray(values))[::-1]
        share = np.concatenate([[0.0], np.cumsum(largest) / largest.sum()])
        at = np.linspace(0, 1, len(share))
        style: Any = (0, (4, 2)) if pair in synthetic else "-"
        ax.plot(at, share, color=colour, linestyle=style, linewidth=1.8, label=pair)
    ax.plot([0, 1], [0, 1], **LINES["guide"])
    ax.set(
        xlabel="share of the positions, largest $C$ first",
        ylabel="share of the sum of $C$",
        xlim=(0, 1),
        ylim=(0, 1.01),
    )
    ax.legend(loc="lower right")
    return ax


def acceptances(
    pairs: Mapping[str, Mapping[str, tuple[float, float, float]]],
    *,
    ax: Axes,
) -> Axes:
    """Mean acceptance probabilities with their intervals, a row for each pair.

    Args:
        pairs: Pair -> who proposes ("policy", "teacher" or "coin") -> (mean, low, high).
    """
    looks = {"policy": (INK["policy"], "o"), "teacher": (INK["teacher"], "s")}
    looks["coin"] = (INK["q*"], "D")
    for row, found in enumerate(pairs.values()):
        for place, (who, (mean, low, high)) in enumerate(found.items()):
            colour, marker = looks[who]
            height = row + 0.22 * (place - 1)
            label = who if row == 0 else None
            ax.plot([low, high], [height] * 2, color=colour, linewidth=1.6)
            ax.plot(mean, height, color=colour, marker=marker, ls="none", ms=5.5, label=label)
    ax.set(xlabel="probability that a draft is kept", ylim=(len(pairs) - 0.45, -0.55))
    ax.set_yticks(range(len(pairs)), list(pairs))
    ax.tick_params(axis="y", length=0)
    ax.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, handletextpad=0.2)
    return ax
