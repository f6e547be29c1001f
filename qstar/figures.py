"""Every figure of the book: one function each, from a record to an axes, and the one style sheet.

A figure function computes nothing that a claim rests on, opens no file and shows nothing. It takes
values and the axes (or, with several panels, the figure) to draw on, and returns it. Policy is
always a solid blue line, teacher a dashed vermilion one, q* a heavy green one: told apart by
colour-blind readers and in grey. There are no titles: the caption claims.

    plt.rcParams.update(figures.STYLE)      # once, in a notebook's imports cell
    with figures.style(): ...               # elsewhere
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.rcsetup import cycler
from matplotlib.text import Text
from numpy import ndarray
from numpy.typing import ArrayLike

from .gaussian import Gaussian, SolvedPair
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


def convergence(
    errors: Mapping[str, Float[ndarray, "pairs passes"]], *, floor: float, ax: Axes
) -> Axes:
    """The error of alpha after each pass over the vocabulary, one line per pair and method.

    Args:
        errors: Method name -> |alpha - alpha*| before each pass, one row per pair.
        floor: The precision reached at the end; smaller errors are drawn on it.
        ax: Where to draw; the vertical axis is logarithmic.
    """
    looks: dict[str, dict[str, Any]] = {
        "bisection": {"color": COLOURS["quiet"], "marker": "s", "linestyle": ":"},
        "Newton": {"color": COLOURS["policy"], "marker": "o", "linestyle": "--"},
        "Halley": {"color": COLOURS["q*"], "marker": "D", "linestyle": "-"},
    }
    for method, rows in errors.items():
        lines = ax.plot(np.maximum(rows, floor).T, ms=4.5, lw=1.4, **looks[method])
        lines[0].set_label(method)
    ax.axhline(floor, **LINES["guide"])
    ax.set(
        yscale="log",
        xlabel="passes over the vocabulary",
        ylabel=r"error of $\alpha$",
        ylim=(floor / 4, 1),
    )
    ax.legend(loc="center right")
    return ax


def log_partition_panels(
    panels: Mapping[str, tuple[Float[ndarray, " points"], Float[ndarray, " points"], Balance]],
    *,
    fig: Figure,
) -> Figure:
    """log Z(alpha) of several pairs, side by side, each with a star where the solver put alpha*.

    Args:
        panels: Panel label -> (alphas, log Z at each, the solved pair).
        fig: Where to draw; one row of panels that share the vertical axis.
    """
    axes = fig.subplots(2, 2, sharex=True, sharey=True).ravel()
    for ax, (label, (alphas, log_z, balance)) in zip(axes, panels.items(), strict=True):
        ax.plot(alphas, log_z, color=COLOURS["ink"], linewidth=1.8)
        ax.axhline(0, **LINES["guide"])
        _star(ax, float(balance.alpha), -float(balance.chernoff))
        _halo(ax.text(0.5, 0.13, label, ha="center", family="monospace", fontsize=9.5))
    lowest = min(float(np.min(log_z)) for _, log_z, _ in panels.values())
    for ax in axes:
        ax.set(xlim=(0, 1), ylim=(1.2 * lowest, 0.3))
    for ax in axes[2:]:
        ax.set_xlabel(r"$\alpha$")
    for ax in axes[::2]:
        ax.set_ylabel(r"$\log Z(\alpha)$ (nats)")
    return fig


def alpha_error(
    offsets: Float[ndarray, " points"],
    total_variations: Mapping[str, Float[ndarray, " points"]],
    estimates: Mapping[str, Float[ndarray, " points"]],
    *,
    ax: Axes,
) -> Axes:
    """How far q_alpha is from q* when alpha is off: total variation against the error of alpha.

    Args:
        offsets: |alpha - alpha*|.
        total_variations: Pair label -> TV(q_alpha, q*) at each offset (markers).
        estimates: Pair label -> its first-order estimate (lines).
        ax: Where to draw; both axes are logarithmic.
    """
    looks = [("o", COLOURS["policy"]), ("s", COLOURS["teacher"]), ("D", COLOURS["q*"])]
    for (label, values), (marker, colour) in zip(total_variations.items(), looks, strict=True):
        ax.plot(offsets, estimates[label], color=colour, linewidth=1.2)
        ax.plot(offsets, values, marker, color=colour, markersize=5, linestyle="none", label=label)
    ax.set(
        xscale="log",
        yscale="log",
        xlabel=r"error of $\alpha$",
        ylabel=r"TV($q_\alpha$, $q^*$)",
    )
    ax.legend(loc="lower right", title="pair", alignment="left")
    return ax


def passes_histogram(counts: Mapping[str, Int[ndarray, " rows"]], *, ax: Axes) -> Axes:
    """How many passes the solver spent on each row of several sets of rows.

    Args:
        counts: Set label -> passes per row.
        ax: Where to draw; the vertical axis is the share of each set's rows.
    """
    looks = [(COLOURS["q*"], None), (COLOURS["other"], "////"), (COLOURS["policy"], "....")]
    most = max(int(np.max(passes)) for passes in counts.values())
    width = 0.8 / len(counts)
    for index, ((label, passes), (colour, hatch)) in enumerate(
        zip(counts.items(), looks, strict=False)
    ):
        share = np.bincount(passes, minlength=most + 1) / len(passes)
        at = np.arange(most + 1) + (index - (len(counts) - 1) / 2) * width
        ax.bar(at, share, width, color=colour, hatch=hatch, edgecolor="white", label=label)
    ax.set(
        xlabel="passes over the vocabulary",
        ylabel="share of the rows",
        xlim=(0.4, most + 0.6),
        ylim=(0, None),
    )
    ax.legend(loc="upper right")
    return ax


PATH_COLOURS = LinearSegmentedColormap.from_list(
    "path", [COLOURS["teacher"], "#B9B9B9", COLOURS["policy"]]
)
"""Colour of a point of the path by its alpha: from the teacher's to the policy's."""


def _contour(law: Gaussian, radius: float) -> Float[ndarray, "2 points"]:
    """The points of a plane that are `radius` standard deviations from the mean."""
    angle = np.linspace(0, 2 * np.pi, 181)
    circle = radius * np.stack([np.cos(angle), np.sin(angle)])
    return law.mean[:, None] + np.linalg.cholesky(law.covariance) @ circle


def _contours(law: Gaussian, role: str, ax: Axes, *, radii: Sequence[float] = (1, 2)) -> None:
    for radius in radii:
        x, y = _contour(law, radius)
        line = LINES[role] | {"linewidth": LINES[role]["linewidth"] * (1 if radius == 1 else 0.6)}
        ax.fill(x, y, color=COLOURS[role], alpha=FILL, linewidth=0)
        ax.plot(x, y, **line, label=role if radius == 1 else None)


def _plane(ax: Axes, *, half_width: float, centre: tuple[float, float] = (0, 0)) -> None:
    ax.set_aspect("equal")
    ax.set(
        xlim=(centre[0] - half_width, centre[0] + half_width),
        ylim=(centre[1] - half_width, centre[1] + half_width),
    )


def _role_legend(fig: Figure, *, roles: Sequence[str] = ("policy", "teacher", "q*")) -> None:
    names = {"policy": "policy", "teacher": "teacher", "q*": r"$q^*$"}
    handles = [Line2D([], [], **LINES[role], label=names[role]) for role in roles]
    fig.legend(handles=handles, loc="outside upper center", ncols=len(roles))


def gaussian_cases(cases: Sequence[SolvedPair], *, fig: Figure, half_width: float = 4.7) -> Figure:
    """Small multiples of pairs in the plane: contours of policy, teacher and q* at 1 and 2 sigma.

    Every panel has the same scale, given by the bar in the first, and is centred on what it shows.

    Args:
        cases: The solved pairs, three to a row; `name` labels the panel.
        fig: Where to draw: an empty figure, slightly higher than wide for nine cases.
        half_width: Half the side of each panel, in the units of the coordinates.
    """
    rows = -(-len(cases) // 3)
    axes = fig.subplots(rows, 3, squeeze=False)
    for ax, case in zip(axes.flat, cases, strict=False):
        _contours(case.teacher, "teacher", ax)
        _contours(case.policy, "policy", ax)
        _contours(case.q_star, "q*", ax)
        x, y = case.q_star.mean
        _star(ax, x, y, size=9)
        shown = np.hstack([_contour(law, 2) for law in (case.policy, case.teacher)])
        x, y = (shown.min(axis=1) + shown.max(axis=1)) / 2
        _plane(ax, half_width=half_width, centre=(x, y))
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set(visible=True, color="#C8C8C8")
        ax.annotate(
            case.name,
            (0, 1),
            xytext=(1, 4),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=9.5,
        )
        ax.set_xlabel(rf"$\alpha^* = {case.balance.alpha:.3f}$", color=INK["q*"])
    corner = axes.flat[0].get_xlim()[0] + 0.5, axes.flat[0].get_ylim()[0] + 0.6
    axes.flat[0].plot(
        [corner[0], corner[0] + 2], [corner[1]] * 2, color=COLOURS["ink"], linewidth=1.5
    )
    axes.flat[0].annotate(
        "2", (corner[0] + 1, corner[1]), (0, 3), textcoords="offset points", ha="center", fontsize=9
    )
    for ax in axes.flat[len(cases) :]:
        ax.set_axis_off()
    _role_legend(fig)
    return fig


def path_evolution(
    case: SolvedPair,
    alphas: Float[ndarray, " steps"],
    path: Sequence[Gaussian],
    kl_to_policy: Float[ndarray, " steps"],
    kl_to_teacher: Float[ndarray, " steps"],
    *,
    fig: Figure,
) -> Figure:
    """q_alpha on its way from teacher to policy, above the two divergences that choose q*.

    Args:
        case: The pair in the plane, solved.
        alphas: The exponents, from 0 to 1; about every tenth of the way one contour is drawn.
        path: The geometric mean at each.
        kl_to_policy: KL(q_alpha || policy) at each, in nats.
        kl_to_teacher: KL(q_alpha || teacher) at each, in nats.
        fig: Where to draw: an empty figure, higher than wide.
    """
    top, bottom = fig.subplots(2, 1, height_ratios=[1.75, 1])
    for alpha, law in list(zip(alphas, path, strict=True))[:: max(1, len(alphas) // 10)]:
        x, y = _contour(law, 1)
        top.plot(x, y, color=PATH_COLOURS(float(alpha)), linewidth=1.2, alpha=0.9)
    top.plot(*np.stack([law.mean for law in path]).T, color=COLOURS["ink"], linewidth=1.3, zorder=4)
    ends = ((case.teacher, "teacher", 0), (case.policy, "policy", 1))
    for law, role, _ in ends:
        x, y = _contour(law, 1)
        top.fill(x, y, color=COLOURS[role], alpha=FILL, linewidth=0)
        top.plot(x, y, **LINES[role] | {"linewidth": 2.4})
        top.plot(*law.mean, "o", color=COLOURS[role], markeredgecolor="white", zorder=5)
    top.plot(*_contour(case.q_star, 1), **LINES["q*"])
    _star(top, *case.q_star.mean, size=17)
    top.set_aspect("equal")
    top.set(xlabel="$x_1$", ylabel="$x_2$")
    top.margins(0.05)
    for law, role, end in ends:
        _halo(
            top.annotate(
                rf"{role}, $\alpha = {end}$",
                (law.mean[0], _contour(law, 1)[1].max()),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                color=INK[role],
            )
        )
    _halo(
        top.annotate(
            r"$q^*$",
            tuple(_contour(case.q_star, 1)[:, 68]),  # on its upper left
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            color=INK["q*"],
            fontsize=13,
        )
    )
    kl_crossing(alphas, kl_to_policy, kl_to_teacher, case.balance, ax=bottom)
    return fig


def scale_law(
    ratios: Float[ndarray, " points"],
    alphas: Float[ndarray, " points"],
    shares: Float[ndarray, " points"],
    cases: Sequence[SolvedPair],
    *,
    ax: Axes,
) -> Axes:
    """alpha* of concentric isotropic Gaussians against the ratio of their variances.

    Args:
        ratios: Teacher variance over policy variance; above 1 the policy is the narrower.
        alphas: alpha* at each.
        shares: The part of q*'s precision that comes from the policy, at each.
        cases: Rows of the source's table to mark: isotropic, with one mean.
        ax: Where to draw.
    """
    ax.axhline(0.5, **LINES["guide"])
    ax.axvline(1, **LINES["guide"])
    ax.plot(ratios, shares, **LINES["other"])
    ax.plot(ratios, alphas, **LINES["q*"])
    for case in cases:
        ratio = case.teacher.covariance[0, 0] / case.policy.covariance[0, 0]
        ax.plot(
            [ratio],
            [case.balance.alpha],
            "o",
            markersize=8,
            color=COLOURS["q*"],
            markeredgecolor="white",
            zorder=6,
        )
        _halo(
            ax.annotate(
                case.name,
                (ratio, case.balance.alpha),
                xytext=(7, 6),
                textcoords="offset points",
                color=INK["q*"],
            )
        )
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if x >= 1 else f"1/{1 / x:g}")
    ax.set(
        xlabel="teacher variance / policy variance",
        ylabel="between 0 (teacher) and 1 (policy)",
        xlim=(ratios[0], ratios[-1]),
        ylim=(0, 1),
    )
    label: dict[str, Any] = {
        "textcoords": "axes fraction",
        "xycoords": "axes fraction",
        "ha": "right",
    }
    _halo(ax.annotate(r"exponent $\alpha^*$", (0, 0), (0.985, 0.09), color=INK["q*"], **label))
    _halo(ax.annotate("share of the precision", (0, 0), (0.985, 0.68), color=INK["other"], **label))
    for x, text, side in ((0.02, "policy wider", "left"), (0.98, "policy narrower", "right")):
        ax.text(
            x, 0.505, text, transform=ax.transAxes, ha=side, va="bottom", color=COLOURS["quiet"]
        )
    return ax


def covariance_rules(case: SolvedPair, geometric: Gaussian, *, ax: Axes) -> Axes:
    """One contour each of two parents, of q*, and of the covariance that the source proposes.

    Args:
        case: The pair in the plane, with one mean.
        geometric: A Gaussian with the source's covariance, policy^alpha teacher^(1 - alpha).
        ax: Where to draw.
    """
    for law, role in ((case.teacher, "teacher"), (case.policy, "policy"), (case.q_star, "q*")):
        _contours(law, role, ax, radii=(1,))
    ax.plot(*_contour(geometric, 1), **LINES["other"])
    _plane(ax, half_width=2.3)
    ax.set(xlabel="$x_1$", ylabel="$x_2$", xticks=[-2, -1, 0, 1, 2], yticks=[-2, -1, 0, 1, 2])
    names = {
        "policy": "policy",
        "teacher": "teacher",
        "q*": "$q^*$: precisions\naveraged (exact)",
        "other": "the source's\ncovariance formula",
    }
    handles = [Line2D([], [], **LINES[role], label=name) for role, name in names.items()]
    ax.legend(handles=handles, loc="center left", bbox_to_anchor=(1.03, 0.5), labelspacing=1.1)
    return ax


def densities(
    panels: Sequence[tuple[SolvedPair, Float[ndarray, " points"], Float[ndarray, "3 points"]]],
    *,
    fig: Figure,
) -> Figure:
    """One-dimensional parents and q*, one panel below the other.

    Args:
        panels: For each panel the solved pair (its name is the label), the points, and the
            densities of policy, teacher and q* there.
        fig: Where to draw: an empty figure.
    """
    axes = fig.subplots(len(panels), 1, squeeze=False)[:, 0]
    for ax, (case, x, rows) in zip(axes, panels, strict=True):
        for role, density in zip(("policy", "teacher", "q*"), rows, strict=True):
            ax.fill_between(x, density, color=COLOURS[role], alpha=FILL, linewidth=0)
            ax.plot(x, density, **LINES[role])
        ax.set(xlim=(x[0], x[-1]), ylim=(0, 1.3 * rows.max()), ylabel="density")
        ax.text(0.015, 0.96, case.name, transform=ax.transAxes, va="top")
    axes[-1].set_xlabel("$x$")
    _role_legend(fig)
    return fig


def kl_order(
    log_kl_ratios: Sequence[Float[ndarray, " draws"]],
    alphas: Sequence[Float[ndarray, " draws"]],
    labels: Sequence[str],
    *,
    ax: Axes,
) -> Axes:
    """alpha* against the order of the parents' two KL divergences, for families of random pairs.

    Args:
        log_kl_ratios: log(KL(policy || teacher) / KL(teacher || policy)) of each draw, by family.
        alphas: alpha* of each draw, by family.
        labels: What each family is called; the first is drawn on top.
        ax: Where to draw.
    """
    reach = max(float(np.abs(ratio).max()) for ratio in log_kl_ratios) * 1.03
    for left, bottom in ((-reach, 0.5), (0, 0)):
        ax.fill_between(
            [left, left + reach], bottom, bottom + 0.5, color="#F1F1F1", linewidth=0, zorder=0
        )
    marks: tuple[dict[str, Any], ...] = (
        {"marker": "o", "color": COLOURS["ink"], "markersize": 2.4, "alpha": 0.5, "zorder": 3},
        {"marker": "^", "color": COLOURS["other"], "markersize": 3.4, "alpha": 0.5},
    )
    for ratio, alpha, label, mark in zip(log_kl_ratios, alphas, labels, marks, strict=True):
        ax.plot(ratio, alpha, linestyle="none", markeredgewidth=0, **mark)
        ax.plot([], [], linestyle="none", label=label, **mark | {"markersize": 6, "alpha": 0.9})
    ax.axhline(0.5, **LINES["guide"])
    ax.axvline(0, **LINES["guide"])
    for x, y, ha, va in ((0.02, 0.97, "left", "top"), (0.98, 0.03, "right", "bottom")):
        ax.text(
            x, y, "observation 2\nfails here", transform=ax.transAxes, ha=ha, va=va, fontsize=9.5
        )
    ax.set(
        xlabel="log of KL(policy ‖ teacher) / KL(teacher ‖ policy)",
        ylabel=r"$\alpha^*$",
        xlim=(-reach, reach),
        ylim=(0, 1),
    )
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(labels), handletextpad=0.3)
    return ax


def png_link(fig: Figure, file_name: str) -> str:
    """HTML that offers the figure as a PNG file of that name, carried inside the link itself.

    The link works wherever the page is, from a disk too: no second file has to be kept with it.
    """
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", bbox_inches="tight")
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<a class="figure-download" download="{file_name}" '
        f'href="data:image/png;base64,{data}">Download {file_name}</a>'
    )


# Exact sampling: what acceptance rules do, and what bounds the acceptance.


def redraw_panels(
    panels: Mapping[str, tuple[Float[ndarray, " tokens"], Float[ndarray, " tokens"]]],
    target: Float[ndarray, " tokens"],
    *,
    fig: Figure,
) -> Figure:
    """What a rule for one position emits, token by token: accepted drafts and redraws, stacked.

    Args:
        panels: By the rule's name, the probability that each token is an accepted draft, and that
            it is redrawn.
        target: The law that the sum should follow.
        fig: Where to draw, one panel per rule.
    """
    axes = fig.subplots(1, len(panels), sharey=True)
    tokens = range(1, len(target) + 1)
    for ax, (name, (accepted, redrawn)) in zip(axes, panels.items(), strict=True):
        ax.bar(tokens, accepted, width=0.62, color=COLOURS["policy"], label="accepted draft")
        ax.bar(
            tokens,
            redrawn,
            bottom=accepted,
            width=0.62,
            color="#BFD9E8",
            edgecolor=COLOURS["policy"],
            hatch="////",
            linewidth=0.8,
            label="redrawn",
        )
        for x, height in zip(tokens, target, strict=True):
            (mark,) = ax.plot([x - 0.42, x + 0.42], [height, height], **LINES["q*"])
        mark.set_label(r"$q^\star$")
        ax.set_xticks(list(tokens))
        ax.set_xlabel(f"token\n{name}")
    axes[0].set_ylabel("probability")
    handles, labels = axes[0].get_legend_handles_labels()
    order = [labels.index(label) for label in ("accepted draft", "redrawn", r"$q^\star$")]
    fig.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="outside upper center",
        ncols=3,
    )
    return fig


def loop_bias(
    num_candidates: Int[ndarray, " counts"],
    bias: Mapping[str, Float[ndarray, " counts"]],
    without_replacement: Mapping[str, Mapping[int, float]],
    *,
    ax: Axes,
) -> Axes:
    """Distance of the source loop's law from its target, against the number of candidates.

    Args:
        num_candidates: How many candidates are tried, from 0.
        bias: By the name of the example, TV(law, target) with independent candidates.
        without_replacement: By the same names, TV at some numbers of candidates that were drawn
            without replacement; drawn as hollow markers.
        ax: Where to draw.
    """
    looks: tuple[tuple[str, Any, str], ...] = (
        ("ink", "-", "o"),
        ("quiet", (0, (4.5, 2.2)), "s"),
        ("other", (0, (1.2, 1.4)), "^"),
    )
    for (name, values), (colour, dash, marker) in zip(bias.items(), looks, strict=True):
        shade = INK.get(colour, COLOURS[colour])
        ax.plot(num_candidates, values, color=shade, linestyle=dash, marker=marker, markersize=4.5)
        hollow = without_replacement.get(name, {})
        ax.plot(
            list(hollow),
            list(hollow.values()),
            linestyle="none",
            marker=marker,
            markersize=7.5,
            markerfacecolor="white",
            markeredgecolor=shade,
            markeredgewidth=1.4,
            zorder=4,
        )
        _halo(
            ax.annotate(
                name,
                (num_candidates[-1], values[-1]),
                xytext=(0, 6),
                textcoords="offset points",
                ha="right",
                va="bottom",
                color=shade,
            )
        )
    ax.plot([], [], "o-", color=COLOURS["ink"], markersize=4.5, label="with replacement")
    ax.plot(
        [],
        [],
        "o",
        markersize=7.5,
        markerfacecolor="white",
        markeredgecolor=COLOURS["ink"],
        markeredgewidth=1.4,
        label="without",
    )
    ax.axhline(0, **LINES["q*"], zorder=1)
    ax.annotate(
        r"exact: $q^\star$",
        (num_candidates[-1], 0),
        xytext=(0, 5),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color=INK["q*"],
    )
    ax.set(
        xlabel="number of candidates $k$",
        ylabel=r"total variation from $q^\star$",
        xlim=(-0.15, num_candidates[-1] + 0.15),
        ylim=(-0.012, None),
    )
    ax.legend(loc="upper left", bbox_to_anchor=(0.0, 1.02))
    return ax


def alpha_acceptance(
    random: tuple[Float[ndarray, " pairs"], Float[ndarray, " pairs"]],
    built: tuple[Float[ndarray, " pairs"], Float[ndarray, " pairs"]],
    printed: tuple[Float[ndarray, " rows"], Float[ndarray, " rows"]],
    *,
    ax: Axes,
) -> Axes:
    """Acceptance probability of the policy against alpha*: no curve, the whole square.

    Args:
        random: (alpha*, acceptance) of random pairs.
        built: The same for pairs constructed to lie on a grid.
        printed: The source's table.
        ax: Where to draw.
    """
    ax.plot(
        *random,
        linestyle="none",
        marker="o",
        markersize=2.2,
        markeredgewidth=0,
        color=COLOURS["quiet"],
        alpha=0.45,
    )
    ax.plot([], [], "o", markersize=4, color=COLOURS["quiet"], alpha=0.7, label="random pairs")
    ax.plot(
        *built,
        linestyle="none",
        marker="D",
        markersize=4.2,
        markerfacecolor="white",
        markeredgecolor=COLOURS["ink"],
        markeredgewidth=0.9,
        label="pairs built to order",
    )
    ax.plot(
        *printed,
        **LINES["teacher"] | {"linewidth": 1.4},
        marker="s",
        markersize=6.5,
        label="the source's table",
    )
    ax.set(
        xlabel=r"$\alpha^*$",
        ylabel="acceptance probability\n(policy drafts)",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, handletextpad=0.3)
    return ax


def acceptance_bounds(
    chernoff: Float[ndarray, " pairs"],
    accepted: Float[ndarray, " pairs"],
    grid: Float[ndarray, " points"],
    bounds: Mapping[str, Float[ndarray, " points"]],
    attained: tuple[Float[ndarray, " pairs"], Float[ndarray, " pairs"]],
    *,
    ax: Axes,
) -> Axes:
    """Acceptance probability against the Chernoff information: random pairs above the bounds.

    Args:
        chernoff: C of each random pair, in nats.
        accepted: Its acceptance probability.
        grid: The values of C at which the bounds are given, increasing.
        bounds: By name, a lower bound at each; the first is the sharp one.
        attained: (C, acceptance) of pairs built to attain the sharp bound.
        ax: Where to draw.
    """
    sharp = next(iter(bounds.values()))
    ax.fill_between(grid, 0, sharp, color="#F1F1F1", linewidth=0, zorder=0)
    ax.plot(
        chernoff,
        accepted,
        linestyle="none",
        marker="o",
        markersize=2.2,
        markeredgewidth=0,
        color=COLOURS["quiet"],
        alpha=0.4,
    )
    dashes: tuple[Any, ...] = ("-", (0, (4.5, 2.2)), (0, (1.2, 1.4)))
    for (name, values), dash in zip(bounds.items(), dashes, strict=True):
        width = 2.2 if dash == "-" else 1.5
        ax.plot(grid, values, color=COLOURS["ink"], linestyle=dash, linewidth=width, label=name)
    ax.plot(
        *attained,
        linestyle="none",
        marker="D",
        markersize=5,
        markerfacecolor="white",
        markeredgecolor=COLOURS["ink"],
        label="two coins that attain it",
    )
    ax.plot([], [], "o", markersize=4, color=COLOURS["quiet"], alpha=0.7, label="random pairs")
    ax.set(
        xlabel="Chernoff information $C$ (nats)",
        ylabel="acceptance probability",
        xscale="log",
        xlim=(grid[0], grid[-1]),
        ylim=(0, 1),
    )
    ax.legend(loc="lower left", handletextpad=0.5)
    return ax


# Two language models: what a decoder sees, token by token.


def decode_trace(trace: Any, *, fig: Figure, typical: tuple[float, float] = (0.3, 0.7)) -> Figure:
    """A decode, token by token: alpha*, the divergences around q*, and both acceptances.

    Args:
        trace: The `qstar.decode.Trace` of one sequence, on the CPU.
        fig: Where to draw, in three panels that share the axis of tokens.
        typical: The range of alpha to shade.
    """
    top, middle, bottom = fig.subplots(3, 1, sharex=True, height_ratios=(1, 1.25, 1))
    at = np.arange(1, len(trace.alpha) + 1)
    dots: dict[str, Any] = {"marker": "o", "markersize": 3}
    thin = {party: LINES[party] | {"linewidth": 1.3} for party in ("policy", "teacher", "q*")}
    top.axhspan(*typical, color="#EFEFEF", linewidth=0, zorder=0)
    top.axhline(0.5, **LINES["guide"], zorder=1)
    top.plot(at, trace.balance.alpha, **thin["q*"], **dots)
    top.set(ylabel=r"$\alpha^\star$", ylim=(0, 1), yticks=(0, *typical, 1))
    curves = {
        "policy ‖ teacher": (trace.policy_to_teacher, "policy"),
        "teacher ‖ policy": (trace.teacher_to_policy, "teacher"),
        r"$q^\star$ ‖ either ($C$)": (trace.balance.chernoff, "q*"),
    }
    for label, (values, party) in curves.items():
        middle.plot(at, values, **thin[party], **(dots if party == "q*" else {}), label=label)
    middle.set(ylabel="KL (nats)", yscale="log")
    middle.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, columnspacing=1.1)
    bottom.plot(at, trace.accept_policy, **thin["policy"], label="draft: policy")
    bottom.plot(at, trace.accept_teacher, **thin["teacher"], label="draft: teacher")
    bottom.set(xlabel="new token", ylabel="acceptance\nprobability", ylim=(None, 1.005))
    bottom.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    bottom.set_xlim(0.5, len(at) + 0.5)
    fig.align_ylabels()
    return fig


def alpha_by_kind(
    alphas: Mapping[str, Float[ArrayLike, " positions"]],
    *,
    ax: Axes,
    typical: tuple[float, float] = (0.3, 0.7),
) -> Axes:
    """alpha* at every position, one row of dots for each kind of pair, with the row's median.

    Args:
        alphas: Kind of pair -> alpha* at each of its positions.
        ax: Where to draw.
        typical: The range of alpha to shade.
    """
    ax.axvspan(*typical, color="#EFEFEF", linewidth=0, zorder=0)
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
    ax.set_xticks((0, typical[0], 0.5, typical[1], 1))
    ax.set_yticklabels([kind.replace(" and ", "\nand ") for kind in alphas])
    ax.tick_params(axis="y", length=0)
    return ax


def solving_gain(
    pairs: Mapping[str, tuple[Float[ArrayLike, " positions"], Float[ArrayLike, " positions"]]],
    *,
    ax: Axes,
) -> Axes:
    """What solving for alpha* buys over alpha = 1/2 at each position, against C.

    Args:
        pairs: Kind of pair -> (C, KL(q* || q_1/2)) at each of its positions, in nats.
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
        _halo(ax.annotate(label, at, (-2, -12), textcoords="offset points", ha="right", va="top"))
    ax.set_xlim(*ends)
    legend = ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, handletextpad=0.3)
    for handle in legend.legend_handles:
        if isinstance(handle, Line2D):
            handle.set(markersize=6, alpha=1)
    return ax


