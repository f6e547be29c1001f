"""Figures of decoding show what they are given: slots, curves, intervals, and who proposed."""

from types import SimpleNamespace

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest

from qstar_book import figures

mpl.use("Agg")


@pytest.fixture
def ax():
    with figures.in_style():
        fig, ax = plt.subplots()
        yield ax
        fig.canvas.draw()
        plt.close(fig)


def test_a_round_shows_every_slot_and_marks_what_is_taken_back(ax):
    steps = [
        ("policy", [("a", "cached"), ("b", "read"), ("c", "next")], "proposes"),
        ("teacher", [("b", "read"), ("c", "masked")], "rejects"),
    ]
    figures.one_round(steps, ax=ax)
    boxes = ax.patches
    assert len(boxes) == 5
    assert [bool(box.get_hatch()) for box in boxes] == [False] * 4 + [True]
    words = [text.get_text() for text in ax.texts]
    assert words == ["policy", "a", "b", "c", "proposes", "teacher", "b", "c", "rejects"]
    (shaft, _) = ax.lines  # an arrow from the proposal of the policy to where the teacher reads it
    assert {mpl.colors.to_hex(line.get_color()) for line in ax.lines} == {
        figures.COLOURS["policy"].lower()
    }
    assert set(shaft.get_xdata()) == {1.5}
    proposal = mpl.colors.to_hex(boxes[2].get_edgecolor())
    assert proposal == figures.COLOURS["policy"].lower()


def test_a_draft_has_the_colour_of_the_other_parent(ax):
    figures.one_round([("teacher", [("b", "read"), ("c", "draft")], "")], ax=ax)
    assert mpl.colors.to_hex(ax.patches[1].get_edgecolor()) == figures.COLOURS["policy"].lower()


def test_costs_by_width_are_drawn_as_given(ax):
    curves = {"as loaded": (np.array([1, 2, 4]), np.array([1.0, 1.6, 1.7]))}
    figures.width_costs(curves, ax=ax)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [1.0, 1.6, 1.7])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "2", "4"]


def test_marks_lie_where_they_were_counted(ax):
    grid = np.linspace(0, 1, 5)
    curves = {"alternating 1": 2 - grid, "alternating 2": 3 - 2 * grid}
    figures.forwards_by_acceptance(grid, curves, {"alternating 2": (0.9, 1.2)}, ax=ax)
    marks = [line for line in ax.lines if line.get_marker() not in (None, "None", "")]
    assert [(m.get_xdata()[0], m.get_ydata()[0]) for m in marks] == [(0.9, 1.2)]


def test_a_recorded_mark_is_named_and_no_two_hide_each_other(ax):
    grid = np.linspace(0, 1, 5)
    curves = {"alternating 1": 2 - grid, "alternating 2": 3 - 2 * grid, "one-sided 4": 4 - 3 * grid}
    points = {name: (0.9, 1.2) for name in ("alternating 1", "alternating 2")}
    figures.forwards_by_acceptance(grid, curves, points, ax=ax)
    named = [text.get_text() for text in ax.get_legend().get_texts()]
    assert named == [
        "alternating 1, recorded", "alternating 2, recorded", "one-sided 4",
    ]  # fmt: skip
    marks = [line for line in ax.lines if line.get_marker() not in (None, "None", "")]
    assert len({mark.get_markersize() for mark in marks}) == 2
    assert {mark.get_markerfacecolor() for mark in marks} == {"white"}


def test_a_ratio_has_its_interval(ax):
    groups = {"one": {"auto": (1.2, 1.1, 1.4)}, "two": {"transformers": (0.9, 0.8, 1.0)}}
    figures.speed_ratios(groups, ax=ax)
    spans = [tuple(line.get_xdata()) for line in ax.lines[:-1]]
    assert spans == [(1.1, 1.4), (1.2,), (0.8, 1.0), (0.9,)]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["auto", "transformers"]


def test_a_trace_names_the_tokens_that_were_drawn():
    row = np.array([0.4, 0.5, 0.6])
    trace = SimpleNamespace(
        alpha=row, balance=SimpleNamespace(alpha=row, chernoff=row), policy_to_teacher=row,
        teacher_to_policy=row, accept_policy=row, accept_teacher=row,
    )  # fmt: skip
    with figures.in_style():
        fig = figures.decode_trace(trace, [" sea", "\n", " $5"], fig=plt.figure())
        fig.canvas.draw()
    bottom = fig.axes[-1]
    assert [tick.get_text() for tick in bottom.get_xticklabels()] == ["sea", "␣", r"\$5"]
    np.testing.assert_array_equal(bottom.get_xticks(), [1, 2, 3])
    plt.close(fig)


def test_a_proposed_text_says_who_and_is_safe_to_show():
    page = figures.proposed_text(
        ["<b>", " sea", "\n"], ["policy", "teacher", "none"], [True, False, False], [0.5, 0.25, 1.0]
    )
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    assert "policy proposed, kept; acceptance probability 0.50" in page
    assert "teacher proposed, replaced; acceptance probability 0.25" in page
    assert "drawn from q*, not proposed" in page
    assert page.count("dashed") == 1  # the key alone: the teacher's proposal was replaced
