"""Figures: each says with its marks what its record says, in the one style."""

import io
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from qstar.gaussian import Gaussian, geometric_mean, kl_to_parents, log_partition, solve_pair
from qstar_book import figures

CROSSED = solve_pair(
    "crossed", Gaussian([-2, -1], np.diag([4, 1])), Gaussian([1, 2], np.diag([0.5, 3]))
)
ALPHAS = np.linspace(0, 1, 41)


def new_figure():
    """A figure without a window or a global state."""
    return Figure(figsize=(figures.WIDTH, 4), layout="constrained")


def new_axes():
    return new_figure().subplots()


def crossing(ax):
    to_policy, to_teacher = kl_to_parents(CROSSED.policy, CROSSED.teacher, ALPHAS)
    minus_log_z = -log_partition(CROSSED.policy, CROSSED.teacher, ALPHAS)
    return figures.kl_crossing(
        ALPHAS, to_policy, to_teacher, CROSSED.balance, ax=ax, minus_log_partition=minus_log_z
    )


def evolution(fig):
    path = [geometric_mean(CROSSED.policy, CROSSED.teacher, at) for at in ALPHAS]
    divergences = kl_to_parents(CROSSED.policy, CROSSED.teacher, ALPHAS)
    return figures.path_evolution(CROSSED, ALPHAS, path, *divergences, fig=fig)


def densities(fig):
    pair = solve_pair("one axis", Gaussian(-1.0, 1.0), Gaussian(1.0, 2.0))
    x = np.linspace(-5, 5, 101)
    rows = np.exp([g.log_density(x[:, None]) for g in (pair.policy, pair.teacher, pair.q_star)])
    return figures.densities([(pair, x, rows), (pair, x, rows)], fig=fig)


BELLS = solve_pair("bells", Gaussian(-2.0, 0.6), Gaussian(2.0, 2.5))


def balanced(ax):
    x = np.linspace(-6, 7, 131)
    parties = BELLS.policy, BELLS.teacher, BELLS.q_star
    return figures.balanced(BELLS, x, np.exp([p.log_density(x[:, None]) for p in parties]), ax=ax)


def scale_law(ax):
    pair = solve_pair("row", Gaussian([0, 0], np.eye(2)), Gaussian([0, 0], 4 * np.eye(2)))
    ratios = np.logspace(-1, 1, 21)
    return figures.scale_law(ratios, 1 / (1 + ratios), ratios / (1 + ratios), [pair], ax=ax)


def covariance_rules(ax):
    return figures.covariance_rules(CROSSED, Gaussian([0, 0], 2 * np.eye(2)), ax=ax)


CONCENTRIC = solve_pair(
    "one mean", Gaussian([0, 0], [[3, 1.2], [1.2, 1]]), Gaussian([0, 0], np.diag([0.5, 2.5]))
)
AVERAGED = Gaussian(
    [0, 0],
    CONCENTRIC.balance.alpha * CONCENTRIC.policy.covariance
    + (1 - CONCENTRIC.balance.alpha) * CONCENTRIC.teacher.covariance,
)
LINE = solve_pair("on the line", Gaussian(-1.5, 0.5), Gaussian(1.5, 2.0))


def precision_ellipses(ax):
    return figures.precision_ellipses(CONCENTRIC, AVERAGED, ax=ax)


def density_path(ax):
    x, alphas = np.linspace(-5, 7, 101), np.linspace(0, 1, 5)
    steps = [geometric_mean(LINE.policy, LINE.teacher, alpha) for alpha in alphas]
    rows = np.exp([step.log_density(x[:, None]) for step in steps])
    return figures.density_path(x, alphas, rows, LINE, ax=ax)


def kl_order(ax):
    ratios = np.array([-1.0, 2.0]), np.array([0.5, -0.5])
    return figures.kl_order(ratios, (ratios[0] / 9 + 0.5, ratios[1] / 9 + 0.5), ("a", "b"), ax=ax)


def loop_bias(ax):
    counts = np.arange(4)
    bias = {"a": counts / 9, "b": counts / 18, "c": counts / 36}
    return figures.loop_bias(counts, bias, {"a": {2: 0.1}, "c": {2: 0.0, 3: 0.02}}, ax=ax)


def alpha_acceptance(ax):
    pairs = np.array([0.2, 0.5]), np.array([0.9, 0.1])
    return figures.alpha_acceptance(pairs, pairs, pairs, ax=ax)


