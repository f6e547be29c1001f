"""Figures of trainings: their marks say what their records say."""

import numpy as np
from matplotlib.figure import Figure

from qstar_book import figures

STEPS = [0, 1, 10]


def new_figure():
    return Figure(figsize=(figures.WIDTH, 4), layout="constrained")


def test_a_trajectory_stands_above_its_exponents_and_in_the_column_of_its_training():
    near, far = np.array([2.0, 1.0, np.nan]), np.array([3.0, 2.0, 1.0])
    quantiles = np.full((3, 3), 0.5)
    trainings = {
        name: {"its end": (scale * near, quantiles), "its start": (scale * far, quantiles)}
        for name, scale in (("one", 1.0), ("other", 2.0))
    }
    fig = figures.trajectories(STEPS, trainings, fig=new_figure())
    for column, scale in enumerate((1.0, 2.0)):
        above, below = fig.axes[column], fig.axes[2 + column]
        for line, chernoff in zip(above.lines, (near, far), strict=True):
            np.testing.assert_array_equal(line.get_ydata(), scale * chernoff)
            np.testing.assert_array_equal(line.get_xdata(), [1, 2, 11])
        np.testing.assert_array_equal(below.lines[0].get_ydata(), quantiles[:, 1])
    assert [ax.get_title() for ax in fig.axes[:2]] == ["one", "other"]
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["its end", "its start"]


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
