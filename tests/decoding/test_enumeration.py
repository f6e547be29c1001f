"""Following every choice of a decoder: it finds the distribution, and sees what changes it."""

import numpy as np
import pytest
import torch
from decoder_distributions import ways_to_decode

import qstar
from qstar.decoding import costs
from qstar.decoding.enumeration import decoder_distribution, tiny_model, token_level_distribution
from qstar.decoding.generate import generate
from qstar.sampling import enumeration

PROMPTS = torch.tensor([0, 1]), torch.tensor([2, 0, 1])


@pytest.fixture(scope="module")
def pair():
    return tiny_model(1), tiny_model(2)


def test_the_token_level_distribution_is_the_product_of_geometric_means(pair):
    distribution = token_level_distribution(*pair, *PROMPTS, length=2)
    assert distribution.shape == (3, 3)
    for first in range(3):
        rows = []
        for model, prompt in zip(pair, PROMPTS, strict=True):
            text = torch.cat([prompt, torch.tensor([first])])[None]
            with torch.no_grad():
                rows.append(model(text).logits[0, -1].log_softmax(-1).numpy())
        log_q = qstar.log_geometric_mean(*rows, qstar.solve_kl_symmetry(*rows).alpha)
        np.testing.assert_allclose(
            distribution[first] / distribution[first].sum(), np.exp(log_q), atol=1e-12
        )
    assert distribution.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("gamma", [1, 2])
@pytest.mark.parametrize("alpha", [None, 0.3])
def test_every_choice_is_followed(pair, alpha, gamma):
    options = {"length": 2, "alpha": alpha}
    distribution, rows = decoder_distribution(
        *pair, *PROMPTS, scheme="alternating", gamma=gamma, **options
    )
    assert rows > 9  # more choices than outcomes
    assert distribution.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(
        distribution, token_level_distribution(*pair, *PROMPTS, **options), atol=1e-11
    )


def test_another_distribution_is_seen(pair):
    """Negative control: half in place of alpha*, and the parents exchanged."""
    wanted = token_level_distribution(*pair, *PROMPTS, length=2)
    for models, prompts, alpha in ((pair, PROMPTS, 0.5), (pair[::-1], PROMPTS, None)):
        distribution, _ = decoder_distribution(
            *models, *prompts, length=2, alpha=alpha, scheme="plain"
        )
        assert np.abs(distribution - wanted).max() > 1e-3


def test_more_choices_than_can_be_followed_are_refused(pair, monkeypatch):
    monkeypatch.setattr("qstar.decoding.enumeration.MOST_ROWS", 100)
    with pytest.raises(ValueError, match="are too many: take fewer tokens"):
        decoder_distribution(*pair, *PROMPTS, length=2, scheme="alternating", gamma=2)
    monkeypatch.setattr("qstar.decoding.enumeration.MOST_RUNS", 1)
    with pytest.raises(ValueError, match="still found in run 1: take fewer tokens"):
        decoder_distribution(*pair, *PROMPTS, length=1, scheme="plain")


def test_choices_without_a_probability_are_not_followed(pair):
    options = {"length": 3, "scheme": "alternating", "gamma": 2}
    distribution, rows = decoder_distribution(*pair, *PROMPTS, greedy=True, **options)
    assert (rows, distribution.max()) == (1, 1.0)


def test_a_forgetful_model_always_has_one_distribution():
    model = tiny_model(3, vocab=5, forgetful=True)
    with torch.no_grad():
        logits = model(torch.randint(5, (4, 7))).logits
    torch.testing.assert_close(logits, logits[:1, :1].expand_as(logits), rtol=0, atol=1e-12)


def test_a_tiny_model_leaves_torchs_random_numbers_alone():
    before = torch.random.get_rng_state()
    first, again = tiny_model(1), tiny_model(1)
    assert torch.equal(before, torch.random.get_rng_state())
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    tokens = generate(first, again, PROMPTS[0], max_new_tokens=9, generator=0, alpha=1).tokens
    assert len(tokens) == 9  # nothing ends its texts


@pytest.mark.parametrize(
    ("scheme", "gamma", "length"),
    [("alternating", 1, 2), ("alternating", 2, 2), ("one-sided", 2, 2)],
)
def test_the_expected_forwards_are_the_mean_over_every_choice(scheme, gamma, length):
    """Of a pair whose acceptance is the same everywhere: not on average, exactly.

    The policy is the better drafter, which the decoder takes it for before it has seen either.
    """
    pair = [tiny_model(seed, vocab=2, forgetful=True) for seed in (2, 1)]
    options = {"scheme": scheme, "gamma": gamma, "max_new_tokens": length}
    if scheme == "one-sided":
        options["drafter"] = "teacher"
    run = ways_to_decode(*pair, PROMPTS[0] % 2, **options)
    traces = enumeration.every_outcome(lambda chance: run(chance).trace, (1,))
    mean = 0.0
    for trace, weight in traces:
        mean += float(weight) * trace.forwards
        policy, teacher = float(trace.accept_policy[0]), float(trace.accept_teacher[0])
    assert 0.4 < teacher < policy < 0.999
    at = (policy, teacher) if scheme == "alternating" else teacher
    expected = costs.expected_forwards(scheme, length, gamma, at)
    assert mean == pytest.approx(expected, abs=1e-9)
    wrong = (policy / 2, teacher / 2) if scheme == "alternating" else teacher / 2
    assert abs(mean - costs.expected_forwards(scheme, length, gamma, wrong)) > 0.01


def test_expected_forwards_of_many_tokens_are_the_rate():
    for scheme, gamma, at in (("alternating", 2, (0.9, 0.5)), ("one-sided", 4, 0.8)):
        rate = costs.forwards_per_token(scheme, gamma, at)
        assert costs.expected_forwards(scheme, 4000, gamma, at) / 4000 == pytest.approx(
            rate, abs=2e-3
        )
    assert costs.expected_forwards("plain", 7) == 14
    assert costs.expected_forwards("alternating", 7, 1, 0.25) == pytest.approx(
        costs.expected_forwards_alternating(7, 6 * 0.75), abs=1e-12
    )
    for given, message in (
        (("lookup", 3, 1, 0.5), "plain, one-sided or alternating"),
        (("alternating", 0, 1, 0.5), "num_tokens must be a whole number, 1 or more: got 0"),
        (("alternating", 3, 1, 1.5), r"lies in \[0, 1\]"),
        (("one-sided", 3, 1, (0.5, 0.6)), "one acceptance"),
    ):
        with pytest.raises(ValueError, match=message):
            costs.expected_forwards(*given)
