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
