"""Exact sampling: what each verdict would have been, had the samplers and pairs come out otherwise.

A minute, most of it running the chapter as far as its deciding cells need.
"""

import numpy as np
import pytest
import torch
from counterfactuals import Case, Changed, decide, lacking

NOTEBOOK, FEWER = "exact_sampling", {"trials": 200, "draws": 40_000}


def drawn_as_asked(drawn, ways, but=()):
    """The distributions of these ways become the target's, except after `but` candidates."""
    exact = {pair: law for (way, pair, k), law in drawn.items() if (way, k) == ("mended", 4)}
    return {
        (way, pair, k): exact[pair] if way in ways and k not in but else law
        for (way, pair, k), law in drawn.items()
    }


SOURCE_EXACT = Changed(lambda drawn: drawn_as_asked(drawn, {"source"}))
SOURCE_EXACT_AT_ONE = Changed(lambda drawn: drawn_as_asked(drawn, {"source"}, but=(2, 3, 4)))
MENDED_OFF = Changed(
    lambda drawn: {key: law[::-1] if key[0] == "mended" else law for key, law in drawn.items()}
)
EXACT_LOOP = {"drawn": SOURCE_EXACT}


def passes(by_candidates):
    return {(row, k): by_candidates[k] for row in range(3) for k in (0, 1, 2, 4)}


def one_gap(gap, how):
    """The gaps of the rules, with one of them changed."""
    return Changed(lambda gaps: gaps | {how: gap})


def moved_to(acceptance):
    """The built pairs, with acceptances that follow their exponents as told."""
    return Changed(
        lambda built: np.column_stack([built[:, 0], acceptance(built[:, 0]), built[:, 2]])
    )


def follows_line(alpha):
    """The source's column: 40% at 0.3, 50% at 0.5, 60% at 0.7."""
    return 0.25 + 0.5 * alpha


OTHER_SPREAD = moved_to(lambda alpha: 0.3 + 0.3 * np.random.default_rng(0).random(len(alpha)))
HALVES = Changed(lambda x: np.column_stack([x[:, 0], np.linspace(0.78, 0.82, len(x)), x[:, 2]]))
HIGHER = Changed(lambda x: np.column_stack([x[:, 0], np.linspace(0.5, 0.97, len(x)), x[:, 2]]))
DRIFTING = Changed(lambda x: x + np.array([1, 0, 0]) * np.linspace(0, 0.2, len(x))[:, None])

