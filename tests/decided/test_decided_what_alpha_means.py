"""What alpha* means: had the data come out otherwise, the verdicts would be other ones."""

from dataclasses import replace

import numpy as np
import pytest
from counterfactuals import Case, Changed, decide, lacking

NOTEBOOK = "what_alpha_means"
FEWER = {"trials": 200, "judged": 2000, "steps": 5, "rare_steps": 110}

MANY, RECORD = "two system prompts", "temperatures 1 and 0.3"
SIDES = ("minimax", "nearest to the policy", "nearest to the teacher", "misled judge")
FOUND = dict.fromkeys(SIDES, 1e-7)  # within rounding of q*, all of them


def ends(*alphas):
    """The run with a rare token, as if its exponents had been these."""
    return {"rare_run": Changed(lambda run: replace(run, alpha=np.array(alphas)))}


def excess(kind, **found):
    names = {"half": "alpha 0.5", "low": "alpha 0.3", "high": "alpha 0.7"}
    values = {names[name]: value for name, value in found.items()}
    return {"mean_excess": Changed(lambda all: all | {kind: all[kind] | values})}


ALL_AGREE = {"best_alpha": {"one": [0.4, 0.6], "other": [0.4, 0.6]}, "stars": [0.4, 0.6]}
NONE_AGREES = {"best_alpha": {"one": [0.3, 0.6], "other": [0.5, 0.5]}, "stars": [0.4, 0.6]}
SOME_AGREE = {"best_alpha": {"one": [0.4, 0.6], "other": [0.5, 0.5]}, "stars": [0.4, 0.6]}


def shown(claim, *cases):
    return [Case(claim, *case) for case in cases]


CASES = (
    *shown(
        "relative-strength",
        ("qualified", {"strength_alphas": np.array([0.45, 0.55])}, "the sides exchanged"),
        ("confirmed", {"strength_alphas": np.array([0.45, 0.47])}, "one side only"),
        ("refuted", {"concentric": [0.4, 0.3, 0.35]}, "exponents that do not follow the width"),
    ),
    *shown(
        "variance-is-information",
        ("qualified", {"line_variances": [50.0, 1.0]}, "other variances"),
        ("confirmed", {"line_variances": [1.0, 2.0]}, "the larger entropy has more variance"),
        ("refuted", {"gauss_entropies": np.array([1.0, 2.0, 1.5])}, "entropies that fall"),
    ),
    *shown(
        "fair",
        ("qualified", {"forward_ratio": 1.5}, "another ratio"),
        ("confirmed", {"forward_ratio": 1.01}, "forward divergences that agree"),
        ("refuted", {"reverse_gap": 0.1}, "reverse divergences that do not"),
        (
            "refuted",
            {"pairs": Changed(lambda found: replace(found, chernoff=found.chernoff + 30))},
            "challengers that beat C",
        ),
    ),
    *shown(
        "both-high-probability",
        ("qualified", {"one_sided": 0.7}, "less on one side"),
        ("confirmed", {"one_sided": 0.2}, "little on one side"),
        ("refuted", {"between_slack": -0.1}, "a token below both parents"),
    ),
    *shown(
        "samples-from-the-intersection",
        ("qualified", {"one_sided": 0.7}, "less on one side"),
        ("confirmed", {"one_sided": 0.2}, "little on one side"),
        ("refuted", {"cut_q": np.full(4, 0.25)}, "mass outside one support"),
    ),
    *shown(
        "safe-region",
        ("qualified", {"within": [-20.0, -30.0]}, "other rare places"),
        ("confirmed", {"within": [-1.0, -1.0]}, "a place that both parents know"),
        ("refuted", {"between_slack": -0.1}, "a token below both parents"),
    ),
    *shown(
        "avoids-extreme-samples",
        ("qualified", {"one_sided": 0.7}, "less on one side"),
        ("confirmed", {"one_sided": 0.2}, "little on one side"),
        ("refuted", {"real_one_sided": {MANY: 0.3, RECORD: 0.3}}, "much on one side in a record"),
        ("refuted", {"fading": 1.5}, "tokens that fade faster"),
    ),
    *shown(
        "behaviour-explained",
        ("confirmed", {"off": FOUND}, "other rounding"),
        ("refuted", {"off": FOUND | {"minimax": 0.1}}, "a better place for the worse parent"),
        ("refuted", {"off": FOUND | {"nearest to the policy": 0.1}}, "another nearest point"),
    ),
    *shown(
        "complete-theory",
        ("confirmed", {"off": FOUND, "rate": Changed(lambda rate: rate + 1e-5)}, "rounding"),
        ("refuted", {"off": FOUND, "rate": Changed(lambda rate: rate + 0.1)}, "another exponent"),
        ("refuted", {"off": FOUND | {"misled judge": 0.1}}, "judges misled by other draws"),
    ),
    *shown(
        "direction-dynamics",
        ("qualified", ends(0.8, 0.3), "another end of a run"),
        (
            "confirmed",
            ends(0.8, 0.5) | {"contaminated": {1e-2: 0.6, 1e-8: 0.55, 1e-40: 0.5}},
            "runs that all end at one half",
        ),
        (
            "not measured",
            {"runs": {"one": (np.array([0.4, 0.3]), np.array([2.0, 1.0]))}},
            "a tilt that ends elsewhere",
        ),
        (
            "not measured",
            {"runs": {"one": (np.array([0.4, 0.5]), np.array([1.0, 2.0]))}},
            "a C that rises",
        ),
        ("not measured", {"soft_gap": 0.1}, "another mean reward"),
    ),
    *shown(
        "optimal-exploration-stability",
        ("qualified", SOME_AGREE, "other exponents"),
        ("confirmed", ALL_AGREE, "criteria that all choose alpha*"),
        ("refuted", NONE_AGREES, "criteria of which none does"),
    ),
    *shown(
        "optimal-sampling-distribution",
        ("qualified", SOME_AGREE | {"off": FOUND}, "other exponents"),
        ("confirmed", ALL_AGREE | {"off": FOUND}, "criteria that all choose alpha*"),
        ("refuted", {"off": FOUND | {"minimax": 0.1}}, "a better place for the worse parent"),
        ("refuted", {"fair_minimax": False}, "a challenger that beats it"),
    ),
    *shown(
        "alpha-at-every-step",
        ("qualified", excess(MANY, half=0.002), "a smaller loss"),
        ("confirmed", excess(MANY, half=0.03), "a loss that matters"),
        ("refuted", excess(RECORD, half=0.01), "no loss where the parents differ in sharpness"),
    ),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_verdict_follows_the_data(case):
    assert decide(NOTEBOOK, case, CASES, FEWER) == case.verdict, case.why


def test_every_verdict_of_the_chapter_could_have_come_out_otherwise():
    assert lacking(NOTEBOOK, CASES) == []
