"""What alpha* means: bounds, ends against middle, error exponents, training, rivals."""

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy import ndarray

from qstar.result import Balance
from qstar.theory.hypothesis_testing import Verdicts

from .style import COLOURS, INK, LINES, note, star

LOOKS: tuple[tuple[str, str, Any], ...] = (
    (COLOURS["ink"], "o", "-"),
    ("#56B4E9", "^", (0, (5, 2))),
    ("#E69F00", "s", (0, (1.5, 1.5))),
    (COLOURS["other"], "D", (0, (6, 2, 1.5, 2))),
)
"""Colour, marker and dash of things that are neither the policy nor the teacher nor q*."""


RIVALS = {
    "alpha 0.5": r"$\alpha=\frac{1}{2}$",
    "alpha 0.3": r"$\alpha=0.3$",
    "alpha 0.7": r"$\alpha=0.7$",
    "mixture alpha*": "mixture,\n" + r"weight $\alpha^\star$",
    "best mixture": "best\nmixture",
    "forward centre": "forward\ncentre",
}
"""How the names of a record of `qstar_book.records.baselines` are written."""

CHEAP, DEAR = 0.1, 5.0
"""Shares of C that are drawn lightest and darkest."""


def range_bound(
    ranges: ndarray,
    bound: ndarray,
    random: tuple[ndarray, ndarray],
    extremal: tuple[ndarray, ndarray],
    *,
    ax: Axes,
) -> Axes:
    """alpha* against the range of the log-ratio, between the bound and its mirror image.

    Args:
        ranges: R in nats, where the bound is drawn. Shape (points,).
        bound: B(R) at each. Shape (points,).
        random: (R, alpha*) of random pairs: small dots. Shape (pairs,).
        extremal: (R, alpha*) of pairs made to attain the bound: large circles. Shape (coins,).
        ax: Where to draw; the horizontal axis is logarithmic.
    """
    ax.fill_between(ranges, 1 - bound, bound, color="#F1F1F1", linewidth=0, zorder=0)
    for edge in (bound, 1 - bound):
        ax.plot(ranges, edge, color=COLOURS["ink"], linewidth=1.6)
    cloud: dict[str, Any] = {"markersize": 2.2, "markeredgewidth": 0, "alpha": 0.5}
    ax.plot(*random, "o", color=COLOURS["q*"], rasterized=True, **cloud)
    ax.plot(*extremal, "o", markersize=6, markerfacecolor="white", color=COLOURS["other"], zorder=3)
    ax.axhline(0.5, **LINES["guide"])
    at = int(0.44 * len(ranges))
    note(ax, "$B(R)$", (ranges[at], bound[at]), (-14, 16), clear=False, ha="right")
    note(
        ax,
        "rare coins",
        (extremal[0][-4], extremal[1][-4]),
        (-8, 10),
        clear=False,
        ha="right",
        color=INK["other"],
    )
    ax.set(
        xscale="log",
        xlim=(ranges[0], ranges[-1]),
        ylim=(0, 1),
        xlabel="range $R$ of the log-ratio (nats)",
        ylabel=r"$\alpha^\star$",
    )
    return ax


def ends_and_middle(
    alphas: ndarray,
    log_z: ndarray,
    policy_to_teacher: float,
    teacher_to_policy: float,
    balance: Balance,
    *,
    ax: Axes,
) -> Axes:
    """log Z with the tangents at its ends, whose slopes are the two divergences, and its minimum.

    Args:
        alphas: From 0 to 1. Shape (points,).
        log_z: log Z at each, in nats. Shape (points,).
        policy_to_teacher: KL(policy || teacher), the slope at 1.
        teacher_to_policy: KL(teacher || policy), minus the slope at 0.
        balance: The solved pair.
    """
    chernoff = float(balance.chernoff)
    reach = 1.25 * chernoff
    for end, slope, label, side in (
        (0.0, -teacher_to_policy, r"slope $-$KL($\pi_t$ ‖ $\pi_\theta$)", 1),
        (1.0, policy_to_teacher, r"slope KL($\pi_\theta$ ‖ $\pi_t$)", -1),
    ):
        away = end + side * reach / abs(slope)
        party = "teacher" if end == 0 else "policy"
        ax.plot([end, away], [0, -reach], **LINES[party])
        note(
            ax,
            f"{label}\n= {slope:.3f}".replace("-", "−"),
            (end + 0.28 * (away - end), -0.28 * reach),
            (26 * side, 0),
            ha="left" if side > 0 else "right",
            va="center",
            color=INK[party],
        )
    ax.plot(alphas, log_z, color=COLOURS["ink"], linewidth=2)
    ax.axvline(0.5, **LINES["guide"])
    star(ax, float(balance.alpha), -chernoff)
    note(
        ax,
        rf"$\alpha^\star = {float(balance.alpha):.3f}$",
        (float(balance.alpha), -chernoff),
        (0, -18),
        ha="center",
        color=INK["q*"],
    )
    ax.set(
        xlim=(0, 1),
        ylim=(-1.3 * chernoff, 0.05 * chernoff),
        xlabel=r"$\alpha$",
        ylabel=r"$\log Z(\alpha)$ (nats)",
    )
    return ax