def texts(parts: Mapping[str, tuple[str, str]]) -> str:
    """HTML of texts beside each other, which stand below each other where the page is narrow.

    Args:
        parts: Heading -> (party, text); the party ("policy", "teacher", "q*") gives the colour.
    """
    cells = [
        f'<div style="flex:1 1 14em;min-width:0;border-top:4px {border} {COLOURS[party]};'
        f'padding:.3em 0 .6em"><strong>{html.escape(heading)}</strong><br>'
        f'<span style="white-space:pre-wrap;overflow-wrap:anywhere">{html.escape(text)}</span>'
        f"</div>"
        for heading, (party, text) in parts.items()
        for border in ("dashed" if party == "teacher" else "solid",)
    ]
    return f'<div style="display:flex;flex-wrap:wrap;gap:0 1.2em">{"".join(cells)}</div>'


def solver_cost(record: Mapping[str, Any], *, threads: int, ax: Axes) -> Axes:
    """Time per row of several ways to solve for alpha*, as ratios to the torch float32 solver.

    Args:
        record: What `python -m qstar.benchmark` writes.
        threads: Which of its thread counts to draw.
        ax: Where to draw; the horizontal axis is logarithmic.
    """
    names = {
        "read": "only read the two rows",
        "torch_float32": "qstar.batched, float32",
        "torch_float64": "qstar.batched, float64",
        "lean_brentq_float32": "lean brentq, float32",
        "lean_brentq": "lean brentq, float64",
        "user_brentq": "brentq + logsumexp",
    }
    cells = [cell for cell in record["cells"] if cell["threads"] == threads]
    looks = zip("osD^v<>", ["policy", "teacher", "q*", "other"] * 2, strict=False)
    for index, (cell, (marker, colour)) in enumerate(zip(cells, looks, strict=False)):
        ratio = cell["ratio"] | {"torch_float32": {"median": 1.0, "low": 1.0, "high": 1.0}}
        ratios = [ratio[name] for name in names]
        at = np.arange(len(names)) + 0.16 * (index - (len(cells) - 1) / 2)
        middle = np.array([one["median"] for one in ratios])
        ends = np.array([[one["low"], one["high"]] for one in ratios]).T
        ax.errorbar(
            middle,
            at,
            xerr=np.abs(ends - middle),
            fmt=marker,
            color=COLOURS[colour],
            markersize=5,
            linewidth=1.2,
            label=f"{cell['vocab']:,} tokens, batch {cell['batch']}",
        )
    ax.axvline(1, **LINES["guide"])
    ax.set(
        xscale="log",
        xlabel="time per row, as a multiple of qstar.batched in float32",
        yticks=range(len(names)),
        yticklabels=names.values(),
        ylim=(len(names) - 0.5, -0.5),
    )
    ax.legend(loc="upper right", fontsize=9)
    return ax
