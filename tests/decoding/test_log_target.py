"""The log-probabilities of drawn tokens: with them a rollout of q* is a weighted one of a parent.

Every choice is enumerated (`decoder_distributions`), so that each identity holds to rounding.
"""

import numpy as np
import pytest
import tiny
import torch
from schemes import LONGER, SHORT, asked

from qstar.decoding.enumeration import decoder_distributions, tiny_model, token_level_distribution
from qstar.decoding.generate import generate

PROMPTS = (torch.tensor([0, 2, 1]), torch.tensor([1, 1]))
EXACT = 1e-12


def enumerated(scheme, *, length=2, **options):
    """The distribution of two tokens, its rows, and what the decoder said of each row's tokens."""
    pair = tiny_model(1), tiny_model(2)
    distributions, result = decoder_distributions(
        pair, [PROMPTS], length, **asked(scheme), **options
    )
    tokens = result.tokens.numpy()
    said = {
        name: getattr(result.trace, f"log_{name}").sum(-1).numpy()
        for name in ("target", "policy", "teacher")
    }
    return pair, distributions[0], tokens, said


def distribution_of(party, pair, length=2):
    return token_level_distribution(*pair, *PROMPTS, length=length, alpha=float(party == "policy"))


def at(distribution, tokens):
    return distribution[tuple(tokens.T)]


@pytest.mark.parametrize("alpha", [None, 0.3, 1.4], ids=["solved", "alpha=.3", "guidance"])
@pytest.mark.parametrize("scheme", SHORT)
def test_the_trace_holds_the_log_probability_of_each_drawn_text(scheme, alpha):
    pair, distribution, tokens, said = enumerated(SHORT[scheme], alpha=alpha)
    np.testing.assert_allclose(said["target"], np.log(at(distribution, tokens)), atol=1e-10)
    for party in ("policy", "teacher"):
        np.testing.assert_allclose(
            said[party], np.log(at(distribution_of(party, pair), tokens)), atol=1e-10
        )


@pytest.mark.parametrize("block_verification", [False, True])
@pytest.mark.parametrize("scheme", LONGER)
def test_longer_drafts_and_blocks_say_it_too(scheme, block_verification):
    options = LONGER[scheme] | {"block_verification": block_verification}
    _, distribution, tokens, said = enumerated(options)
    np.testing.assert_allclose(said["target"], np.log(at(distribution, tokens)), atol=1e-10)


def test_after_filters_it_is_what_was_drawn_from():
    _, distribution, tokens, said = enumerated(SHORT["plain"], temperature=0.6, top_k=2)
    np.testing.assert_allclose(said["target"], np.log(at(distribution, tokens)), atol=1e-10)


def score(tokens):
    """A function of a text that is no constant: where the second token exceeds the first."""
    return 1.0 * (tokens[:, 1] > tokens[:, 0]) + 0.3 * tokens[:, 0]


@pytest.mark.parametrize("party", ["policy", "teacher"])
@pytest.mark.parametrize("scheme", SHORT)
def test_weighted_rollouts_of_q_star_are_unbiased_for_each_parent(scheme, party):
    """E_q*[parent / q* f] = E_parent[f]; without the weights, or with the other's, it is not."""
    pair, distribution, tokens, said = enumerated(SHORT[scheme])
    # The rows of one text differ in what was rejected on the way: each text counts once.
    texts, first = np.unique(tokens, axis=0, return_index=True)
    assert len(texts) == distribution.size
    chance, found = at(distribution, texts), score(texts)
    expected = at(distribution_of(party, pair), texts) @ found
    weight = np.exp(said[party] - said["target"])[first]
    assert abs(chance @ (weight * found) - expected) < EXACT
    assert abs(chance @ weight - 1) < EXACT
    other = "teacher" if party == "policy" else "policy"
    wrong = np.exp(said[other] - said["target"])[first]
    assert abs(chance @ (wrong * found) - expected) > 1e-3  # the control
    assert abs(chance @ found - expected) > 1e-3  # and no weights at all


def test_where_no_token_was_drawn_there_is_no_log_probability():
    model = tiny.llama(1)
    ids = torch.tensor([1, 4, 0])
    result = generate(
        model, tiny.llama(2), [ids] * 8, max_new_tokens=6, generator=0, eos_token_id=[0, 1]
    )
    drawn = torch.arange(6) < result.lengths[:, None]
    assert not drawn.all()
    for name in ("target", "policy", "teacher"):
        said = getattr(result.trace, f"log_{name}")
        assert said[drawn].isfinite().all()
        assert said[~drawn].isnan().all()
