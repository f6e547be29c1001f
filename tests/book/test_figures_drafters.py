"""Figures and tables of draft models and of what is answered show what they are given."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest

from qstar_book import figures

mpl.use("Agg")


def test_a_table_has_its_heads_and_is_safe_to_show():
    page = figures.table(("rule", "<cost>"), [("a & b", "0.5"), ("c", "1.5")])
    assert page.count("<th ") == 2
    assert page.count("<td ") == 4
    assert "&lt;cost&gt;" in page
    assert "a &amp; b" in page
    assert "<cost>" not in page


def test_only_columns_of_numbers_end_on_one_line():
    page = figures.table(("rule", "cost", "said"), [("2", "-0.5 to 1", "5"), ("c", "1.5", "5, 6")])
    assert page.count('style="text-align:right;white-space:nowrap"') == 3
    assert page.count('style="text-align:left"') == 6
    page = figures.table(("rule", "said"), [("specialists", "word"), ("c", "x" * 17)])
    assert page.count('style="text-align:left"') == 3  # words that fit stay whole
    assert page.count("overflow-wrap:anywhere") == 3


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="zip"):
        figures.table(("a",), [("one", "more")])


@pytest.mark.parametrize("pairs", [1, 3, 4])
def test_each_pair_has_a_panel_with_its_distributions(pairs):
    one = {"policy": ((0.5, 0.4, 0.6), [0.5]), "q*": ((0.3, 0.2, 0.4), [0.3])}
    with figures.in_style():
        fig = figures.target_scores({f"pair {i}": one for i in range(pairs)}, fig=plt.figure())
        fig.canvas.draw()
    shown = [ax for ax in fig.axes if ax.axison]
    assert [ax.get_title() for ax in shown] == [f"pair {i}" for i in range(pairs)]
    for ax in shown:
        assert [line.get_xdata()[0] for line in ax.lines[2::3]] == [0.5, 0.3]
    plt.close(fig)


def test_the_power_of_each_pair_stands_at_its_shares():
    shares = np.array([0.1, 1.0])
    pairs = {"one": (shares, np.array([0.0, 0.9])), "two": (shares, np.array([0.2, 1.0]))}
    with figures.in_style():
        fig, ax = plt.subplots()
        figures.sampler_power(pairs, 0.01, ax=ax)
        plt.close(fig)
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines[:2]]
    assert drawn == [([0.1, 1.0], [0.0, 0.9]), ([0.1, 1.0], [0.2, 1.0])]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["one", "two"]
    assert len({line.get_linestyle() for line in ax.lines[:2]}) == 2
