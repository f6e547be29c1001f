"""Gaussians, in the plane and on the line."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy import ndarray

from qstar.gaussian import Gaussian, SolvedPair

from .path import kl_crossing
from .style import COLOURS, FILL, INK, LINES, halo, note, role_legend, star

PATH_COLOURS = LinearSegmentedColormap.from_list(
    "path", [COLOURS["teacher"], "#B9B9B9", COLOURS["policy"]]
)
"""Colour of a point of the path by its alpha: from the teacher's to the policy's."""


def contour(gaussian: Gaussian, radius: float) -> ndarray:
    """The points of a plane that are `radius` standard deviations from the mean."""
    angle = np.linspace(0, 2 * np.pi, 181)
    circle = radius * np.stack([np.cos(angle), np.sin(angle)])
    return gaussian.mean[:, None] + np.linalg.cholesky(gaussian.covariance) @ circle


def draw_contour(gaussian: Gaussian, role: str, ax: Axes) -> None:
    """Draw the contour at one standard deviation, as that party is drawn."""
    x, y = contour(gaussian, 1)
    ax.fill(x, y, color=COLOURS[role], alpha=FILL, linewidth=0)
    ax.plot(x, y, **LINES[role], label=role)


def _draw_parties(case: SolvedPair, ax: Axes) -> None:
    for gaussian, role in ((case.teacher, "teacher"), (case.policy, "policy"), (case.q_star, "q*")):
        draw_contour(gaussian, role, ax)


def _compare_contours(case: SolvedPair, other: Gaussian, q_star: str, name: str, ax: Axes) -> None:
    """The parties, and a Gaussian of another covariance, with their names beside them."""
    _draw_parties(case, ax)
    ax.plot(*contour(other, 1), **LINES["other"])
    ax.set(xlabel="$x_1$", ylabel="$x_2$")
    names = ("policy", "policy"), ("teacher", "teacher"), ("q*", rf"$q^\star$: {q_star}")
    handles = [
        Line2D([], [], **LINES[role], label=said) for role, said in (*names, ("other", name))
    ]
    ax.legend(handles=handles, loc="center left", bbox_to_anchor=(1.03, 0.5), labelspacing=1.1)


def plane(ax: Axes, *, half_width: float, centre: tuple[float, float] = (0, 0)) -> None:
    """Show a square of the plane, with one scale for both coordinates."""
    ax.set_aspect("equal")
    ax.set(
        xlim=(centre[0] - half_width, centre[0] + half_width),
        ylim=(centre[1] - half_width, centre[1] + half_width),
    )


def gaussian_cases(cases: Sequence[SolvedPair], *, fig: Figure) -> Figure:
    """Small multiples of pairs in the plane: contours of policy, teacher and q* at one sigma.

    Every panel has the scale that its own pair needs, the same on both axes.

    Args:
        cases: The solved pairs, three to a row; `name` labels the panel.
        fig: Where to draw: an empty figure, slightly higher than wide for nine cases.
    """
    rows = -(-len(cases) // 3)
    axes = fig.subplots(rows, 3, squeeze=False)
    for ax, case in zip(axes.flat, cases, strict=False):
        _draw_parties(case, ax)
        x, y = case.q_star.mean
        star(ax, x, y, size=9)
        parties = (case.policy, case.teacher, case.q_star)
        shown = np.hstack([contour(party, 1) for party in parties])
        low, high = shown.min(axis=1), shown.max(axis=1)
        x, y = (low + high) / 2
        plane(ax, half_width=0.56 * float((high - low).max()), centre=(x, y))
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        ax.tick_params(labelsize=9.5)
        alpha = rf"$\alpha^\star = {case.balance.alpha:.3f}$"
        for text, height, colour in ((case.name, 18, COLOURS["ink"]), (alpha, 4, INK["q*"])):
            note(ax, text, (0, 1), (0, height), clear=False, xycoords="axes fraction", color=colour)
    for ax in axes.flat[len(cases) :]:
        ax.set_axis_off()
    role_legend(fig)
    return fig


def _level(matrix: ndarray, factor: ndarray) -> ndarray:
    """The four x with |factor x| = 1 and x' matrix x = 1."""
    inverse = np.linalg.inv(factor)
    (low, high), turn = np.linalg.eigh(inverse.T @ matrix @ inverse)
    cosine = np.sqrt((high - 1) / (high - low))
    signs = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]])
    return signs * [cosine, np.sqrt(1 - cosine**2)] @ (inverse @ turn).T


