"""The picture of three tokens: what touches, crosses and contains what."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy.special import rel_entr

from qstar import log_geometric_mean, solve_kl_symmetry
from qstar_book import figures
from qstar_book.figures.geometry import CORNERS

PAIRS = [([0.7, 0.2, 0.1], [0.2, 0.3, 0.5]), ([0.9, 0.05, 0.05], [0.1, 0.6, 0.3])]


def kl(p, q):
    return rel_entr(p, q).sum(axis=-1)


def distributions(points):
    """The three probabilities of points of the triangle."""
    return np.linalg.solve(
        np.vstack([CORNERS.T, np.ones(3)]), np.c_[points, np.ones(len(points))].T
    ).T


@pytest.fixture(params=PAIRS, ids=["basic", "sharp"])
def drawn(request):
    policy, teacher = map(np.array, request.param)
    logs = np.log(policy), np.log(teacher)
    balance = solve_kl_symmetry(*logs)
    q = np.exp(log_geometric_mean(*logs, balance.alpha))
    with figures.in_style():
        ax = Figure(layout="constrained").subplots()
        assert figures.simplex(policy, teacher, ax=ax) is ax
        ax.figure.canvas.draw()
    return policy, teacher, q, float(balance.chernoff), ax


def test_the_star_is_where_the_path_meets_the_bisector(drawn):
    policy, teacher, q, _, ax = drawn
    (star,) = [line for line in ax.lines if line.get_marker() == "*"]
    np.testing.assert_allclose(distributions(star.get_xydata())[0], q, atol=1e-9)
    (straight,) = [line for line in ax.lines if len(line.get_xdata()) == 2]
    ends = distributions(straight.get_xydata())
    np.testing.assert_allclose(kl(ends, policy), kl(ends, teacher), atol=1e-9)
    assert abs(q @ np.log(policy / teacher)) < 1e-9


def test_the_filled_ball_is_the_smallest_that_holds_both_parents(drawn):
    policy, teacher, q, chernoff, ax = drawn
    np.testing.assert_allclose([kl(q, policy), kl(q, teacher)], chernoff, atol=1e-9)
    filled = max(ax.patches, key=lambda patch: len(patch.get_xy()))
    edge = distributions(filled.get_xy())
    np.testing.assert_allclose(kl(q, edge), chernoff, atol=1e-6)


def test_the_two_thin_balls_touch_at_q_star(drawn):
    policy, teacher, q, chernoff, ax = drawn
    for role, parent in (("policy", policy), ("teacher", teacher)):
        (outline,) = [
            line
            for line in ax.lines
            if line.get_color() == figures.COLOURS[role] and len(line.get_xdata()) > 100
        ]
        edge = distributions(outline.get_xydata()).clip(0)
        inside = edge.min(axis=1) > 1e-6  # elsewhere the ball ends at the triangle
        np.testing.assert_allclose(kl(edge, parent)[inside], chernoff, atol=1e-6)
        assert np.abs(edge - q).sum(axis=1).min() < 0.05