def acceptance_bounds(ax):
    grid = np.geomspace(0.01, 5, 20)
    bounds = {"sharp": np.exp(-grid), "b": 0.9 * np.exp(-grid), "c": 0.8 * np.exp(-grid)}
    attained = np.array([0.1, 1.0]), np.exp([-0.1, -1.0])
    return figures.acceptance_bounds(grid, 0 * grid + 0.9, grid, bounds, attained, ax=ax)


def redraw_panels(fig):
    panels = {"exact": ([0.2, 0.3], [0.2, 0.3]), "other": ([0.2, 0.3], [0.3, 0.2])}
    return figures.redraw_panels(panels, np.array([0.4, 0.6]), fig=fig)


ON_AXES = {
    f.__name__: f
    for f in (
        crossing,
        scale_law,
        covariance_rules,
        precision_ellipses,
        density_path,
        kl_order,
        loop_bias,
        alpha_acceptance,
        acceptance_bounds,
    )
}
ON_FIGURE = {
    "gaussian_cases": lambda fig: figures.gaussian_cases([CROSSED] * 4, fig=fig),
    "evolution": evolution,
    "densities": densities,
    "redraw_panels": redraw_panels,
}


def lines(ax, colour):
    """The lines of one colour, markers apart."""
    return [
        line
        for line in ax.lines
        if line.get_color() == colour and line.get_linestyle() not in ("None", "none")
    ]


def star(ax):
    """Where the one star of an axes is."""
    (found,) = [line for line in ax.lines if line.get_marker() == "*"]
    return found.get_xdata()[0], found.get_ydata()[0]


@pytest.mark.parametrize("draw", ON_AXES.values(), ids=ON_AXES)
def test_a_figure_on_axes_returns_them_and_renders(draw):
    with figures.in_style():
        ax = new_axes()
        assert draw(ax) is ax
        ax.figure.savefig(io.BytesIO(), format="png")
    assert ax.get_title() == ""
    assert ax.get_xlabel()
    assert ax.get_ylabel()


@pytest.mark.parametrize("draw", ON_FIGURE.values(), ids=ON_FIGURE)
def test_a_figure_of_panels_returns_it_and_renders(draw):
    with figures.in_style():
        fig = new_figure()
        assert draw(fig) is fig
        fig.savefig(io.BytesIO(), format="png")
    assert all(ax.get_title() == "" for ax in fig.axes)


def test_the_star_stands_where_the_divergences_cross():
    ax = crossing(new_axes())
    assert star(ax) == (CROSSED.balance.alpha, CROSSED.balance.chernoff)
    (policy,), (teacher,) = (lines(ax, figures.COLOURS[role]) for role in ("policy", "teacher"))
    for curve in (policy, teacher):
        height = np.interp(CROSSED.balance.alpha, curve.get_xdata(), curve.get_ydata())
        assert height == pytest.approx(CROSSED.balance.chernoff, rel=0.01)
    texts = [text.get_text() for text in ax.texts]
    assert any(f"{CROSSED.balance.alpha:.3f}" in text for text in texts)


def label_of(ax):
    """The box of the label at the crossing, in pixels, and what is not to be in it."""
    ax.figure.canvas.draw()
    (label,) = [text for text in ax.texts if "alpha" in text.get_text()]
    return label.get_window_extent(), ax.get_legend().get_window_extent()