def precision_ellipses(case: SolvedPair, averaged: Gaussian, *, ax: Axes) -> Axes:
    """One contour each of two parents, of q*, and of the Gaussian with the averaged covariance.

    Marked are the four points where the parents' contours cross, through which that of q* goes,
    and the four lines that touch both, which that of the averaged covariance touches.

    Args:
        case: The pair in the plane, with mean zero, neither parent wider in every direction.
        averaged: The Gaussian with the weighted average of the parents' covariances.
    """
    covariances = case.policy.covariance, case.teacher.covariance
    precisions = [np.linalg.inv(covariance) for covariance in covariances]
    for normal in _level(covariances[1], np.linalg.cholesky(covariances[0]).T):
        foot = normal / (normal @ normal)
        along = np.array([-normal[1], normal[0]])
        ax.axline(foot, foot + along, **LINES["guide"] | {"zorder": 1})
    _compare_contours(
        case, averaged, "average\nof the precisions", "average of the\ncovariances", ax
    )
    points = _level(precisions[1], np.linalg.cholesky(precisions[0]).T)
    ax.plot(*points.T, "o", color=COLOURS["ink"], markersize=5.5, markeredgecolor="white", zorder=6)
    reach = 1.12 * max(np.sqrt(np.diag(covariance)).max() for covariance in covariances)
    plane(ax, half_width=float(reach))
    return ax


def density_path(
    points: ndarray, alphas: ndarray, densities: ndarray, case: SolvedPair, *, ax: Axes
) -> Axes:
    """The densities of q_alpha on the line, from the teacher's to the policy's, and that of q*.

    Args:
        points: Where the densities are given. Shape (points,).
        alphas: The exponents, from 0 to 1. Shape (steps,).
        densities: The density of q_alpha for each exponent, at each point. Shape (steps, points).
        case: The solved pair on the line, for q*.
    """
    for alpha, density in zip(alphas, densities, strict=True):
        ax.plot(points, density, color=PATH_COLOURS(float(alpha)), linewidth=1.2)
    for row, role in ((0, "teacher"), (-1, "policy")):
        ax.fill_between(points, densities[row], color=COLOURS[role], alpha=FILL, linewidth=0)
        ax.plot(points, densities[row], **LINES[role] | {"linewidth": 2.4})
    q_star = np.exp(case.q_star.log_density(points[:, None]))
    ax.plot(points, q_star, **LINES["q*"])
    labels = (  # curve, party, its label, how high on the curve, and on which side
        (densities[0], "teacher", r"teacher, $\alpha = 0$", 0.75, 1),
        (densities[-1], "policy", r"policy, $\alpha = 1$", 0.75, -1),
        (q_star, "q*", rf"$q^\star$, $\alpha^\star = {case.balance.alpha:.3f}$", 1.0, 1),
    )
    for curve, role, text, height, side in labels:
        above = np.flatnonzero(curve >= height * curve.max())
        note(
            ax,
            text,
            (points[above[-1 if side > 0 else 0]], height * curve.max()),
            (side * (9 if height < 1 else 32), 5),
            ha="left" if side > 0 else "right",
            color=INK[role],
        )
    ax.set(
        xlabel="$x$",
        ylabel="density",
        xlim=(points[0], points[-1]),
        ylim=(0, 1.08 * float(densities.max())),
    )
    return ax


