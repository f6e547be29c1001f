"""The figures of pairs show each answer once, and shares that end at one."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

from qstar_book import figures

mpl.use("Agg")


def test_every_answer_is_a_dot_in_the_row_of_its_pair():
    found = {
        "one": {"general": [0.1, 0.2], "sums": [0.3]},
        "two": {"general": [0.01], "sums": [0.02, 0.04]},
    }
    _, ax = plt.subplots()
    figures.divergence_by_question(found, ax=ax)
    dots = [line for line in ax.lines if line.get_linestyle() == "None"]
    rows = [(row, x) for row, kinds in enumerate(found.values()) for x in kinds.values()]
    for line, (row, values) in zip(dots, rows, strict=True):
        np.testing.assert_array_equal(line.get_xdata(), values)
        assert all(round(y) == row for y in line.get_ydata())
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["general", "sums"]
    plt.close("all")


def test_the_largest_come_first_and_their_shares_end_at_one():
    _, ax = plt.subplots()
    figures.concentration({"even": [1, 1, 1, 1], "one": [0, 8, 0, 0]}, ax=ax, synthetic=["one"])
    even, one, _ = ax.lines
    np.testing.assert_allclose(even.get_ydata(), even.get_xdata())
    np.testing.assert_allclose(one.get_ydata(), [0, 1, 1, 1, 1])
    assert even.get_linestyle() == "-" != one.get_linestyle()
    plt.close("all")


def test_an_acceptance_is_drawn_where_it_is_with_its_interval():
    found = {
        "one": {"policy": (0.8, 0.7, 0.9), "teacher": (0.7, 0.6, 0.75), "coin": (0.9, 0.88, 0.95)},
        "two": {"policy": (0.5, 0.4, 0.6), "teacher": (0.4, 0.3, 0.5), "coin": (0.6, 0.5, 0.7)},
    }
    _, ax = plt.subplots()
    figures.acceptances(found, ax=ax)
    drawn = [tuple(line.get_xdata()) for line in ax.lines]
    told = [
        x for row in found.values() for mean, *ends in row.values() for x in (tuple(ends), (mean,))
    ]
    assert [tuple(map(float, x)) for x in drawn] == told
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "policy",
        "teacher",
        "coin",
    ]
    plt.close("all")
