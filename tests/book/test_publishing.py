"""A chapter may publish plain values and figures, and only verdicts that there are."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from qstar_book import publishing


@pytest.fixture
def glued(monkeypatch):
    found = {}

    def glue(key, value, display):
        assert display is False
        found[key] = value

    monkeypatch.setattr(publishing, "glue", glue)
    return found


def test_values_are_glued_under_their_keys(glued):
    figure = plt.figure()
    publishing.publish({"a": 1.5, "b": "word", "c": True, "d": figure})
    plt.close(figure)
    assert glued == {"a": 1.5, "b": "word", "c": True, "d": figure}


@pytest.mark.parametrize("value", [np.float64(1.0), np.array(1), None, [1]])
def test_what_is_no_plain_value_is_refused(glued, value):
    with pytest.raises(TypeError, match="a must be a plain float, int, str or bool"):
        publishing.publish({"a": value})
    assert glued == {}


def test_a_verdict_is_glued_under_its_claim_and_is_one_that_there_is(glued):
    publishing.decide("fair", "refuted")
    assert glued == {"claim-fair": "refuted"}
    with pytest.raises(ValueError, match="a verdict is one of confirmed"):
        publishing.decide("fair", "unclear")


def test_each_cell_of_a_table_has_a_key_of_its_own():
    head = ("pair", "way", "p", "right, all")
    rows = [("one", "q*", "0.1", "+0.2"), ("one", "q", "0.3", "+0.4"), ("two", "q*", 5, "x")]
    told = publishing.cells_of("t", head, rows, labels=2)
    assert told == {
        "t-one-q-star-p": "0.1",
        "t-one-q-star-right-all": "+0.2",
        "t-one-q-p": "0.3",
        "t-one-q-right-all": "+0.4",
        "t-two-q-star-p": "5",
        "t-two-q-star-right-all": "x",
    }
    with pytest.raises(ValueError, match=r"shorter|longer"):
        publishing.cells_of("t", head, [("one", "q*", "0.1")])
