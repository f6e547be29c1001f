"""The figure of the coin fills what a draft and q* have in common, and says how much that is."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

from qstar_book import figures

mpl.use("Agg")


def test_what_is_filled_is_the_acceptance():
    target, drafts = np.array([0.5, 0.3, 0.2]), {"policy": np.array([0.7, 0.2, 0.1])}
    drafts["mixture"] = np.array([0.5, 0.25, 0.25])
    with figures.style():
        _, axes = plt.subplots(1, 2)
        figures.draft_overlaps(target, drafts, axes=axes)
    for ax, draft in zip(axes, drafts.values(), strict=True):
        filled, outline, drawn = ax.patches
        np.testing.assert_array_equal(filled.get_data().values, np.minimum(draft, target))
        np.testing.assert_array_equal(outline.get_data().values, target)
        np.testing.assert_array_equal(drawn.get_data().values, draft)
        assert ax.get_title() == f"keeps {np.minimum(draft, target).sum():.2f}"
    plt.close("all")
