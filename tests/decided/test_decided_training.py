"""Training: had the data come out otherwise, the verdicts would be other ones."""

import numpy as np
import pytest
from counterfactuals import Case, decide, lacking

NOTEBOOK, FEWER = "training", {"recomputed_steps": 1}
SEEDS = 0.01 * np.array([-1.0, 0.5, 0.0, 1.0, -0.5])[:, None]
WAYS = ("policy", "half", "q*", "q*, weighted", "teacher")


def curves(start=0.6, **ends):
    """Curves of five seeds from one start to these ends, by way; the others end like the policy."""
    found = {}
    for way in WAYS:
        end = ends.get(way.replace("q*", "q_star"), ends["policy"])
        noise = np.roll(SEEDS, len(way), axis=0)
        found[way] = np.linspace(start, end, 5)[None] + noise * np.linspace(0, 1, 5)
    return found


def online(policy, q_star, forwards=1.4):
    """The chances of the reward, and what a token costs."""
    return {
        "gain": curves(policy=policy, q_star=q_star),
        "costs": {"one_by_one": {"coin": {"forwards_a_token": forwards}}},
    }


def basis(policy, q_star):
    """The objective, in a training that worked."""
    return {
        "gain": curves(policy=0.8, q_star=0.8),
        "balance": curves(policy=policy, q_star=q_star),
    }


CASES = (
    Case("scenario-rlhf", "confirmed", online(0.7, 0.75), "a reward that rises for less"),
    Case("scenario-rlhf", "qualified", online(0.7, 0.65), "a reward that rises more without"),
    Case("scenario-rlhf", "qualified", online(0.7, 0.75, 2.0), "no forward that is saved"),
    Case("scenario-rlhf", "refuted", online(0.7, 0.55), "a reward that falls with q* alone"),
    Case("scenario-rlhf", "not measured", online(0.5, 0.5), "a reward that falls with all"),
    Case("foundation-for-rlhf", "confirmed", basis(0.6, 0.7), "a better objective"),
    Case("foundation-for-rlhf", "qualified", basis(0.6, 0.6), "the same objective"),
    Case("foundation-for-rlhf", "refuted", basis(0.7, 0.6), "a worse objective"),
    Case("foundation-for-rlhf", "not measured", online(0.5, 0.5), "a reward that falls with all"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_verdict_follows_the_data(case):
    assert decide(NOTEBOOK, case, CASES, FEWER) == case.verdict, case.why


def test_every_verdict_of_the_chapter_could_have_come_out_otherwise():
    assert lacking(NOTEBOOK, CASES) == []
