"""Figures of the accelerator show what was recorded: each time on its width, each interval."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.text import Text

from qstar_book import figures

mpl.use("Agg")
WIDTHS = np.array([1, 2, 4])
LAUNCHED, REPLAYED = np.array([30.0, 31.0, 32.0]), np.array([7.0, 7.5, 7.6])


@pytest.fixture
def fig():
    with figures.in_style():
        fig = plt.figure(figsize=(4.6, 3.6))
        yield fig
        fig.canvas.draw()
        written = [text for text in fig.findobj(Text) if text.get_text()]
        assert min(text.get_fontsize() for text in written) >= 10, "too small for a phone"
        plt.close(fig)


def marked(ax):
    """What is drawn with a mark, as lists of coordinates."""
    lines = [line for line in ax.lines if line.get_marker() not in ("None", "none", "", None)]
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in lines]


def test_a_forward_stands_at_its_width_above_the_floor_of_its_model(fig):
    ways = {"launched": LAUNCHED, "captured": REPLAYED}
    panels = {"small": (WIDTHS, ways, 0.5), "large": (WIDTHS, ways, 3.2)}
    assert figures.forward_times(panels, fig=fig) is fig
    for ax, (heading, (_, _, floor)) in zip(fig.axes, panels.items(), strict=True):
        drawn = marked(ax)
        assert drawn == [([1, 2, 4], list(LAUNCHED)), ([1, 2, 4], list(REPLAYED))]
        assert list(ax.lines[-1].get_ydata()) == [floor, floor]
        assert ax.get_xlabel().endswith(heading)
    named = [text.get_text() for text in fig.legends[0].get_texts()]
    assert named == ["launched", "captured", "reading the weights once"]


def test_a_solver_s_times_stand_in_the_row_of_their_size(fig):
    rows = {"32,000 × 1": {"a": 0.02, "b": 0.03}, "151,936 × 8": {"a": 0.09, "b": 0.06}}
    ax = figures.solver_times(rows, ax=fig.subplots())
    assert marked(ax) == [([0.02], [0]), ([0.03], [0]), ([0.09], [1]), ([0.06], [1])]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == list(rows)
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["a", "b"]


def test_the_parts_of_a_round_follow_each_other(fig):
    rows = {"plain": {"models": 14.0, "rest": 0.5, "host": 1.0}}
    ax = figures.round_shares(rows, ax=fig.subplots())
    bars = [(bar.get_x(), bar.get_width()) for bar in ax.patches]
    assert bars == [(0.0, 14.0), (14.0, 0.5), (14.5, 1.0)]
    assert [text.get_text().strip() for text in ax.texts] == ["15.5"]
    assert len({str(bar.get_facecolor()) for bar in ax.patches}) == 3
    assert [bool(bar.get_hatch()) for bar in ax.patches] == [False, True, False]


def test_a_gain_has_its_interval_and_its_promise(fig):
    grid = np.array([0.6, 0.9])
    curves = {"alternating": (grid, np.array([1.4, 1.7])), "coin": (grid, np.array([1.5, 1.8]))}
    gains = {"alternating": [(0.6, 1.3, 1.2, 1.35)], "coin": [(0.9, 1.75, 1.7, 1.8)]}
    alone = {"alternating": [(0.6, 1.35)], "coin": [(0.9, 1.8)]}
    ax = figures.speed_by_acceptance(gains, alone, curves, ax=fig.subplots())
    spans = [
        tuple(line.get_ydata())
        for line in ax.lines
        if len(line.get_xdata()) == 2 and len(set(line.get_xdata())) == 1
    ]
    assert spans == [(1.2, 1.35), (1.7, 1.8)]
    shown = np.array([(x[0], y[0]) for x, y in marked(ax) if x])
    expected = np.array([(0.6, 1.3), (0.6, 1.35), (0.9, 1.75), (0.9, 1.8)])
    assert list(shown[:, 1]) == list(expected[:, 1])
    assert np.abs(shown[:, 0] - expected[:, 0]).max() < 0.005  # side by side
    promised = [list(line.get_ydata()) for line in ax.lines if list(line.get_xdata()) == [0.6, 0.9]]
    assert promised == [[1.4, 1.7], [1.5, 1.8]]


def test_a_way_goes_from_its_count_to_its_clock_under_the_ceiling_of_its_pair(fig):
    near, far = (1.9, 1.8, 1.7, 1.6, 1.75), (1.1, 1.0, 0.9, 0.8, 1.05)
    groups = {"near": {"coin": near}, "far": {"auto": far}}
    ax = figures.count_to_clock(groups, {"near": 1.85, "far": 1.8}, ax=fig.subplots())
    places = zip((1, 3.4), (near, far), strict=True)
    assert marked(ax) == [([x], [y]) for y, row in places for x in row[:3]]
    spans = [tuple(x.get_xdata()) for x in ax.lines if len(set(x.get_ydata())) == 1]
    assert {near[3:], far[3:]} <= set(spans)
    upright = [tuple(x.get_xdata()) for x in ax.lines if len(set(x.get_ydata())) == 2]
    assert upright == [(1.85, 1.85), (1.8, 1.8), (1, 1)]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["coin", "auto"]


def test_tokens_are_there_from_the_moment_they_came(fig):
    panels = {
        "one": {"plain": [(0.5, 1), (1.0, 1), (1.5, 1)], "coin": [(0.6, 2), (0.9, 3)]},
        "two": {"coin": [(0.2, 4)]},
    }
    axes = figures.arrivals(panels, fig=fig).axes
    assert [ax.get_title(loc="left") for ax in axes] == ["one", "two"]
    shown = {
        (ax.get_title(loc="left"), x.get_label()): (list(x.get_xdata()), list(x.get_ydata()))
        for ax in axes
        for x in ax.lines
    }
    assert shown == {
        ("one", "plain"): ([0, 0.5, 1.0, 1.5], [0, 1, 2, 3]),
        ("one", "coin"): ([0, 0.6, 0.9], [0, 2, 5]),
        ("two", "coin"): ([0, 0.2], [0, 4]),
    }
    assert {x.get_drawstyle() for ax in axes for x in ax.lines} == {"steps-post"}
    (legend,) = fig.legends
    assert [text.get_text() for text in legend.get_texts()] == ["plain", "coin"]
    of_coin = [x for ax in axes for x in ax.lines if x.get_label() == "coin"]
    assert len({(x.get_color(), x.get_linestyle()) for x in of_coin}) == 1