def token_bars(
    tokens: Sequence[str],
    policy: ndarray,
    teacher: ndarray,
    q_star: ndarray,
    overlap: ndarray,
    *,
    ax: Axes,
) -> Axes:
    """Four distributions on a few tokens: the parents, q*, and their normalised overlap.

    Args:
        tokens: A label for each token.
        policy: Probabilities. Shape (vocab,).
        teacher: Probabilities. Shape (vocab,).
        q_star: Probabilities. Shape (vocab,).
        overlap: min(policy, teacher), normalised. Shape (vocab,).
    """
    parts = (
        ("policy", policy, COLOURS["policy"], ""),
        ("teacher", teacher, COLOURS["teacher"], "///"),
        ("$q^\\star$", q_star, COLOURS["q*"], ""),
        ("normalised overlap", overlap, "white", "xxxx"),
    )
    at = np.arange(len(tokens))
    for i, (label, values, colour, hatch) in enumerate(parts):
        edge = COLOURS["ink"] if colour == "white" else "white"
        ax.bar(
            at + 0.2 * (i - 1.5),
            values,
            width=0.19,
            color=colour,
            hatch=hatch,
            edgecolor=edge,
            linewidth=0.6,
            label=label,
        )
    ax.set(xticks=at, ylabel="probability", ylim=(0, 1))
    ax.set_xticklabels(tokens)
    ax.tick_params(axis="x", length=0)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, columnspacing=1.2)
    return ax


def error_exponent(
    draws: Sequence[int],
    log_exact: Sequence[float],
    plain: Mapping[int, Verdicts],
    tilted: Mapping[int, Verdicts],
    chernoff: float,
    *,
    ax: Axes,
) -> Axes:
    """The best judge's error against the number of tokens: exact, simulated, and e^(-nC)/2.

    Args:
        draws: n, increasing.
        log_exact: The log of the exact error at each, in nats.
        plain: n -> a simulated judge; with two standard errors either way.
        tilted: n -> the same with tokens drawn from q*.
        chernoff: C, in nats.
        ax: Where to draw; the vertical axis is logarithmic.
    """
    n = np.asarray(draws, dtype=float)
    ax.plot(n, 0.5 * np.exp(-n * chernoff), **LINES["guide"])
    ax.plot(n, np.exp(np.asarray(log_exact)), color=COLOURS["ink"], linewidth=1.4, label="exact")
    for found, marker, colour, label in (
        (plain, "o", COLOURS["other"], "simulated"),
        (tilted, "D", COLOURS["q*"], "simulated from $q^\\star$"),
    ):
        ax.errorbar(
            list(found),
            [v.error for v in found.values()],
            [2 * v.standard_error for v in found.values()],
            fmt=marker,
            color=colour,
            markersize=5.5,
            markerfacecolor="white" if marker == "D" else colour,
            capsize=2.5,
            linewidth=1.2,
            label=label,
        )
    at = 0.62 * n[-1]
    note(ax, "$e^{-nC}/2$", (at, 0.5 * np.exp(-at * chernoff)), (8, 6), ha="left")
    ax.set(yscale="log", xlabel="tokens drawn, $n$", ylabel="probability of error", xlim=(0, None))
    ax.legend(loc="lower left")
    return ax


