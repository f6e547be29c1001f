"""Whole sequences: two means of two distributions, and what it costs to draw from either."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy import ndarray

from .style import COLOURS, INK, LINES, note


def two_means(
    names: Sequence[str],
    token_level: ndarray,
    sequence_level: ndarray,
    *,
    ax: Axes,
) -> Axes:
    """The probability of each sequence when drawn token by token, and as a whole.

    Args:
        names: What to call each sequence.
        token_level: Its probability under the token-level mean. Shape (sequences,).
        sequence_level: Its probability under the sequence-level mean. Shape (sequences,).
    """
    at = np.arange(len(names))
    look: dict[str, Any] = {"width": 0.36, "edgecolor": COLOURS["other"], "linewidth": 1.0}
    ax.bar(at - 0.2, token_level, color="#F3DCE9", hatch="////", **look, label="token by token")
    ax.bar(at + 0.2, sequence_level, width=0.36, color=COLOURS["q*"], label="as a whole")
    ax.set_xticks(at, list(names))
    ax.set(xlabel="sequence", ylabel="probability")
    ax.legend(loc="upper left")
    return ax


def gap_growth(
    lengths: ndarray,
    gaps: ndarray,
    slope: float,
    *,
    ax: Axes,
) -> Axes:
    """How far the token-level mean is from the sequence-level one, against the length.

    Args:
        lengths: Numbers of tokens, increasing. Shape (lengths,).
        gaps: KL(token level || sequence level), in nats. Shape (lengths,).
        slope: What the gap grows by, per token, in the limit.
    """
    limit = gaps[-1] + slope * (lengths - lengths[-1])
    ax.plot(lengths, limit, **LINES["guide"])
    ax.plot(lengths, gaps, "o-", color=INK["other"], markersize=3.5, linewidth=1.2)
    middle = 2 * len(lengths) // 5
    note(
        ax,
        "slope: difference of the two rates",
        (lengths[middle], limit[middle]),
        (10, -16),
        color=COLOURS["quiet"],
    )
    ax.set(xlabel="length (tokens)", ylabel="KL from token by token\nto as a whole (nats)")
    ax.set_xlim(0, None)
    ax.set_ylim(0, None)
    return ax


def useful_share(
    lengths: ndarray,
    rejection: ndarray,
    importance: ndarray,
    smc: tuple[ndarray, ndarray],
    *,
    ax: Axes,
) -> Axes:
    """The share of draws that is of use, against the length, for three exact ways to draw.

    Args:
        lengths: Numbers of tokens, increasing. Shape (lengths,).
        rejection: The chance that a whole sequence is kept. Shape (lengths,).
        importance: The effective share of weighted token-level draws. Shape (lengths,).
        smc: Lengths, and the effective share of the particles as measured there. Shape (measured,).
        ax: Where to draw; the vertical axis is logarithmic.
    """
    ax.plot(lengths, rejection, color=COLOURS["ink"], linestyle=(0, (4.5, 2.2)), label="rejection")
    ax.plot(lengths, importance, **LINES["other"], label="weighted, never resampled")
    ax.plot(*smc, "s-", color=COLOURS["q*"], markersize=5.5, linewidth=2, label="SMC, resampled")
    ax.set(xlabel="length (tokens)", ylabel="useful share of the draws", yscale="log")
    ax.set_xlim(0, None)
    ax.legend(loc="lower left")
    return ax


def answer_divergences(
    sums: ndarray,
    estimates: Mapping[str, tuple[ndarray, float, float]],
    *,
    ax: Axes,
) -> Axes:
    """What answers cost token by token, above what the distributions of whole answers cost.

    Args:
        sums: The sum of the positions' Chernoff informations of each answer, in nats. Shape
            (answers,).
        estimates: How C of whole answers was estimated -> single runs (or none), the pooled
            estimate and its standard error, in nats. Shape (runs,).
        ax: Where to draw; bars are two standard errors.
    """
    rows = {r"$\sum_t C_t$, token by token": (sums, float(sums.mean()), _error(sums)), **estimates}
    for at, (name, (single, pooled, error)) in enumerate(rows.items()):
        colour = INK["other"] if at == 0 else INK["q*"]
        height = at + 0.36 * ((np.arange(len(single)) * 0.618034) % 1 - 0.5)
        ax.plot(single, height, "o", markersize=3, markeredgewidth=0, alpha=0.35, color=colour)
        ax.errorbar(
            [pooled], [at], xerr=2 * error, fmt="D", color=colour, markersize=6, capsize=4,
            markeredgecolor="white", zorder=5, label=name,
        )  # fmt: skip
    ax.set(xlabel="nats per answer", ylim=(len(rows) - 0.5, -0.5), xlim=(0, None))
    ax.set_yticks(range(len(rows)), list(rows))
    ax.tick_params(axis="y", length=0)
    return ax


def _error(values: ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))