def path_evolution(
    case: SolvedPair,
    alphas: ndarray,
    path: Sequence[Gaussian],
    kl_to_policy: ndarray,
    kl_to_teacher: ndarray,
    *,
    fig: Figure,
) -> Figure:
    """q_alpha on its way from teacher to policy, above the two divergences that choose q*.

    Args:
        case: The pair in the plane, solved.
        alphas: The exponents, from 0 to 1; about every tenth of the way one contour is drawn. Shape
            (steps,).
        path: The geometric mean at each.
        kl_to_policy: KL(q_alpha || policy) at each, in nats. Shape (steps,).
        kl_to_teacher: KL(q_alpha || teacher) at each, in nats. Shape (steps,).
        fig: Where to draw: an empty figure, higher than wide.
    """
    top, bottom = fig.subplots(2, 1, height_ratios=[1.75, 1])
    for alpha, gaussian in list(zip(alphas, path, strict=True))[:: max(1, len(alphas) // 10)]:
        x, y = contour(gaussian, 1)
        top.plot(x, y, color=PATH_COLOURS(float(alpha)), linewidth=1.2, alpha=0.9)
    means = np.stack([gaussian.mean for gaussian in path])
    top.plot(*means.T, color=COLOURS["ink"], linewidth=1.3, zorder=4)
    ends = ((case.teacher, "teacher", 0), (case.policy, "policy", 1))
    for gaussian, role, _ in ends:
        x, y = contour(gaussian, 1)
        top.fill(x, y, color=COLOURS[role], alpha=FILL, linewidth=0)
        top.plot(x, y, **LINES[role] | {"linewidth": 2.4})
        top.plot(*gaussian.mean, "o", color=COLOURS[role], markeredgecolor="white", zorder=5)
    top.plot(*contour(case.q_star, 1), **LINES["q*"])
    star(top, *case.q_star.mean, size=17)
    top.set_aspect("equal")
    top.set(xlabel="$x_1$", ylabel="$x_2$")
    top.margins(0.05)
    for gaussian, role, end in ends:
        note(
            top,
            rf"{role}, $\alpha = {end}$",
            (gaussian.mean[0], contour(gaussian, 1)[1].max()),
            (0, 5),
            ha="center",
            color=INK[role],
        )
    note(
        top,
        r"$q^\star$",
        tuple(contour(case.q_star, 1)[:, 68]),  # on its upper left
        (-4, 3),
        ha="right",
        color=INK["q*"],
        fontsize=13,
    )
    kl_crossing(alphas, kl_to_policy, kl_to_teacher, case.balance, ax=bottom)
    return fig


def scale_law(
    ratios: ndarray,
    alphas: ndarray,
    shares: ndarray,
    cases: Sequence[SolvedPair],
    *,
    ax: Axes,
) -> Axes:
    """alpha* of concentric isotropic Gaussians against the ratio of their variances.

    Args:
        ratios: Teacher variance over policy variance; above 1 the policy is the narrower. Shape
            (points,).
        alphas: alpha* at each. Shape (points,).
        shares: The part of q*'s precision that comes from the policy, at each. Shape (points,).
        cases: Rows of the source's table to mark: isotropic, with one mean.
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
        note(
            ax,
            f"ratio {ratio:g} ({case.name})",
            (ratio, case.balance.alpha),
            (7, 6),
            color=INK["q*"],
        )
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if x >= 1 else f"1/{1 / x:g}")
    ax.set(
        xlabel="teacher variance / policy variance",
        ylabel="exponent, and share,\nof the policy",
        xlim=(ratios[0], ratios[-1]),
        ylim=(0, 1),
    )
    label: dict[str, Any] = {
        "textcoords": "axes fraction",
        "xycoords": "axes fraction",
        "ha": "right",
    }
    halo(ax.annotate(r"exponent $\alpha^\star$", (0, 0), (0.985, 0.09), color=INK["q*"], **label))
    halo(ax.annotate("share of the precision", (0, 0), (0.985, 0.61), color=INK["other"], **label))
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
    """
    names = "precisions\naveraged (exact)", "the source's\ncovariance formula"
    _compare_contours(case, geometric, *names, ax)
    plane(ax, half_width=2.3)
    ax.set(xticks=[-2, -1, 0, 1, 2], yticks=[-2, -1, 0, 1, 2])
    return ax


def densities(
    panels: Sequence[tuple[SolvedPair, ndarray, ndarray]],
    *,
    fig: Figure,
) -> Figure:
    """One-dimensional parents and q*, one panel below the other.

    Args:
        panels: For each panel the solved pair (its name is the label), the points, and the
            densities of policy, teacher and q* there. Shape (points,) or (3, points).
    """
    axes = fig.subplots(len(panels), 1, squeeze=False)[:, 0]
    for ax, (case, x, rows) in zip(axes, panels, strict=True):
        for role, density in zip(("policy", "teacher", "q*"), rows, strict=True):
            ax.fill_between(x, density, color=COLOURS[role], alpha=FILL, linewidth=0)
            ax.plot(x, density, **LINES[role])
        ax.set(xlim=(x[0], x[-1]), ylim=(0, 1.3 * rows.max()), ylabel="density")
        ax.text(0.015, 0.96, case.name, transform=ax.transAxes, va="top")
    axes[-1].set_xlabel("$x$")
    role_legend(fig)
    return fig


def kl_order(
    log_kl_ratios: Sequence[ndarray],
    alphas: Sequence[ndarray],
    labels: Sequence[str],
    *,
    ax: Axes,
) -> Axes:
    """alpha* against the order of the parents' two KL divergences, for families of random pairs.

    Args:
        log_kl_ratios: log(KL(policy || teacher) / KL(teacher || policy)) of each draw, by family.
            Shape (draws,).
        alphas: alpha* of each draw, by family. Shape (draws,).
        labels: What each family is called, three at most; the first is drawn on top.
    """
    reach = max(float(np.abs(ratio).max()) for ratio in log_kl_ratios) * 1.03
    for left, bottom in ((-reach, 0.5), (0, 0)):
        ax.fill_between(
            [left, left + reach], bottom, bottom + 0.5, color="#F1F1F1", linewidth=0, zorder=0
        )
    marks: tuple[dict[str, Any], ...] = (
        {"marker": "o", "color": COLOURS["ink"], "markersize": 2.4, "alpha": 0.5, "zorder": 3},
        {"marker": "s", "color": COLOURS["quiet"], "markersize": 2.8, "alpha": 0.7, "zorder": 2.5},
        {"marker": "^", "color": COLOURS["other"], "markersize": 3.4, "alpha": 0.5},
    )
    families = zip(log_kl_ratios, alphas, labels, marks, strict=False)
    for ratio, alpha, label, mark in families:
        ax.plot(ratio, alpha, linestyle="none", markeredgewidth=0, rasterized=True, **mark)
        ax.plot([], [], linestyle="none", label=label, **mark | {"markersize": 6, "alpha": 0.9})
    ax.axhline(0.5, **LINES["guide"])
    ax.axvline(0, **LINES["guide"])
    for x, y, ha, va in ((0.02, 0.97, "left", "top"), (0.98, 0.03, "right", "bottom")):
        ax.text(
            x, y, "observation 2\nfails here", transform=ax.transAxes, ha=ha, va=va, fontsize=9.5
        )
    ax.set(
        xlabel="log of KL(policy ‖ teacher) / KL(teacher ‖ policy)",
        ylabel=r"$\alpha^\star$",
        xlim=(-reach, reach),
        ylim=(0, 1),
    )
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(labels), handletextpad=0.3)
    return ax
