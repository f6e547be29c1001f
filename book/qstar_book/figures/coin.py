"""What a draft has in common with q*: the share that is kept."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy import ndarray

from .style import COLOURS, LINES

MIXTURE = {"color": "#555555", "linestyle": "-", "linewidth": 1.8}
SHADES = {"policy": COLOURS["policy"], "teacher": COLOURS["teacher"], "mixture": "#555555"}


def draft_overlaps(
    target: ndarray, drafts: Mapping[str, ndarray], *, axes: Sequence[Axes]
) -> Sequence[Axes]:
    """Each draft distribution against q*, and filled in what both have: the acceptance.

    Args:
        target: q*'s probabilities of some tokens. Shape (tokens,).
        drafts: By name, one of `SHADES`, a draft's. Shape (tokens,).
        axes: Where to draw, one for each draft.
    """
    edges = np.arange(len(target) + 1) + 0.5
    for ax, (name, draft) in zip(axes, drafts.items(), strict=True):
        look = MIXTURE if name == "mixture" else LINES[name]
        both = np.minimum(draft, target)
        ax.stairs(both, edges, fill=True, color=SHADES[name], alpha=0.25)
        ax.stairs(target, edges, **LINES["q*"])
        ax.stairs(draft, edges, **look)
        ax.set_xticks(range(1, len(target) + 1))
        ax.set_xlabel("a coin chooses" if name == "mixture" else f"{name} proposes")
        ax.set_title(f"keeps {both.sum():.2f}", fontsize=10.5)
    axes[0].set_ylabel("probability")
    return axes
