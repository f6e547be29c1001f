"""The one style sheet, and the marks that every figure shares.

Policy is always a solid blue line, teacher a dashed vermilion one, q* a heavy green one: told apart
by colour-blind readers and in grey.

    plt.rcParams.update(figures.STYLE)      # once, in a notebook's imports cell
    with figures.in_style(): ...               # elsewhere
"""

from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.rcsetup import cycler
from matplotlib.text import Text

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
    "figure.facecolor": "none",  # the page's, in the light and in the dark
    "axes.facecolor": "none",
    "figure.constrained_layout.use": True,
    "savefig.dpi": 170,  # of what is drawn as pixels within an SVG: clouds of points
    "savefig.facecolor": "none",
    "svg.hashsalt": "qstar",  # the same names within a file in every run
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with Matplotlib: the same on every machine
    "mathtext.fontset": "dejavusans",
    "font.size": 10.5,
    "axes.labelsize": 10.5,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "legend.fontsize": 10.5,
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


def in_style() -> AbstractContextManager[None]:
    """The style sheet as a context: figures made inside look like the book's."""
    return mpl.rc_context(STYLE)


def halo(text: Text) -> Text:
    """Let a label stay legible where a line passes behind it."""
    text.set_path_effects([withStroke(linewidth=3, foreground="white")])
    return text


def note(
    ax: Axes,
    text: str,
    at: tuple[Any, Any],
    shift: tuple[float, float],
    *,
    clear: bool = True,
    **how: Any,
) -> Text:
    """A label beside a place, `shift` points from it; `clear` where a line may pass behind it."""
    label = ax.annotate(text, at, shift, textcoords="offset points", **how)
    return halo(label) if clear else label


def star(ax: Axes, x: float, y: float, *, size: float = 15) -> Line2D:
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


def role_legend(fig: Figure) -> None:
    """One legend above the whole figure, for the three parties."""
    names = {"policy": "policy", "teacher": "teacher", "q*": r"$q^\star$"}
    handles = [Line2D([], [], **LINES[role], label=name) for role, name in names.items()]
    fig.legend(handles=handles, loc="outside upper center", ncols=len(names))
