"""The figures of the chapter on what alpha* means: each shows its record's numbers."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from qstar import kl, log_partition, solve_kl_symmetry
from qstar.theory.hypothesis_testing import Verdicts
from qstar_book import figures

LOG_P, LOG_R = np.log([0.7, 0.2, 0.1]), np.log([0.2, 0.3, 0.5])
BALANCE = solve_kl_symmetry(LOG_P, LOG_R)
GRID = np.linspace(0.1, 10, 50)


def new_figure():
    return Figure(figsize=(figures.WIDTH, 4), layout="constrained")


def range_bound(ax):
    coins = GRID[::10], np.full(5, 0.6)
    return figures.range_bound(GRID, 0.5 + GRID / 30, (GRID, np.full(50, 0.5)), coins, ax=ax)


def ends_and_middle(ax):
    at = np.linspace(0, 1, 11)
    slopes = float(kl(LOG_P, LOG_R)), float(kl(LOG_R, LOG_P))
    return figures.ends_and_middle(at, log_partition(LOG_P, LOG_R, at), *slopes, BALANCE, ax=ax)


def token_bars(ax):
    laws = np.full((4, 3), 1 / 3)
    return figures.token_bars(["a", "b", "c"], *laws, ax=ax)


def error_exponent(ax):
    seen = {5: Verdicts(0.1, 0.01, LOG_P)}
    return figures.error_exponent([1, 5], [-1.0, -2.3], seen, seen, 0.17, ax=ax)


def rivals(ax):
    return figures.rivals({"kind": {"one": 0.1, "two": 0.2}}, {"kind": 0.05}, ax=ax)


def adversaries(ax):
    return figures.adversaries(GRID, {"half": 1 + GRID / 11, "midpoint": 1 + GRID}, ax=ax)


@pytest.mark.parametrize(
    "draw", [range_bound, ends_and_middle, token_bars, error_exponent, rivals, adversaries]
)
def test_a_figure_draws_on_the_axes_it_is_given(draw):
    fig = new_figure()
    ax = fig.subplots()
    assert draw(ax) is ax
    assert ax.get_xlabel() or draw is token_bars
    assert ax.get_title() == ""
    with figures.in_style():
        fig.canvas.draw()  # no warning, no failing layout


def test_the_star_of_ends_and_middle_sits_at_the_solution():
    ax = ends_and_middle(new_figure().subplots())
    (star,) = [line for line in ax.lines if line.get_marker() == "*"]
    np.testing.assert_allclose(star.get_xydata()[0], [BALANCE.alpha, -BALANCE.chernoff])
    slopes = sorted(
        np.diff(line.get_ydata())[0] / np.diff(line.get_xdata())[0]
        for line in ax.lines
        if len(line.get_xdata()) == 2 and np.ptp(line.get_xdata()) > 0
    )
    np.testing.assert_allclose(slopes, [-kl(LOG_R, LOG_P), kl(LOG_P, LOG_R)])


def test_rivals_says_every_excess_as_a_share_of_its_own_chernoff_information():
    with figures.in_style():
        costs = {"kind": {"one": 0.2, "two": 0.1}, "another kind": {"one": 0.1, "two": 0.3}}
        ax = figures.rivals(costs, {"kind": 0.1, "another kind": 0.2}, ax=new_figure().subplots())
        ax.figure.canvas.draw()
    said = {text.get_position(): text.get_text() for text in ax.texts}
    assert said == {(0, 0): "100%", (1, 0): "150%", (0, 1): "200%", (1, 1): "50%"}
    assert [label.get_text() for label in ax.get_yticklabels()] == ["two", "one"]


def test_the_dearer_a_rival_the_darker():
    ax = figures.rivals({"kind": {"one": 1, "two": 9}}, {"kind": 1}, ax=new_figure().subplots())
    (cells,) = ax.collections
    cheap, dear = cells.to_rgba(cells.get_array().ravel())[:, :3].sum(axis=1)
    assert cheap > dear
    assert [text.get_color() for text in ax.texts] == ["black", "white"]


def test_error_bars_are_two_standard_errors():
    ax = error_exponent(new_figure().subplots())
    segments = ax.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose(segments[0][:, 1], [0.08, 0.12])


def test_training_draws_alpha_above_chernoff():
    fig = new_figure()
    runs = {"a": (np.full(50, 0.6), np.exp(-GRID)), "b": (np.full(50, 0.4), np.exp(-2 * GRID))}
    assert figures.training(GRID, runs, fig=fig) is fig
    above, below = fig.axes
    np.testing.assert_array_equal(above.lines[0].get_ydata(), 0.6)
    np.testing.assert_array_equal(below.lines[1].get_ydata(), np.exp(-2 * GRID))
    assert below.get_yscale() == "log"


def test_the_slopes_are_written_beside_the_curve_not_over_it():
    rows = np.array([[2.4e-9, 0.27, 0.73], [0.23, 2.6e-8, 0.77]])
    pair = np.log(rows / rows.sum(axis=-1, keepdims=True))
    at = np.linspace(0, 1, 401)
    curve, slopes = log_partition(*pair, at), (float(kl(*pair)), float(kl(*pair[::-1])))
    with figures.in_style():
        ax = new_figure().subplots()
        figures.ends_and_middle(at, curve, *slopes, solve_kl_symmetry(*pair), ax=ax)
        ax.figure.canvas.draw()
        points = ax.transData.transform(np.stack([at, curve], axis=-1))
        for text in ax.texts:
            box = text.get_window_extent()
            assert not any(box.contains(*point) for point in points), text.get_text()


def test_a_rival_is_not_named_in_code():
    with figures.in_style():
        ax = new_figure().subplots()
        recorded = {"alpha 0.5": 0.1, "alpha 0.3": 0.1, "mixture alpha*": 0.1, "midpoint": 0.2}
        figures.rivals({"kind": recorded}, {"kind": 0.05}, ax=ax)
        labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels[-1] == "midpoint"
    assert not any("alpha" in label.replace(r"\alpha", "") or "*" in label for label in labels)
