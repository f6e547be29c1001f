"""The pictures of laws that are not Gaussian say with their marks what they were given."""

import io

import numpy as np
import pytest
from matplotlib.figure import Figure

from qstar.families import Bernoulli, solve_kl_symmetry
from qstar_book import figures

BALANCE = solve_kl_symmetry(Bernoulli(0.9), Bernoulli(0.4))
ALPHAS = np.linspace(0, 1, 21)


def new_figure():
    return Figure(figsize=(figures.WIDTH, 4), layout="constrained")


def scale_law(ax):
    families = {"one": (0.1, 0.7), "two": (10.0, 0.3)}
    ratios = np.logspace(-2, 2, 9)
    return figures.one_scale_law(ratios, 1 / (1 + ratios), families, ax=ax)


def variance(ax):
    return figures.mirrored_variance(ALPHAS, 2 - ALPHAS, BALANCE, ax=ax)


def tails(ax):
    freedoms = np.geomspace(0.1, 10, 9)
    curves = {f"1 : {k}": 0.5 - k * np.log(freedoms) / 99 for k in (2, 3, 4)}
    return figures.tail_weight(freedoms, curves, [0.4, 0.3, 0.2], ax=ax)


def share(ax):
    sizes = np.array([1.0, 2.0, 4.0])
    return figures.effective_share(sizes, np.exp(-sizes / 2), np.exp(-sizes), ax=ax)


def modes(fig):
    x, rows = np.linspace(-1, 1, 11), np.ones((3, 11))
    panel = (x, rows, (np.array([0.0, 0.5]), np.array([0.2, 0.4])), BALANCE)
    return figures.modes_along_path([panel, panel], fig=fig)


def balls(fig):
    means = np.array([[0.0, 0.0], [2.0, 0.0], [1.0, 0.5]])
    ball = (means, np.array([0.5, 0.5, 0.0]), np.array([1.0, 0.0]), 1.0)
    return figures.enclosing_balls([ball], fig=fig)


@pytest.mark.parametrize("draw", [scale_law, variance, tails, share])
def test_a_figure_on_axes_returns_them_and_renders(draw):
    with figures.in_style():
        ax = new_figure().subplots()
        assert draw(ax) is ax
        ax.figure.savefig(io.BytesIO(), format="png")
    assert ax.get_title() == ""
    assert ax.get_xlabel()
    assert ax.get_ylabel()


@pytest.mark.parametrize("draw", [modes, balls])
def test_a_figure_of_panels_returns_it_and_renders(draw):
    with figures.in_style():
        fig = new_figure()
        assert draw(fig) is fig
        fig.savefig(io.BytesIO(), format="png")
    assert all(ax.get_title() == "" for ax in fig.axes)


def dots(ax, marker):
    return [
        (line.get_xdata()[0], line.get_ydata()[0])
        for line in ax.lines
        if line.get_marker() == marker
    ]


def test_every_family_has_its_dot_and_its_name():
    ax = scale_law(new_figure().subplots())
    assert dots(ax, "o") == [(0.1, 0.7), (10.0, 0.3)]
    assert {"one", "two"} <= {text.get_text() for text in ax.texts}


def test_the_star_lies_on_the_curve_of_the_variance():
    ax = variance(new_figure().subplots())
    assert dots(ax, "*") == [pytest.approx((BALANCE.alpha, 2 - BALANCE.alpha))]


def test_gaussian_limits_stand_at_the_right_edge():
    ax = tails(new_figure().subplots())
    assert dots(ax, "<") == [pytest.approx((10.0, limit)) for limit in (0.4, 0.3, 0.2)]


def test_an_expert_of_weight_zero_is_hollow_and_inside():
    ax = balls(new_figure()).axes[0]
    hollow = [line for line in ax.lines if line.get_markerfacecolor() == "white"]
    assert [(*line.get_xdata(), *line.get_ydata()) for line in hollow] == [(1.0, 0.5)]
    assert dots(ax, "*") == [(1.0, 0.0)]
    assert "0" in {text.get_text() for text in ax.texts}


def test_modes_stand_at_their_place_and_alpha():
    fig = modes(new_figure())
    for ax in fig.axes[2:]:
        (line,) = [line for line in ax.lines if line.get_marker() == "."]
        assert (list(line.get_xdata()), list(line.get_ydata())) == ([0.0, 0.5], [0.2, 0.4])


def crossed_by(ax, x, y):
    """The labels of a figure that one of these points lies under."""
    ax.figure.canvas.draw()
    points = ax.transData.transform(np.stack([x, y], axis=-1))
    return [
        text.get_text()
        for text in ax.texts
        if any(text.get_window_extent().contains(*point) for point in points)
    ]


def law(ratio):
    return 1 / np.log(ratio) - 1 / (ratio - 1)


def test_no_label_of_the_scale_law_says_what_is_false_of_a_family():
    """A smaller rate is a narrower inverse gamma, and a shifted Gumbel."""
    with figures.in_style():
        ax = new_figure().subplots()
        names = ["Gumbel", "inverse gamma", "Laplace", "Weibull, shape 1.5", "Maxwell", "Pareto"]
        places = np.logspace(-2.3, 2.1, 11)[: len(names)]
        families = {name: (r, law(r)) for name, r in zip(names, places, strict=True)}
        ratios = np.logspace(-3.5, 3.3, 300)
        figures.one_scale_law(ratios, law(ratios), families, ax=ax)
        ax.figure.canvas.draw()
        frame = ax.get_window_extent()
        for text in ax.texts:
            assert "wide" not in text.get_text()
            assert "narrow" not in text.get_text()
            assert text.get_window_extent().x0 > frame.x0, "it stands over the axis"


def test_a_ratio_of_scales_stands_on_its_own_curve_and_on_no_other():
    freedoms = np.geomspace(0.25, 30, 40)
    fall = {"1 : 2": 0.03, "1 : 10": 0.075, "1 : 100": 0.11}
    curves = {name: 0.5 - k * np.log(freedoms) for name, k in fall.items()}
    with figures.in_style():
        ax = new_figure().subplots()
        figures.tail_weight(freedoms, curves, [0.4, 0.3, 0.2], ax=ax)
        for name, curve in curves.items():
            assert crossed_by(ax, freedoms, curve) == [], name


def test_a_decade_of_shares_has_three_ticks():
    with figures.in_style():
        ax = share(new_figure().subplots())
        ax.figure.canvas.draw()
        ticks = [t.get_text() for t in ax.yaxis.get_ticklabels(which="both") if t.get_text()]
    low, high = ax.get_ylim()
    assert "1" in ticks
    assert len(ticks) <= 3 * np.log10(high / low) + 1