def training(
    time: ndarray,
    runs: Mapping[str, tuple[ndarray, ndarray]],
    *,
    fig: Figure,
) -> Figure:
    """alpha* and C of a policy that nears its teacher, one above the other.

    Args:
        time: The progress of the training, from 0; drawn on a linear axis. Shape (steps,).
        runs: Label -> (alpha*, C in nats) along it. Shape (steps,).
    """
    above, below = fig.subplots(2, 1, sharex=True)
    for (label, (alpha, chernoff)), (colour, _, dash) in zip(runs.items(), LOOKS, strict=False):
        above.plot(time, alpha, color=colour, linestyle=dash, linewidth=1.8, label=label)
        below.plot(time, chernoff, color=colour, linestyle=dash, linewidth=1.8)
    above.axhline(0.5, **LINES["guide"])
    above.set(ylabel=r"$\alpha^\star$", ylim=(0, 1))
    above.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(runs))
    below.set(
        yscale="log",
        ylabel="$C$ (nats)",
        xlabel="progress of the training",
        xlim=(time[0], time[-1]),
    )
    fig.align_ylabels()
    return fig


def rivals(
    excess: Mapping[str, Mapping[str, float]], chernoff: Mapping[str, float], *, ax: Axes
) -> Axes:
    """What the rivals of q* cost beyond C, as shares of C: a row a rival, a column a kind of pair.

    The rows are in the order of what they cost on the first kind of pair.

    Args:
        excess: Kind of pair -> rival -> mean excess in nats per token, positive.
        chernoff: Kind of pair -> mean C.
        ax: Where to draw: a table, the stronger the shade the higher the cost.
    """
    first = next(iter(excess.values()))
    names = sorted(first, key=lambda name: first[name])
    shares = np.array([[excess[kind][name] / chernoff[kind] for kind in excess] for name in names])
    shade = np.clip(np.log(shares / CHEAP) / np.log(DEAR / CHEAP), 0, 1)
    heat = LinearSegmentedColormap.from_list("heat", ("#FBF3F7", COLOURS["other"], "#5C2A4A"))
    edges = [np.arange(size + 1) - 0.5 for size in reversed(shares.shape)]
    ax.pcolormesh(*edges, shade, cmap=heat, vmin=0, vmax=1, edgecolors="white", linewidth=2)
    for (row, column), share in np.ndenumerate(shares):
        red, green, blue = np.power(heat(shade[row, column])[:3], 2.2)
        light = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        colour = "black" if light > 0.18 else "white"
        ax.text(column, row, f"{share:.0%}", ha="center", va="center", color=colour)
    heads = ["\n".join([*wrap(kind, 13), rf"$C={mean:.3f}$"]) for kind, mean in chernoff.items()]
    ax.set_xticks(range(len(heads)), heads, linespacing=1.3)
    ax.set_yticks(range(len(names)), [RIVALS.get(name, name) for name in names])
    ax.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    ax.spines[:].set_visible(False)
    ax.set(ylim=(len(names) - 0.5, -0.5), xlabel="cost beyond $C$, as a share of $C$")
    return ax


def adversaries(
    steepness: ndarray,
    ratios: Mapping[str, ndarray],
    *,
    ax: Axes,
) -> Axes:
    """The larger divergence of some distributions, in units of C, as pairs become more extreme.

    Args:
        steepness: How extreme, in nats. Shape (pairs,).
        ratios: Name -> max KL(q || parent) / C; 1 is q*. Shape (pairs,).
        ax: Where to draw; both axes are logarithmic.
    """
    ax.axhline(1, **LINES["q*"])
    ax.axhline(2, **LINES["guide"])
    for (label, values), (colour, marker, dash) in zip(ratios.items(), LOOKS, strict=False):
        ax.plot(
            steepness,
            values,
            color=colour,
            marker=marker,
            markersize=4,
            markevery=4,
            linestyle=dash,
            linewidth=1.6,
            label=label,
        )
    look = {"ha": "right", "va": "top", "color": INK["q*"]}
    note(ax, "$q^\\star$", (steepness[-1], 1), (-4, -4), clear=False, **look)
    ax.set(
        xscale="log",
        yscale="log",
        xlim=(steepness[0], steepness[-1]),
        ylim=(0.7, None),
        xlabel="how extreme the pair is, $M$ (nats)",
        ylabel="larger divergence / $C$",
    )
    powers = 2 ** np.arange(1 + int(np.log2(max(np.max(v) for v in ratios.values()))))
    ax.set_yticks(powers, labels=[str(power) for power in powers])
    ax.minorticks_off()
    ax.legend(loc="upper left")
    return ax
