"""Distributions that are not Gaussian: families on one curve, tails, modes, many experts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray

from qstar.result import Balance

from .style import COLOURS, FILL, INK, LINES, note, role_legend, star


def one_scale_law(
    ratios: ndarray,
    alphas: ndarray,
    families: Mapping[str, tuple[float, float]],
    *,
    ax: Axes,
) -> Axes:
    """Many families on one curve: alpha* against the ratio of the rates of policy and teacher.

    Args:
        ratios: Policy rate over teacher rate. Shape (points,).
        alphas: alpha* at each, by the formula. Shape (points,).
        families: Name -> (ratio, alpha* as solved), in the order of the ratios: labels alternate
            between the sides of the curve.
    """
    ax.axhline(0.5, **LINES["guide"])
    ax.axvline(1, **LINES["guide"])
    ax.plot(ratios, alphas, **LINES["q*"])
    for index, (name, (ratio, alpha)) in enumerate(families.items()):
        side = 1 if index % 2 else -1
        ax.plot(
            [ratio],
            [alpha],
            "o",
            markersize=7.5,
            color=COLOURS["ink"],
            markeredgecolor="white",
            zorder=6,
        )
        note(
            ax,
            name,
            (ratio, alpha),
            (9 * side, 7 * side),
            ha="left" if side > 0 else "right",
            va="center",
        )
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if x >= 1 else f"1/{1 / x:g}")
    ax.set(
        xlabel=r"ratio of rates, $\rho$ = policy / teacher",
        ylabel=r"$\alpha^\star$",
        xlim=(ratios[0], ratios[-1]),
        ylim=(0, 1),
    )
    sides = ((0.02, "policy has the lower rate", "left"), (0.98, "the higher rate", "right"))
    for x, text, ha in sides:
        place: dict[str, Any] = {"transform": ax.transAxes, "ha": ha, "va": "bottom"}
        ax.text(x, 0.505, text, color=COLOURS["quiet"], **place)
    return ax


def mirrored_variance(
    alphas: ndarray,
    variances: ndarray,
    balance: Balance,
    *,
    ax: Axes,
) -> Axes:
    """The variance of the log-ratio along the path, and its mirror image about one half.

    Args:
        alphas: The exponents on the policy, from 0 to 1 and symmetric about one half. Shape
            (points,).
        variances: The second derivative of log Z at each, in nats squared. Shape (points,).
        balance: The solved pair: where to mark alpha*.
    """
    ax.fill_between(alphas, variances, variances[::-1], color=COLOURS["q*"], alpha=FILL, lw=0)
    ax.plot(alphas, variances, color=COLOURS["ink"], linewidth=1.8)
    ax.plot(alphas, variances[::-1], **LINES["guide"] | {"linewidth": 1.8})
    ax.axvline(0.5, **LINES["guide"])
    star(ax, float(balance.alpha), float(np.interp(balance.alpha, alphas, variances)))
    top = 1.12 * float(variances.max())
    ax.set(
        xlabel=r"$\alpha$  (0: teacher, 1: policy)",
        ylabel=r"variance of the log-ratio (nats$^2$)",
        xlim=(0, 1),
        ylim=(0, top),
    )
    at = len(alphas) // 6
    for x, y, text in (
        (alphas[at], variances[at], r"$F''(\alpha)$"),
        (alphas[-at], variances[at], r"$F''(1-\alpha)$"),
    ):
        note(ax, text, (x, y), (0, 7), ha="center")
    note(
        ax,
        r"$\alpha^\star$",
        (balance.alpha, float(np.interp(balance.alpha, alphas, variances))),
        (10, 5),
        color=INK["q*"],
    )
    return ax


def tail_weight(
    freedoms: ndarray,
    curves: Mapping[str, ndarray],
    limits: Sequence[float],
    *,
    ax: Axes,
) -> Axes:
    """alpha* of a narrow and a wide Student-t against their common degrees of freedom.

    Args:
        freedoms: Degrees of freedom, increasing. Shape (points,).
        curves: A ratio of scales, "1 : 2" -> alpha* of the narrow policy at each. Shape (points,).
        limits: alpha* of Gaussians of the same ratios, drawn as ticks at the right.
    """
    looks = [("-", 1.6), ((0, (5, 2)), 2.2), ("-", 3.2)]
    ax.axhline(0.5, **LINES["guide"])
    ax.axvline(1, **LINES["guide"])
    labelled = zip(curves.items(), looks, limits, strict=True)
    for number, ((label, alphas), (dash, width), limit) in enumerate(labelled):
        ax.plot(freedoms, alphas, color=COLOURS["q*"], linestyle=dash, linewidth=width)
        ax.plot([freedoms[-1]], [limit], "<", color=COLOURS["ink"], markersize=6, clip_on=False)
        at = int(0.78 * len(freedoms))
        note(
            ax,
            label if number else f"scales {label}",
            (freedoms[at], alphas[at]),
            (2, 5),
            ha="left",
            color=INK["q*"],
        )
    ax.plot([1], [0.5], "o", markersize=8, color=COLOURS["ink"], markeredgecolor="white", zorder=6)
    note(ax, "Cauchy", (1, 0.5), (8, 8), clear=False)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    ax.set(
        xlabel=r"degrees of freedom $\nu$  (small: heavy tails)",
        ylabel=r"$\alpha^\star$ of the narrow parent",
        xlim=(freedoms[0], freedoms[-1]),
    )
    return ax


def modes_along_path(
    panels: Sequence[
        tuple[
            ndarray,
            ndarray,
            tuple[ndarray, ndarray],
            Balance,
        ]
    ],
    *,
    fig: Figure,
) -> Figure:
    """Densities of pairs with q* (top), and where the modes of q_alpha lie for each alpha (bottom).

    Args:
        panels: One column each: the points, the densities of policy, teacher and q* there, the
            modes along the path as (places, their alphas), and the solved pair. Shape (points,) or
            (3, points) or (modes,).
    """
    axes = fig.subplots(2, len(panels), squeeze=False, height_ratios=(1, 1.15), sharex="col")
    for column, (x, rows, (places, alphas), balance) in enumerate(panels):
        above, below = axes[:, column]
        for role, density in zip(("policy", "teacher", "q*"), rows, strict=True):
            above.fill_between(x, density, color=COLOURS[role], alpha=FILL, linewidth=0)
            above.plot(x, density, **LINES[role])
        below.plot(places, alphas, ".", markersize=3, color=COLOURS["ink"], rasterized=True)
        below.axhline(balance.alpha, **LINES["q*"] | {"linewidth": 1.6}, zorder=0)
        above.set(xlim=(x[0], x[-1]), ylim=(0, 1.1 * rows.max()))
        below.set(xlabel="$x$", ylim=(0, 1))
        note(
            below,
            r"$\alpha^\star$",
            (1, balance.alpha),
            (-4, 4),
            xycoords=("axes fraction", "data"),
            ha="right",
            color=INK["q*"],
        )
    axes[0, 0].set_ylabel("density")
    axes[1, 0].set_ylabel(r"$\alpha$ (modes of $q_\alpha$)")
    role_legend(fig)
    return fig


def effective_share(
    dimensions: ndarray,
    shares: ndarray,
    guarantees: ndarray,
    *,
    ax: Axes,
) -> Axes:
    """The effective share of a Monte Carlo sample against the dimension, and what is guaranteed.

    Args:
        dimensions: How many coordinates. Shape (points,).
        shares: Effective draws over draws, as measured at alpha*. Shape (points,).
        guarantees: exp(-C), from the exact C. Shape (points,).
        ax: Where to draw; the vertical axis is logarithmic.
    """
    ax.fill_between(dimensions, guarantees, 1e-9, color=COLOURS["q*"], alpha=FILL, linewidth=0)
    ax.plot(dimensions, guarantees, **LINES["q*"])
    ax.plot(dimensions, shares, "o", color=COLOURS["ink"], markersize=6)
    at = len(dimensions) // 2
    note(ax, "measured", (dimensions[at], shares[at]), (8, 6), clear=False, ha="left")
    note(
        ax,
        r"guaranteed: $e^{-C}$",
        (dimensions[at], guarantees[at]),
        (-8, -14),
        ha="right",
        color=INK["q*"],
    )
    ax.set_yscale("log")
    ax.minorticks_off()
    steps = [m * 10.0**-power for power in range(9) for m in (1, 0.5, 0.2)]
    shown = [step for step in steps if step > 0.5 * float(guarantees.min())]
    ax.set_yticks(shown, [f"{step:g}" for step in shown])
    ax.set(
        xlabel="dimension",
        ylabel="effective draws / draws",
        ylim=(0.5 * float(guarantees.min()), 1.1),
        xlim=(0, float(dimensions.max()) * 1.03),
    )
    return ax


def enclosing_balls(
    panels: Sequence[
        tuple[
            ndarray,
            ndarray,
            ndarray,
            float,
        ]
    ],
    *,
    fig: Figure,
) -> Figure:
    """Experts in the plane, the weight of each, and the smallest circle that holds them.

    Args:
        panels: Side by side: the experts' means, their weights, the centre, and the radius. Shape
            (experts, 2) or (experts,) or (2,).
    """
    axes = fig.subplots(1, len(panels), squeeze=False)[0]
    angle = np.linspace(0, 2 * np.pi, 181)
    for ax, (means, weights, centre, radius) in zip(axes, panels, strict=True):
        circle = centre[:, None] + radius * np.stack([np.cos(angle), np.sin(angle)])
        ax.fill(*circle, color=COLOURS["q*"], alpha=FILL / 2, linewidth=0)
        ax.plot(*circle, **LINES["q*"] | {"linewidth": 1.8})
        ax.fill(*means.T, fill=False, edgecolor=COLOURS["quiet"], linewidth=1)
        for mean, weight in zip(means, weights, strict=True):
            filled = COLOURS["ink"] if weight > 0 else "white"
            if weight > 0:
                ax.plot(*np.stack([centre, mean]).T, **LINES["guide"])
            ax.plot(
                *mean, "o", markersize=8, color=filled, markeredgecolor=COLOURS["ink"], zorder=5
            )
            away = (mean - centre) / max(float(np.linalg.norm(mean - centre)), 1e-9)
            note(
                ax,
                f"{weight:.2f}" if weight > 0 else "0",
                mean,
                tuple(21 * away),
                ha="center",
                va="center",
            )
        star(ax, *centre)
        ax.set_aspect("equal")
        reach = 1.8 * radius
        ax.set(
            xlim=(centre[0] - reach, centre[0] + reach),
            ylim=(centre[1] - reach, centre[1] + reach),
            xlabel="$x_1$",
        )
    axes[0].set_ylabel("$x_2$")
    return fig
