"""The figures of the coin: what a draft and q* have in common, and the bounds of what is kept."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

from qstar_book import figures

mpl.use("Agg")


def test_what_is_filled_is_the_acceptance():
    target, drafts = np.array([0.5, 0.3, 0.2]), {"policy": np.array([0.7, 0.2, 0.1])}
    drafts["mixture"] = np.array([0.5, 0.25, 0.25])
    with figures.in_style():
        _, axes = plt.subplots(1, 2)
        figures.draft_overlaps(target, drafts, axes=axes)
    for ax, draft in zip(axes, drafts.values(), strict=True):
        filled, outline, drawn = ax.patches
        np.testing.assert_array_equal(filled.get_data().values, np.minimum(draft, target))
        np.testing.assert_array_equal(outline.get_data().values, target)
        np.testing.assert_array_equal(drawn.get_data().values, draft)
        assert ax.get_title() == f"keeps {np.minimum(draft, target).sum():.2f}"
    plt.close("all")


def test_only_the_mixture_shows_what_it_covers():
    target = np.array([0.5, 0.3, 0.2])
    drafts = {"policy": np.array([0.7, 0.2, 0.1]), "mixture": np.array([0.5, 0.25, 0.25])}
    with figures.in_style():
        _, axes = plt.subplots(1, 2)
        figures.draft_overlaps(target, drafts, axes=axes, covered=0.8 * target)
    assert [len(ax.patches) for ax in axes] == [3, 4]
    np.testing.assert_array_equal(axes[1].patches[-1].get_data().values, 0.8 * target)
    plt.close("all")


def test_what_a_coin_keeps_is_drawn_above_both_bounds():
    weights = np.linspace(0, 1, 5)
    kept, floor = np.array([0.7, 0.85, 0.9, 0.86, 0.72]), np.array([0, 0.6, 0.8, 0.6, 0])
    with figures.in_style():
        _, ax = plt.subplots()
        figures.coin_acceptance(weights, kept, floor, 0.5, ax=ax)
    mixture, below, chord, *marks = ax.lines
    np.testing.assert_array_equal(mixture.get_ydata(), kept)
    np.testing.assert_array_equal(below.get_ydata(), floor)
    np.testing.assert_array_equal(chord.get_ydata(), [0.7, 0.72])
    drawn = [tuple(np.concatenate([np.atleast_1d(x) for x in m.get_data()])) for m in marks]
    assert drawn == [(0, 0.7), (1, 0.72), (0.5, 0.8)]
    plt.close("all")
