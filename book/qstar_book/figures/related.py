"""A map of the ideas around q*: the geometric path, the mixtures, and what lies on them."""

import numpy as np
from matplotlib.figure import Figure

from .style import COLOURS, INK, LINES, star

ON_THE_PATH = {
    1.62: "contrastive decoding:\nthe limit " r"$\alpha\to\infty$",
    1.28: r"$\alpha>1$: classifier-" "\nfree guidance",
    0.8: r"any fixed $\alpha$: opinion" "\npool, realignment,\nmodel arithmetic",
    0.5: r"$q^\star$: $\alpha^\star$, Chernoff" "\ninformation",
    0.22: r"$\alpha=1/2$: Bhatta-" "\ncharyya, Hellinger,\nproduct of experts",
}
"""Height on the map (0 the teacher, 1 the policy) -> what lies there."""

ON_THE_CHORD = {0.62: "centre of the\nforward KL ball", 0.36: "Jensen–Shannon\nmidpoint"}


def _path(height: np.ndarray) -> np.ndarray:
    """How far to the right the geometric path is: an arc over the chord, then straight on."""
    return 0.42 * np.sin(np.pi * np.clip(height, 0, 1))


def related_map() -> Figure:
    """The parents, the geometric path with q*, the mixtures, and the names that belong to them.

    It is narrow enough for a phone.
    """
    fig = Figure(figsize=(4.5, 4.9))
    ax = fig.subplots()
    heights = np.linspace(0, 1, 80)
    ax.plot(_path(heights), heights, color=COLOURS["q*"], linewidth=2.2)
    ax.plot([0, 0], [0, 1], color=COLOURS["quiet"], linestyle=(0, (1, 2)), linewidth=1.6)
    ax.annotate(
        "",
        (0, 1.78),
        xytext=(0, 1.0),
        arrowprops={"arrowstyle": "->", "color": COLOURS["policy"], "lw": 1.4, "ls": (0, (5, 2))},
    )
    for role, height, name in (
        ("policy", 1.0, r"policy, $\alpha=1$"),
        ("teacher", 0.0, r"teacher, $\alpha=0$"),
    ):
        marker = "o" if role == "policy" else "s"
        ax.plot(0, height, marker=marker, markersize=9, color=LINES[role]["color"], zorder=5)
        ax.text(-0.1, height, name, ha="right", va="center", color=INK[role])
    for height, name in ON_THE_PATH.items():
        x = float(_path(np.array(height)))
        if height == 0.5:
            star(ax, x, height, size=17)
        else:
            ax.plot(x, height, marker="D", markersize=5, color=COLOURS["ink"], zorder=5)
        ink = INK["q*"] if height == 0.5 else COLOURS["ink"]
        ax.text(
            x + 0.13,
            height - 0.02 * (height < 0.5),
            name,
            ha="left",
            va="center",
            color=ink,
            linespacing=1.15,
        )
    for height, name in ON_THE_CHORD.items():
        ax.plot(0, height, marker="D", markersize=5, color=COLOURS["ink"], zorder=5)
        ax.text(-0.1, height, name, ha="right", va="center", linespacing=1.15)
    ax.text(-0.1, 0.86, "mixtures", ha="right", va="center", color=COLOURS["quiet"], style="italic")
    ax.text(0.37, 1.0, "geometric path", ha="left", va="center", color=INK["q*"], style="italic")
    ax.set(xlim=(-1.02, 1.32), ylim=(-0.1, 1.8))
    ax.axis("off")
    return fig
