"""Gaussians: had the data come out otherwise, the verdicts would be other ones."""

from dataclasses import replace

import numpy as np
import pytest
from counterfactuals import Case, Changed, decide, lacking

from qstar.gaussian import Gaussian, solve_pair

NOTEBOOK, FEWER = "gaussians", {"trials": 30}
EYE = np.eye(2)


def pair(policy, teacher):
    return solve_pair("other", policy, teacher)


def moved(case):
    """The pair, shifted and stretched: no number of it changes."""
    policy, teacher = (
        Gaussian(3 * g.mean + 1, 9 * g.covariance) for g in (case.policy, case.teacher)
    )
    return replace(pair(policy, teacher), name=case.name)


def swapped(case):
    return replace(pair(case.teacher, case.policy), name=case.name)


def at(case, alpha):
    """The pair as if another exponent had been found."""
    return replace(case, balance=replace(case.balance, alpha=alpha))


def squeezed(case, factor=0.5):
    """The pair as if q* had come out with another covariance."""
    return replace(case, q_star=Gaussian(case.q_star.mean, factor * case.q_star.covariance))


def rows(how, *which):
    """The table with some of its rows changed; all of them, if none is named."""

    def change(table):
        return {k: how(c) if k in which or not which else c for k, c in table.items()}

    return {"table": Changed(change)}


def cases(how):
    return Changed(lambda found: [how(case) for case in found])


def misprint(row, place):
    def change(printed):
        texts = list(printed[row])
        texts[place] = "0.123"
        return printed | {row: tuple(texts)}

    return {"printed": Changed(change)}


APART = pair(Gaussian([-2, 0], EYE), Gaussian([2, 0], EYE))
WIDER = pair(Gaussian([0, 0], EYE), Gaussian([0, 0], 6 * EYE))
LINE = [Gaussian(place, 1.0) for place in (-1.5, 1.5, 0.0)]
NEAR = pair(*LINE[:2])
EQUAL = pair(LINE[2], LINE[2])
FARTHER = pair(Gaussian(-30.0, 1.0), Gaussian(30.0, 1.0))
CROSSED = pair(Gaussian([0, 0], np.diag([9, 1])), Gaussian([0, 0], np.diag([1, 9])))
OFF_LINE = pair(Gaussian([-2, -1], np.diag([4, 1])), Gaussian([1, 2], np.diag([1, 4])))
TILTED = pair(Gaussian([0, 0], [[1, 0.8], [0.8, 2]]), Gaussian([0, 0], [[1, -0.8], [-0.8, 1]]))
PLAIN = pair(Gaussian([1, 0], 2 * EYE), Gaussian([-1, 0], 2 * EYE))
FAVOURITES = np.log([[0.9, 0.05, 0.05], [0.05, 0.9, 0.05]])
AGREED = np.log([[0.1, 0.1, 0.8], [0.11, 0.1, 0.79]])

TABLE = [
    Case(f"row{row}-{name}", verdict, data, why)
    for row in range(1, 6)
    for place, name in enumerate(("alpha", "kl-policy-teacher", "kl-teacher-policy"))
    for verdict, data, why in (
        ("confirmed", rows(moved), "every pair shifted and stretched"),
        ("corrected", misprint(row, place), "another printed number"),
    )
]

