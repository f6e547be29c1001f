"""Every figure of the book: one function each, from a record to an axes, and the one style sheet.

A figure function computes nothing that a claim rests on, opens no file and shows nothing. It takes
values and the axes (or, with several panels, the figure) to draw on, and returns it. Policy is
always a solid blue line, teacher a dashed vermilion one, q* a heavy green one: told apart by
colour-blind readers and in grey. There are no titles: the caption claims.

    plt.rcParams.update(figures.STYLE)      # once, in a notebook's imports cell
    with figures.style(): ...               # elsewhere
"""

from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.rcsetup import cycler
from matplotlib.text import Text
from numpy import ndarray
from numpy.typing import ArrayLike

from .result import Balance

COLOURS = {
    "policy": "#0072B2",
    "teacher": "#D55E00",
    "q*": "#009E73",
    "other": "#CC79A7",
    "ink": "#222222",
    "quiet": "#767676",
}
"""Okabe and Ito's colour-blind safe hues; `other` is a fourth party, never one of the three."""

INK = {"policy": "#005A8D", "teacher": "#A34700", "q*": "#00694B", "other": "#8A4A72"}
"""The same hues, dark enough to be read as text on white (contrast above 4.5)."""

LINES: dict[str, dict[str, Any]] = {
    "policy": {"color": COLOURS["policy"], "linestyle": "-", "linewidth": 1.8},
    "teacher": {"color": COLOURS["teacher"], "linestyle": (0, (4.5, 2.2)), "linewidth": 1.8},
    "q*": {"color": COLOURS["q*"], "linestyle": "-", "linewidth": 3.2},
    "other": {"color": COLOURS["other"], "linestyle": (0, (1.2, 1.4)), "linewidth": 2.2},
    "guide": {"color": COLOURS["quiet"], "linestyle": (0, (1, 2)), "linewidth": 1.0},
}
"""How each party is drawn as a line: pass as `**LINES["policy"]`."""

FILL = 0.13
"""Opacity of a filled region of one party."""

WIDTH = 5.8
"""Width of a figure in inches: the book's text column, at which 10 point text reads as text."""

STYLE: dict[Any, Any] = {
    "figure.figsize": (WIDTH, 3.5),
    "figure.dpi": 170,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "savefig.dpi": 170,
    "savefig.facecolor": "white",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with Matplotlib: the same on every machine
    "mathtext.fontset": "dejavusans",
    "font.size": 10.5,
    "axes.labelsize": 10.5,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.edgecolor": "#555555",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.labelcolor": COLOURS["ink"],
    "ytick.labelcolor": COLOURS["ink"],
    "lines.solid_capstyle": "round",
    "axes.prop_cycle": cycler(
        color=[COLOURS[name] for name in ("policy", "teacher", "q*", "other", "quiet")]
    ),
}
"""The style sheet of the book, as Matplotlib settings."""


def style() -> AbstractContextManager[None]:
    """The style sheet as a context: figures made inside look like the book's."""
    return mpl.rc_context(STYLE)


def _halo(text: Text) -> Text:
    """Let a label stay legible where a line passes behind it."""
    text.set_path_effects([withStroke(linewidth=3, foreground="white")])
    return text


def _star(ax: Axes, x: float, y: float, *, size: float = 15) -> Line2D:
    """The mark of q* everywhere: a green star with a white rim."""
    (star,) = ax.plot(
        [x],
        [y],
        marker="*",
        markersize=size,
        color=COLOURS["q*"],
        markeredgecolor="white",
        markeredgewidth=0.9,
        linestyle="none",
        zorder=6,
        clip_on=False,
    )
    return star