CASES = (
    Case("samples-follow-q-star", "confirmed", EXACT_LOOP, "a loop that draws q*"),
    Case("samples-follow-q-star", "qualified", {"drawn": SOURCE_EXACT_AT_ONE}, "exact at one"),
    Case(
        "samples-follow-q-star",
        "refuted",
        {"drawn": Changed(lambda drawn: drawn | {k: x[::-1] for k, x in drawn.items()})},
        "another pair of biased distributions",
    ),
    Case("loop-step-redraw", "confirmed", {"drawn": SOURCE_EXACT}, "a loop that draws q*"),
    Case("loop-step-redraw", "qualified", {"drawn": MENDED_OFF}, "tests that are wrong as well"),
    Case(
        "loop-step-redraw",
        "refuted",
        {
            "drawn": Changed(
                lambda drawn: {k: (x + 1) / 4 if k[0] == "source" else x for k, x in drawn.items()}
            )
        },
        "a loop that is too flat",
    ),
    Case(
        "loop-step-accept",
        "confirmed",
        {"handed_out": Changed(lambda mass: {key: 0.1 * x for key, x in mass.items()})},
        "tests that leave room at every k",
    ),
    Case(
        "loop-step-accept",
        "refuted",
        {"handed_out": Changed(lambda mass: {key: 1.5 * x for key, x in mass.items()})},
        "tests that hand out too much at once",
    ),
    Case(
        "loop-step-accept",
        "qualified",
        {"handed_out": Changed(lambda mass: {k: x * (1.3 ** (k[1] - 1)) for k, x in mass.items()})},
        "tests that hand out even more later",
    ),
    Case(
        "distribution-preserved",
        "confirmed",
        {"bias": Changed(lambda bias: {name: 0 * x for name, x in bias.items()})},
        "no bias in any pair",
    ),
    Case(
        "distribution-preserved",
        "qualified",
        {"bias": Changed(lambda bias: bias | {"two opinions": 0 * bias["two opinions"]})},
        "one pair without bias",
    ),
    Case(
        "distribution-preserved",
        "refuted",
        {"bias": Changed(lambda bias: {name: 0.1 * x for name, x in bias.items()})},
        "a tenth of the bias",
    ),
    Case(
        "unbiased-estimate",
        "confirmed",
        {"p_values": {"loop": 0.4, "rule": 0.5}},
        "frequencies that agree",
    ),
    Case(
        "unbiased-estimate",
        "refuted",
        {"p_values": {"loop": 1e-12, "rule": 0.5}},
        "frequencies that do not",
    ),
    Case("loop-step-draft", "confirmed", {"careless": torch.tensor([0, 0])}, "possible tokens"),
    Case("loop-step-draft", "qualified", {"careless": torch.tensor([2, 0])}, "another impossible"),
    Case("von-neumann-theorem", "confirmed", {"law_gap": one_gap(0.0, "loop")}, "an exact loop"),
    Case("von-neumann-theorem", "refuted", {"law_gap": one_gap(0.1, "von-neumann")}, "a bad rule"),
    Case("von-neumann-theorem", "qualified", {"law_gap": one_gap(0.3, "loop")}, "a worse loop"),
    *(
        case
        for row, right in enumerate((1.14, 1.25, 1.33), start=1)
        for case in (
            Case(
                f"speedup-row{row}-speedup",
                "confirmed",
                {"printed": np.array([1.14, 1.25, 1.33])},
                "values of the formula in print",
            ),
            Case(
                f"speedup-row{row}-speedup",
                "corrected",
                {"printed": np.full(3, right + 0.02)},
                "print that is off by 0.02",
            ),
            Case(
                f"speedup-row{row}-acceptance",
                "confirmed",
                {"built": moved_to(follows_line)},
                "acceptances on the printed line",
            ),
            Case(
                f"speedup-row{row}-acceptance",
                "refuted",
                {"built": OTHER_SPREAD},
                "acceptances all over a smaller range",
            ),
        )
    ),
    Case(
        "acceptance-depends-on-alpha",
        "confirmed",
        {"built": moved_to(lambda alpha: alpha**2)},
        "acceptances that are a function of alpha*",
    ),
    Case(
        "acceptance-depends-on-alpha",
        "qualified",
        {
            "built": moved_to(
                lambda alpha: np.where(alpha < 0.4, 0.4, np.linspace(0, 1, len(alpha)))
            )
        },
        "acceptances that follow small exponents only",
    ),
    Case("acceptance-depends-on-alpha", "refuted", {"built": OTHER_SPREAD}, "a smaller range"),
    Case(
        "speedup-formula",
        "confirmed",
        {"passes": passes({0: 2.0, 1: 1.6, 2: 1.6, 4: 1.6}), "rates": np.full(3, 0.5)},
        "passes that fall as the formula says",
    ),
    Case(
        "speedup-formula",
        "qualified",
        {"passes": passes({0: 2.0, 1: 2.0, 2: 1.6, 4: 2.0}), "rates": np.full(3, 0.5)},
        "passes that fall so for two candidates",
    ),
    Case(
        "speedup-formula",
        "refuted",
        {"passes": passes({0: 2.0, 1: 1.0, 2: 1.0, 4: 1.0})},
        "passes that fall more than it says",
    ),
    Case(
        "free-speedup",
        "confirmed",
        EXACT_LOOP | {"passes": passes({0: 2.0, 1: 1.4, 2: 1.3, 4: 1.2})},
        "an exact loop with fewer passes",
    ),
    Case(
        "free-speedup",
        "qualified",
        {"passes": passes({0: 2.0, 1: 1.4, 2: 1.3, 4: 1.2})},
        "fewer passes",
    ),
    Case("free-speedup", "refuted", {"passes": passes({0: 2, 1: 3, 2: 3, 4: 3})}, "more passes"),
    Case(
        "loop-step-evaluate",
        "confirmed",
        {"passes": passes({0: 2.0, 1: 1.4, 2: 1.3, 4: 1.2})},
        "fewer passes with candidates",
    ),
    Case("loop-step-evaluate", "qualified", {"passes": passes({0: 2, 1: 2, 2: 1, 4: 3})}, "mixed"),
    Case("adaptive-k", "confirmed", {"same_alpha": HALVES}, "one best length at one alpha*"),
    Case("adaptive-k", "refuted", {"same_alpha": HIGHER}, "other acceptances at one alpha*"),
    Case("adaptive-k", "qualified", {"same_alpha": DRIFTING}, "pairs of different alpha*"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_verdict_follows_the_data(case):
    assert decide(NOTEBOOK, case, CASES, FEWER) == case.verdict, case.why


def test_every_verdict_of_the_chapter_could_have_come_out_otherwise():
    assert lacking(NOTEBOOK, CASES) == []
