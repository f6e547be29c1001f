"""Pairs of Gaussians that a chapter names and an explorer offers: as text, and back."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from qstar.gaussian import Gaussian, SolvedPair, solve_pair

PRESETS = "ch3-presets"
"""The key under which the chapter on Gaussians publishes its pairs."""


def presets(groups: Mapping[str, Iterable[SolvedPair]]) -> str:
    """Pairs of Gaussians in the plane, by group, as the text that a chapter publishes.

    Nine decimals, so that it is the same text on every machine: more than any page shows.
    """

    def said(parent: Gaussian) -> dict[str, list[float]]:
        (xx, xy), (_, yy) = parent.covariance.tolist()
        return {
            "mean": [round(x, 9) + 0.0 for x in parent.mean.tolist()],
            "covariance": [round(x, 9) + 0.0 for x in (xx, xy, yy)],
        }

    return json.dumps(
        {
            group: [
                {
                    "name": " ".join(case.name.split()),
                    "policy": said(case.policy),
                    "teacher": said(case.teacher),
                }
                for case in cases
            ]
            for group, cases in groups.items()
        },
        ensure_ascii=False,
    )


def preset_pair(case: Mapping[str, Any]) -> SolvedPair:
    """A pair of `presets` as Gaussians again, solved."""
    parents = []
    for name in ("policy", "teacher"):
        xx, xy, yy = case[name]["covariance"]
        parents.append(Gaussian(case[name]["mean"], [[xx, xy], [xy, yy]]))
    return solve_pair(case["name"], *parents)