def kl_crossing(
    alphas: Float[ndarray, " points"],
    kl_to_policy: Float[ndarray, " points"],
    kl_to_teacher: Float[ndarray, " points"],
    balance: Balance,
    *,
    ax: Axes,
    minus_log_partition: Float[ArrayLike, " points"] | None = None,
) -> Axes:
    """The two KL divergences from q_alpha to its parents, crossing at alpha*, at height C.

    Args:
        alphas: The exponents on the policy, increasing.
        kl_to_policy: KL(q_alpha || policy) at each, in nats.
        kl_to_teacher: KL(q_alpha || teacher) at each, in nats.
        balance: The solved pair: where to put the star, and what to write beside it.
        ax: Where to draw.
        minus_log_partition: -log Z at each alpha, in nats: drawn too if given. It peaks where the
            curves cross.
    """
    alpha, chernoff = float(balance.alpha), float(balance.chernoff)
    top = 1.06 * max(float(max(kl_to_policy)), float(max(kl_to_teacher)))
    ax.plot(alphas, kl_to_policy, **LINES["policy"], label=r"KL($q_\alpha$ ‖ policy)")
    ax.plot(alphas, kl_to_teacher, **LINES["teacher"], label=r"KL($q_\alpha$ ‖ teacher)")
    if minus_log_partition is not None:
        curve = LINES["q*"] | {"linewidth": 1.6, "linestyle": (0, (6, 1.5, 1, 1.5))}
        ax.plot(alphas, minus_log_partition, **curve, label=r"$-\log Z(\alpha)$")
    ax.plot([alpha, alpha, 0], [0, chernoff, chernoff], **LINES["guide"], zorder=1)
    _star(ax, alpha, chernoff)
    _halo(
        ax.annotate(
            rf"$\alpha^* = {alpha:.3f}$" + "\n" + rf"$C = {chernoff:.3f}$ nats",
            (alpha, chernoff),
            xytext=(0, 24),
            textcoords="offset points",
            ha="center",
            va="bottom",
            color=INK["q*"],
            linespacing=1.35,
        )
    )
    ax.legend(loc="upper center", handletextpad=0.6)
    ax.set(
        xlabel=r"$\alpha$  (0: teacher, 1: policy)",
        ylabel="divergence (nats)",
        xlim=(0, 1),
        ylim=(0, top),
    )
    return ax


# Chapters 1 and 2: the condition and its solution.


def minimax(
    strayed: Float[ndarray, " challengers"],
    worse: Float[ndarray, " challengers"],
    balance: Balance,
    *,
    ax: Axes,
) -> Axes:
    """The worse of the two divergences of many distributions, above the bound C + KL(q || q*).

    Args:
        strayed: KL(q || q*) of each distribution, in nats.
        worse: max(KL(q || policy), KL(q || teacher)) of each, in nats.
        balance: The solved pair, for C.
        ax: Where to draw.
    """
    chernoff, reach = float(balance.chernoff), float(np.quantile(strayed, 0.98))
    line = np.array([0, reach])
    ax.fill_between(line, chernoff + line, color=COLOURS["q*"], alpha=FILL / 2, linewidth=0)
    ax.plot(strayed, worse, "o", ms=3, mew=0, color=COLOURS["quiet"], alpha=0.5)
    ax.plot(line, chernoff + line, **LINES["q*"])
    _star(ax, 0, chernoff)
    ax.annotate(
        rf"$q^*$, at $C = {chernoff:.3f}$",
        (0, chernoff),
        xytext=(14, -6),
        textcoords="offset points",
        va="center",
        color=INK["q*"],
    )
    ax.text(
        0.97 * reach,
        0.45 * (chernoff + reach),
        r"below $C+$KL($q$ ‖ $q^*$):" + "\nno distribution",
        ha="right",
        va="center",
        color=INK["q*"],
        linespacing=1.35,
    )
    ax.set(
        xlabel=r"KL($q$ ‖ $q^*$) (nats)",
        ylabel="worse of the two\ndivergences (nats)",
        xlim=(0, reach),
        ylim=(0, float(np.max(worse[strayed <= reach]))),
    )
    return ax
