"""Figures of whole sequences and of high dimension: their marks say what their records say."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from qstar_book import figures

LENGTHS = np.arange(1, 9)
FALLING = np.exp(-0.5 * LENGTHS)


def new_figure():
    return Figure(figsize=(figures.WIDTH, 4), layout="constrained")


def heights(ax):
    return [bar.get_height() for bar in ax.patches]


def test_two_means_draws_a_bar_of_each_law_for_every_sequence():
    token, whole = np.array([0.25, 0.25, 0.5]), np.array([0.1, 0.2, 0.7])
    ax = figures.two_means(["a", "b", "c"], token, whole, ax=new_figure().subplots())
    np.testing.assert_allclose(heights(ax), [*token, *whole])
    hatches = {bar.get_hatch() for bar in ax.patches}
    assert len(hatches) == 2, "the two laws differ without colour"


def test_the_limit_of_the_gap_has_its_slope_and_ends_in_the_last_point():
    gaps = 0.3 * LENGTHS - 0.2
    ax = figures.gap_growth(LENGTHS, gaps, 0.25, ax=new_figure().subplots())
    limit, points = (line.get_ydata() for line in ax.lines)
    np.testing.assert_allclose(np.diff(limit), 0.25)
    np.testing.assert_allclose([points[-1], limit[-1]], gaps[-1])


def test_useful_shares_are_drawn_as_given():
    measured = np.array([2, 8]), np.array([0.5, 0.2])
    ax = figures.useful_share(LENGTHS, FALLING, FALLING**0.5, measured, ax=new_figure().subplots())
    drawn = [line.get_ydata() for line in ax.lines]
    for values, expected in zip(drawn, (FALLING, FALLING**0.5, measured[1]), strict=True):
        np.testing.assert_allclose(values, expected)
    looks = {(str(line._unscaled_dash_pattern), line.get_marker()) for line in ax.lines}
    assert len(looks) == 3, "told apart without colour"


def test_answers_stand_with_their_mean_and_two_standard_errors():
    sums = np.array([1.0, 2.0, 3.0, 6.0])
    estimates = {"one way": (np.array([1.9, 2.1]), 2.0, 0.1)}
    ax = figures.answer_divergences(sums, estimates, ax=new_figure().subplots())
    centres = [container.lines[0].get_xdata()[0] for container in ax.containers]
    np.testing.assert_allclose(centres, [sums.mean(), 2.0])
    bar = ax.containers[1].lines[2][0].get_segments()[0]
    np.testing.assert_allclose(bar[:, 0], [1.8, 2.2])


def test_every_collapse_has_its_exponential_bound():
    shown = {"ours": ("policy", FALLING / 2), "theirs": ("teacher", FALLING / 3)}
    rates = {"ours": 0.5, "theirs": 0.4}
    ax = figures.collapse(LENGTHS, shown, rates, ax=new_figure().subplots())
    curves = [line.get_ydata() for line in ax.lines[:4]]
    np.testing.assert_allclose(curves[0], FALLING / 2)
    np.testing.assert_allclose(curves[1], FALLING)
    np.testing.assert_allclose(curves[3], np.exp(-0.4 * LENGTHS))


def test_shells_draw_the_three_parties_in_every_panel():
    radii = np.linspace(0, 3, 31)
    laws = {party: np.exp(-((radii - at) ** 2)) for party, at in (("policy", 1), ("teacher", 2))}
    laws["q*"] = np.exp(-((radii - 1.5) ** 2))
    fig = figures.shells((2, 20), radii, [laws, laws], fig=new_figure())
    assert [len(ax.lines) for ax in fig.axes] == [3, 3]
    fig.canvas.draw()


def test_shares_lie_where_the_formula_puts_them():
    ratios = np.array([0.5, 1.0, 2.0])
    shares = 0.4 * ratios / (0.4 * ratios + 0.6)
    grid = np.geomspace(0.2, 5, 41)
    curve = 0.4 * grid / (0.4 * grid + 0.6)
    ax = figures.precision_shares(ratios, shares, grid, curve, 0.4, ax=new_figure().subplots())
    line, dots = ax.lines[:2]
    at = np.interp(dots.get_xdata(), line.get_xdata(), line.get_ydata())
    np.testing.assert_allclose(at, dots.get_ydata(), atol=1e-2)


@pytest.mark.parametrize("party", ["policy", "teacher", "q*"])
def test_the_overlap_s_divergence_is_drawn_for_each_party(party):
    values = {"policy": FALLING, "teacher": FALLING / 2, "q*": FALLING / 3}
    ax = figures.overlap_law(LENGTHS, values, ax=new_figure().subplots())
    (line,) = [x for x in ax.lines if x.get_color() == figures.COLOURS[party]]
    np.testing.assert_allclose(line.get_ydata(), values[party])
