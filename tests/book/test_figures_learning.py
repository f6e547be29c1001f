"""Figures of trainings: their marks say what their records say."""

import numpy as np
from matplotlib.figure import Figure

from qstar_book import figures

STEPS = [0, 1, 10]


def new_figure():
    return Figure(figsize=(figures.WIDTH, 4), layout="constrained")


def test_a_trajectory_stands_above_its_exponents():
    chernoff, quantiles = np.array([2.0, 1.0, np.nan]), np.full((3, 3), 0.5)
    fig = figures.trajectories(STEPS, {"its end": (chernoff, quantiles)}, fig=new_figure())
    above, below = fig.axes
    np.testing.assert_array_equal(above.lines[0].get_ydata(), chernoff)
    np.testing.assert_array_equal(below.lines[0].get_ydata(), quantiles[:, 1])
    np.testing.assert_array_equal(above.lines[0].get_xdata(), [1, 2, 11])


def test_positions_stand_at_their_range_and_below_the_bound():
    ranges, away = np.array([1.0, 4.0]), np.array([0.01, 0.1])
    bound = np.array([0.5, 5.0]), np.array([0.02, 0.2])
    fig = new_figure()
    ax = figures.away_by_range(ranges, away, np.array([1e-3, 1e-2]), bound, ax=fig.subplots())
    np.testing.assert_allclose(ax.collections[0].get_offsets(), np.stack([ranges, away], 1))
    np.testing.assert_allclose(ax.lines[0].get_ydata(), bound[1])


def test_ways_to_draw_differ_without_colour_and_stand_with_their_intervals():
    mean = np.array([0.5, 0.6, 0.7])
    ways = {way: (mean, mean - 0.1, mean + 0.2) for way in ("policy", "q*", "q*, weighted")}
    fig = figures.learning_curves(STEPS, {"chance": ways, "KL": ways}, fig=new_figure())
    assert len(fig.axes) == 2
    looks = set()
    for container in fig.axes[0].containers:
        line, _, (bars,) = container.lines
        np.testing.assert_allclose(line.get_ydata(), mean)
        np.testing.assert_allclose(bars.get_segments()[0][:, 1], [0.4, 0.7])
        looks.add((line.get_marker(), str(line._unscaled_dash_pattern)))
    assert len(looks) == 3