@pytest.mark.parametrize("distance", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("spread", [0.25, 1.0, 4.0])
def test_the_label_at_the_crossing_touches_no_curve(distance, spread):
    pair = solve_pair("", Gaussian([0, 0], np.eye(2)), Gaussian([distance, 0], spread * np.eye(2)))
    to_policy, to_teacher = kl_to_parents(pair.policy, pair.teacher, ALPHAS)
    with figures.in_style():
        ax = new_axes()
        figures.kl_crossing(ALPHAS, to_policy, to_teacher, pair.balance, ax=ax)
        box, legend = label_of(ax)
    assert not box.overlaps(legend)
    for line in ax.lines:
        dense = np.linspace(0, 1, 2001)
        if len(line.get_xdata()) == len(ALPHAS):
            height = np.interp(dense, line.get_xdata(), line.get_ydata())
            pixels = ax.transData.transform(np.column_stack([dense, height]))
            assert not any(box.contains(*at) for at in pixels)


def test_the_distributions_with_one_outcome_are_marked_in_order():
    strayed, worse = np.array([0.1, 0.5, 0.9]), np.array([0.4, 0.8, 1.4])
    alone = np.array([0.8, 1.2]), np.array([1.2, 1.6])
    with figures.in_style():
        ax = figures.minimax(strayed, worse, CROSSED.balance, alone=alone, ax=new_axes())
    (squares,) = [line for line in ax.lines if line.get_marker() == "s"]
    np.testing.assert_array_equal(squares.get_data(), alone)
    named = {text.get_text(): text.xy for text in ax.texts if "outcome" in text.get_text()}
    assert named == {"outcome 1": (0.8, 1.2), "outcome 2": (1.2, 1.6)}
    assert ax.get_xlim()[1] > 1.2


def test_the_star_of_a_symbol_is_written_one_way():
    ax = crossing(new_axes())
    fig = figures.gaussian_cases([CROSSED], fig=new_figure())
    words = [text.get_text() for text in ax.texts]
    words += [text.get_text() for legend in fig.legends for text in legend.get_texts()]
    assert any(r"\star" in word for word in words)
    assert not any("^*" in word for word in words)


def test_contours_are_one_standard_deviation_from_the_mean():
    fig = figures.gaussian_cases([CROSSED], fig=new_figure())
    for law, role in ((CROSSED.policy, "policy"), (CROSSED.q_star, "q*")):
        distances = set()
        for line in lines(fig.axes[0], figures.COLOURS[role]):
            step = np.array(line.get_data()).T - law.mean
            squared = np.einsum("ni,ij,nj->n", step, np.linalg.inv(law.covariance), step)
            assert np.ptp(np.sqrt(squared)) < 1e-9
            distances.add(round(float(np.sqrt(squared).mean()), 9))
        assert distances == {1.0}


def test_every_panel_has_one_scale_for_both_axes_and_shows_the_whole_pair():
    other = solve_pair("other", Gaussian([0, 9], np.eye(2)), Gaussian([2, 9], np.eye(2)))
    fig = figures.gaussian_cases([CROSSED, other], fig=new_figure())
    for ax, case in zip(fig.axes, (CROSSED, other), strict=False):
        (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
        assert right - left == pytest.approx(high - low)
        assert ax.get_aspect() == 1
        assert len(ax.get_xticks()) > 1
        for law in (case.policy, case.teacher, case.q_star):
            reach = np.sqrt(np.diag(law.covariance))
            assert (law.mean - reach >= (left, low)).all()
            assert (law.mean + reach <= (right, high)).all()


def test_a_panel_says_its_case_and_alpha_star():
    fig = figures.gaussian_cases([CROSSED], fig=new_figure())
    texts = [text.get_text() for text in fig.axes[0].texts]
    assert CROSSED.name in texts
    assert any(f"{CROSSED.balance.alpha:.3f}" in text for text in texts)
    assert star(fig.axes[0]) == tuple(CROSSED.q_star.mean)


def test_the_marked_points_are_on_three_ellipses_and_the_lines_touch_the_others():
    ax = precision_ellipses(new_axes())
    (marks,) = [line for line in ax.lines if line.get_marker() == "o"]
    points = np.array(marks.get_data()).T
    assert len(np.unique(points.round(9), axis=0)) == 4
    for law in (CONCENTRIC.policy, CONCENTRIC.teacher, CONCENTRIC.q_star):
        squared = np.einsum("ni,ij,nj->n", points, np.linalg.inv(law.covariance), points)
        np.testing.assert_allclose(squared, 1, atol=1e-12)
    lines = [line for line in ax.lines if line.get_linestyle() != "None" and "_xy1" in vars(line)]
    assert len(lines) == 4
    for line in lines:
        foot = np.array(line.get_xy1())
        normal = foot / (foot @ foot)
        for law in (CONCENTRIC.policy, CONCENTRIC.teacher, AVERAGED):
            assert normal @ law.covariance @ normal == pytest.approx(1, abs=1e-12)


def test_the_path_of_densities_goes_from_teacher_to_policy():
    ax = density_path(new_axes())
    shown = {line.get_color(): line for line in ax.lines}
    for role in ("teacher", "policy", "q*"):
        law = {"teacher": LINE.teacher, "policy": LINE.policy, "q*": LINE.q_star}[role]
        x, y = shown[figures.COLOURS[role]].get_data()
        np.testing.assert_allclose(y, np.exp(law.log_density(np.asarray(x)[:, None])))
    assert len(ax.lines) == 5 + 3


def test_the_path_is_drawn_from_teacher_to_policy_through_the_star():
    fig = evolution(new_figure())
    (path,) = lines(fig.axes[0], figures.COLOURS["ink"])
    x, y = path.get_data()
    np.testing.assert_allclose([x[0], y[0]], CROSSED.teacher.mean)
    np.testing.assert_allclose([x[-1], y[-1]], CROSSED.policy.mean)
    assert star(fig.axes[0]) == tuple(CROSSED.q_star.mean)
    nearest = np.hypot(x - CROSSED.q_star.mean[0], y - CROSSED.q_star.mean[1]).min()
    assert nearest < 0.1


def test_the_three_parties_differ_without_colour():
    """In grey or to a colour-blind reader: by dash, or else by weight."""
    marks = [figures.LINES[role] for role in ("policy", "teacher", "q*")]
    assert len({(str(mark["linestyle"]), mark["linewidth"]) for mark in marks}) == 3
    policy, teacher, q_star = marks
    assert policy["linestyle"] != teacher["linestyle"]
    assert q_star["linewidth"] >= 1.5 * policy["linewidth"]


@pytest.mark.parametrize("role", figures.INK)
def test_coloured_text_has_enough_contrast_on_white(role):
    """4.5 to 1, as WCAG 2.1 asks of text (success criterion 1.4.3)."""
    channels = np.array(mpl.colors.to_rgb(figures.INK[role]))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    assert 1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05) > 4.5


def test_the_style_leaves_no_trace():
    before = dict(mpl.rcParams)
    with figures.in_style():
        assert mpl.rcParams["figure.facecolor"] == "none"
        assert mpl.rcParams["font.size"] == figures.STYLE["font.size"]
    assert dict(mpl.rcParams) == before


def test_importing_figures_opens_no_global_figure_manager():
    probe = "import sys, qstar_book.figures; print('matplotlib.pyplot' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_redrawn_mass_stands_on_the_accepted_mass():
    fig = redraw_panels(new_figure())
    for ax, tops in zip(fig.axes, ([0.4, 0.6], [0.5, 0.5]), strict=True):
        accepted, redrawn = ax.containers
        assert [bar.get_y() for bar in redrawn] == [bar.get_height() for bar in accepted]
        assert [bar.get_y() + bar.get_height() for bar in redrawn] == pytest.approx(tops)
        targets = [line.get_ydata()[0] for line in lines(ax, figures.COLOURS["q*"])]
        assert targets == [0.4, 0.6]


def test_no_two_examples_of_the_loop_s_bias_share_a_marker():
    ax = loop_bias(new_axes())
    curves = [line for line in ax.lines if len(line.get_xdata()) == 4]
    assert len({line.get_marker() for line in curves}) == 3
    hollow = [line for line in ax.lines if line.get_markerfacecolor() == "white"]
    assert [list(line.get_xdata()) for line in hollow if len(line.get_xdata())] == [[2], [2, 3]]


def test_q_star_is_drawn_between_its_parents_and_as_far_from_both():
    with figures.in_style():
        ax = balanced(new_axes())
        ax.figure.savefig(io.BytesIO(), format="png")
    peaks = {}
    for party in (BELLS.policy, BELLS.teacher, BELLS.q_star):
        name = {id(BELLS.policy): "policy", id(BELLS.teacher): "teacher"}.get(id(party), "q*")
        (curve,) = [
            line for line in lines(ax, figures.COLOURS[name]) if len(line.get_xdata()) == 131
        ]
        at = int(np.argmax(curve.get_ydata()))
        peaks[name] = curve.get_xdata()[at]
        assert peaks[name] == pytest.approx(float(party.mean[0]), abs=0.06)
        density = np.exp(party.log_density(np.array([[peaks[name]]])))
        assert curve.get_ydata()[at] == pytest.approx(float(density[0]))
    assert peaks["policy"] < peaks["q*"] < peaks["teacher"]
    said = [text.get_text() for text in ax.texts if "KL" in text.get_text()]
    assert len(said) == 2
    assert {text.rpartition(" = ")[2] for text in said} == {f"{BELLS.balance.chernoff:.2f}"}


def test_messages_are_shown_as_they_were_said():
    shown = figures.messages({"a <call>": "ValueError: x & y: got 1 < 2."})
    assert "<dt" in shown
    assert "a &lt;call&gt;" in shown
    assert "<code>ValueError</code> x &amp; y: got 1 &lt; 2." in shown
