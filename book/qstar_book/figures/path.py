"""The path from teacher to policy: two divergences that cross, and what no distribution can do."""

import numpy as np
from matplotlib.axes import Axes
from numpy import ndarray
from numpy.typing import ArrayLike

from qstar.result import Balance

from .style import COLOURS, FILL, INK, LINES, note, star

HALF_LABEL = 0.12
"""Half the width of the label at the crossing, as a share of the axis, with room beside it."""


def kl_crossing(
    alphas: ndarray,
    kl_to_policy: ndarray,
    kl_to_teacher: ndarray,
    balance: Balance,
    *,
    ax: Axes,
    minus_log_partition: ArrayLike | None = None,
) -> Axes:
    """The two KL divergences from q_alpha to its parents, crossing at alpha*, at height C.

    Args:
        alphas: The exponents on the policy, increasing. Shape (points,).
        kl_to_policy: KL(q_alpha || policy) at each, in nats. Shape (points,).
        kl_to_teacher: KL(q_alpha || teacher) at each, in nats. Shape (points,).
        balance: The solved pair: where to put the star, and what to write beside it.
        minus_log_partition: -log Z at each alpha, in nats: drawn too if given. It peaks where the
            curves cross. Shape (points,).
    """
    alpha, chernoff = float(balance.alpha), float(balance.chernoff)
    top = 1.06 * max(float(max(kl_to_policy)), float(max(kl_to_teacher)))
    ax.plot(alphas, kl_to_policy, **LINES["policy"], label=r"KL($q_\alpha$ ‖ policy)")
    ax.plot(alphas, kl_to_teacher, **LINES["teacher"], label=r"KL($q_\alpha$ ‖ teacher)")
    if minus_log_partition is not None:
        curve = LINES["q*"] | {"linewidth": 1.6, "linestyle": (0, (6, 1.5, 1, 1.5))}
        ax.plot(alphas, minus_log_partition, **curve, label=r"$-\log Z(\alpha)$")
    ax.plot([alpha, alpha, 0], [0, chernoff, chernoff], **LINES["guide"], zorder=1)
    star(ax, alpha, chernoff)
    sides = (alpha + HALF_LABEL, kl_to_teacher), (alpha - HALF_LABEL, kl_to_policy)
    beside = max(float(np.interp(at, alphas, curve)) for at, curve in sides)
    note(
        ax,
        rf"$\alpha^\star = {alpha:.3f}$" + "\n" + rf"$C = {chernoff:.3f}$ nats",
        (alpha, beside),
        (0, 4),
        ha="center",
        va="bottom",
        color=INK["q*"],
        linespacing=1.35,
    )
    ax.legend(loc="upper center", handletextpad=0.6)
    ax.set(
        xlabel=r"$\alpha$  (0: teacher, 1: policy)",
        ylabel="divergence (nats)",
        xlim=(0, 1),
        ylim=(0, top),
    )
    return ax


def minimax(
    strayed: ndarray,
    worse: ndarray,
    balance: Balance,
    *,
    ax: Axes,
    alone: tuple[ndarray, ndarray] | None = None,
) -> Axes:
    """The larger of the two divergences of many distributions, above the bound C + KL(q || q*).

    Args:
        strayed: KL(q || q*) of each distribution, in nats. Shape (challengers,).
        worse: max(KL(q || policy), KL(q || teacher)) of each, in nats. Shape (challengers,).
        balance: The solved pair, for C.
        alone: The same two numbers of the distributions with one outcome only, in the order of
            the outcomes: marked if given, since many challengers end there.
    """
    chernoff, reach = float(balance.chernoff), float(np.quantile(strayed, 0.98))
    if alone is not None:
        reach = 1.06 * float(np.max(alone[0]))
    line = np.array([0, reach])
    ax.fill_between(line, chernoff + line, color=COLOURS["q*"], alpha=FILL / 2, linewidth=0)
    ax.plot(strayed, worse, "o", ms=3, mew=0, color=COLOURS["quiet"], alpha=0.5, rasterized=True)
    ax.plot(line, chernoff + line, **LINES["q*"])
    star(ax, 0, chernoff)
    if alone is not None:
        ax.plot(*alone, "s", ms=8, mfc="none", color=COLOURS["ink"], zorder=5)
        for outcome, point in enumerate(zip(*alone, strict=True), 1):
            note(ax, f"outcome {outcome}", point, (-8, 10), ha="right")
    note(
        ax,
        rf"$q^\star$, at $C = {chernoff:.3f}$",
        (0, chernoff),
        (14, -6),
        clear=False,
        va="center",
        color=INK["q*"],
    )
    ax.text(
        0.97 * reach,
        0.45 * (chernoff + reach),
        r"below $C+$KL($q$ ‖ $q^\star$):" + "\nno distribution",
        ha="right",
        va="center",
        color=INK["q*"],
        linespacing=1.35,
    )
    ax.set(
        xlabel=r"KL($q$ ‖ $q^\star$) (nats)",
        ylabel="larger of the two\ndivergences (nats)",
        xlim=(0, reach),
        ylim=(0, 1.08 * float(np.max(worse[strayed <= reach]))),
    )
    return ax