CASES = (
    *TABLE,
    Case(
        "gaussian-geometric-mean",
        "confirmed",
        {"discrete": Changed(lambda b: b), "exact": Changed(lambda b: replace(b, passes=99))},
        "the same roots by another way",
    ),
    Case(
        "gaussian-geometric-mean",
        "refuted",
        {"discrete": Changed(lambda b: replace(b, alpha=b.alpha + 1e-6))},
        "a grid that balances elsewhere",
    ),
    Case("figure-nine-cases", "qualified", {"nine": cases(moved)}, "cases moved"),
    Case(
        "figure-nine-cases",
        "confirmed",
        {"nine": Changed(lambda nine: [nine[i] for i in (0, 2, 4, 5, 6)])},
        "cases that are all printed",
    ),
    Case(
        "figure-nine-cases",
        "refuted",
        {"nine": Changed(lambda nine: [nine[1], nine[3]])},
        "cases of which none is printed",
    ),
    Case("narrow-larger-alpha", "refuted", {"ordered": [WIDER, WIDER]}, "other ordered pairs"),
    Case(
        "narrow-larger-alpha",
        "confirmed",
        {"ordered": cases(swapped), "narrowest": cases(swapped)},
        "larger exponents for the narrow",
    ),
    Case(
        "narrow-larger-alpha",
        "qualified",
        {"ordered": Changed(lambda o: [swapped(o[0]), *o[1:]])},
        "one narrow parent with the larger exponent",
    ),
    Case("case-narrow", "qualified", rows(lambda _: WIDER, 2), "another wide teacher"),
    Case("case-narrow", "confirmed", rows(lambda c: at(c, 0.6), 2), "a larger exponent"),
    Case("case-narrow", "refuted", rows(swapped, 2), "a wide policy"),
    Case("case-extreme", "qualified", rows(moved), "every pair moved"),
    Case("case-extreme", "confirmed", rows(lambda c: at(c, 0.45), 4), "a larger exponent"),
    Case(
        "case-extreme",
        "refuted",
        rows(lambda _: pair(Gaussian([0, 0], EYE / 2), Gaussian([0, 0], 0.6 * EYE)), 4),
        "hardly a difference of width",
    ),
    Case("concentrated-needs-weight", "qualified", rows(lambda _: WIDER, 2, 5), "other widths"),
    Case(
        "concentrated-needs-weight",
        "confirmed",
        rows(lambda c: at(c, 0.6), 2, 4, 5),
        "larger exponents",
    ),
    Case("concentrated-needs-weight", "refuted", rows(swapped, 2, 4, 5), "wide policies"),
    Case("case-combined", "confirmed", rows(lambda _: WIDER, 5), "another exponent of its own"),
    Case(
        "case-combined",
        "refuted",
        {"alone": Changed(lambda both: (0.3436, both[1]))},
        "widths that alone give the exponent",
    ),
    Case("case-equal-variance", "confirmed", {"same": [APART.balance]}, "one pair only"),
    Case(
        "case-equal-variance",
        "refuted",
        {"same": Changed(lambda same: [*same[1:], WIDER.balance])},
        "a pair off one half",
    ),
    Case(
        "not-linear-interpolation",
        "qualified",
        {"coin": np.array([0.5, 0.5])},
        "another law between two coins",
    ),
    Case(
        "not-linear-interpolation",
        "confirmed",
        {"coin": np.array([0.5, 0.4])},
        "a law off the line of two coins",
    ),
    Case(
        "not-linear-interpolation",
        "refuted",
        {"q": Changed(lambda q: q[::-1] * 0), "p": 0, "r": 0},
        "a mixture that is q*",
    ),
    Case("mass-where-both-have-mass", "qualified", {"far": FARTHER}, "parents farther apart"),
    Case("mass-where-both-have-mass", "confirmed", {"far": NEAR}, "no far parents"),
    Case("mass-where-both-have-mass", "refuted", {"near": EQUAL}, "a q* no more central"),
    Case("intersection-effect", "qualified", {"liked": FAVOURITES}, "milder favourites"),
    Case("intersection-effect", "confirmed", {"liked": AGREED}, "one favourite"),
    Case("intersection-effect", "refuted", {"near": EQUAL}, "a q* no more central"),
    Case("covariance-geometric-mean", "corrected", rows(lambda _: WIDER, 2), "another width"),
    Case("covariance-geometric-mean", "confirmed", rows(lambda _: APART), "equal covariances"),
    Case(
        "covariance-geometric-mean",
        "refuted",
        {"nine": cases(squeezed)},
        "precisions that do not average",
    ),
    Case("covariance-formula", "corrected", rows(lambda _: WIDER, 2), "another width"),
    Case("covariance-formula", "confirmed", rows(lambda _: APART), "equal covariances"),
    Case(
        "covariance-formula", "refuted", {"nine": cases(squeezed)}, "precisions that do not average"
    ),
    Case("exact-relation-complicated", "refuted", {"nine": cases(moved)}, "cases moved"),
    Case(
        "exact-relation-complicated",
        "confirmed",
        {"nine": cases(squeezed)},
        "precisions that do not average",
    ),
    Case("small-in-both-directions", "refuted", rows(lambda _: CROSSED, 3), "longer axes"),
    Case("small-in-both-directions", "confirmed", rows(squeezed, 3), "a smaller q*"),
    Case(
        "small-in-both-directions",
        "qualified",
        rows(lambda c: replace(c, q_star=Gaussian([0, 0], np.diag([0.5, 2]))), 3),
        "a q* smaller on one axis",
    ),
    Case(
        "complicated-ellipse",
        "refuted",
        {"nine": Changed(lambda n: [*n[:8], swapped(n[8])])},
        "parents exchanged",
    ),
    Case(
        "complicated-ellipse",
        "confirmed",
        {"nine": Changed(lambda n: [*n[:8], TILTED])},
        "an ellipse",
    ),
    Case(
        "correlation-geometric-mean", "corrected", {"spread": np.array([0.4, 0.4])}, "another size"
    ),
    Case(
        "correlation-geometric-mean",
        "confirmed",
        {"spread": np.array([0.6, 0.6])},
        "the size of the geometric mean",
    ),
    Case(
        "correlation-geometric-mean",
        "refuted",
        {"shifted": Changed(squeezed)},
        "precisions that do not average",
    ),
    Case("means-and-variances-averaged", "corrected", {"shifted": OFF_LINE}, "another pair"),
    Case("means-and-variances-averaged", "confirmed", {"shifted": PLAIN}, "a mean on the segment"),
    Case(
        "means-and-variances-averaged",
        "refuted",
        {"shifted": Changed(squeezed)},
        "precisions that do not average",
    ),
    Case("covariance-structure-averaged", "qualified", {"shifted": OFF_LINE}, "another pair"),
    Case(
        "covariance-structure-averaged",
        "confirmed",
        {"shifted": Changed(lambda c: replace(c, q_star=Gaussian(c.q_star.mean, EYE)))},
        "covariances that average",
    ),
    Case(
        "covariance-structure-averaged",
        "refuted",
        {"shifted": Changed(squeezed)},
        "neither that averages",
    ),
    Case("equal-kls-alpha-half", "qualified", {"equal_kls": {"one": (3.0, 3.0, 0.6)}}, "one pair"),
    Case(
        "equal-kls-alpha-half",
        "confirmed",
        {"equal_kls": {"one": (3.0, 3.0, 0.5)}},
        "no pair off one half",
    ),
    Case(
        "equal-kls-alpha-half",
        "refuted",
        {"centred": cases(lambda c: at(c, 0.6))},
        "concentric crosses off one half",
    ),
    Case(
        "kl-order-alpha-side",
        "qualified",
        {"plane": Changed(lambda plane: plane[:2])},
        "one pair less",
    ),
    Case(
        "kl-order-alpha-side",
        "confirmed",
        {"plane": [WIDER, WIDER], "contrary": WIDER},
        "no pair against it",
    ),
    Case(
        "kl-order-alpha-side",
        "refuted",
        {"broken": Changed(lambda b: b | {"one mean, 2-D": 1})},
        "a concentric pair against it",
    ),
    Case("alpha-balances-kls", "qualified", rows(moved), "every pair moved"),
    Case(
        "alpha-balances-kls", "confirmed", rows(lambda _: APART), "forward divergences that agree"
    ),
    Case(
        "alpha-balances-kls",
        "refuted",
        rows(lambda c: replace(c, q_star=Gaussian([1, 0], EYE)), 2),
        "a q* nearer to one parent",
    ),
    Case(
        "interpretable", "qualified", {"plane": Changed(lambda plane: plane[1:])}, "one pair less"
    ),
    Case("interpretable", "confirmed", {"plane": [WIDER]}, "no pair against the order"),
    Case("interpretable", "refuted", {"precision_gap": 0.1}, "precisions that do not average"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_verdict_follows_the_data(case):
    assert decide(NOTEBOOK, case, CASES, FEWER) == case.verdict, case.why


def test_every_verdict_of_the_chapter_could_have_come_out_otherwise():
    assert lacking(NOTEBOOK, CASES) == []
