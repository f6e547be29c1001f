"""What the book's explorers start from: their data as JSON, and the picture that stands for each.

The scripts in `book/_static` compute what they show; `qstar-core.js` is their mathematics, and a
test holds it against the package. Nothing is typed there that a chapter or a record says.
"""

import ast
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from qstar.decoding.costs import PARENTS
from qstar.gaussian import geometric_mean, kl_to_parents

from . import figures
from .numbers import read_expected
from .parameters import read_parameters
from .presets import PRESETS, preset_pair


@dataclass(frozen=True, slots=True)
class Explorer:
    """One of the book's explorers.

    Attributes:
        data: From the folder of the checkout to what the script is given, plain values only.
        picture: From that to what a reader without scripts sees.
        alt: What the picture shows, for readers who cannot see it.
        reads: The files in the checkout that the data are made from.
    """

    data: Callable[[Path], dict[str, Any]]
    picture: Callable[[Mapping[str, Any]], Figure]
    alt: str
    reads: tuple[str, ...] = ()


def _gaussians(root: Path) -> dict[str, Any]:
    published = read_expected(root / "data" / "expected" / "gaussians.json")
    return {"presets": json.loads(str(published[PRESETS].value)), "start": 6}


def _draw_gaussians(data: Mapping[str, Any]) -> Figure:
    every = [case for cases in data["presets"].values() for case in cases]
    pair = preset_pair(every[data["start"]])
    alphas = np.linspace(0, 1, 101)
    path = [geometric_mean(pair.policy, pair.teacher, at) for at in alphas]
    with figures.style():
        fig = Figure(figsize=(figures.WIDTH, 7.2), layout="constrained")
        divergences = kl_to_parents(pair.policy, pair.teacher, alphas)
        figures.path_evolution(pair, alphas, path, *divergences, fig=fig)
    return fig


def _tokens(root: Path) -> dict[str, Any]:
    chapter = read_parameters(root / "notebooks" / "exact_sampling.ipynb")
    first = [ast.literal_eval(chapter[who].default) for who in PARENTS]
    rng = np.random.default_rng(1)
    ten = rng.dirichlet([0.8] * 10, size=2) + 0.004
    six = rng.dirichlet([1.5] * 6, size=2) + 0.004
    pairs = {
        "three tokens": first,
        "three, opposite opinions": ([0.9, 0.05, 0.05], [0.05, 0.9, 0.05]),
        "three, one is sharp": ([0.94, 0.03, 0.03], [0.3, 0.4, 0.3]),
        "six tokens": six / six.sum(1, keepdims=True),
        "ten tokens": ten / ten.sum(1, keepdims=True),
    }
    presets = [
        {"name": name, "policy": _short(policy), "teacher": _short(teacher)}
        for name, (policy, teacher) in pairs.items()
    ]
    return {"presets": presets}


def _short(row: Any) -> list[float]:
    return [float(x) for x in np.round(row, 6)]


def _draw_tokens(data: Mapping[str, Any]) -> Figure:
    first = data["presets"][0]
    with figures.style():
        fig = Figure(figsize=(figures.WIDTH, 4.6), layout="constrained")
        figures.simplex(*(np.array(first[who]) for who in PARENTS), ax=fig.subplots())
    return fig


EXPLORERS = {
    "gaussians": Explorer(
        _gaussians,
        _draw_gaussians,
        "Two Gaussians on the plane, a narrow policy and a wide teacher, with the contours of "
        "their geometric means between them; below, the two divergences from the geometric mean "
        "against alpha, which cross once, at alpha star.",
        ("data/expected/gaussians.json",),
    ),
    "tokens": Explorer(
        _tokens,
        _draw_tokens,
        "The triangle of all distributions of three tokens. A curve leads from the teacher to the "
        "policy; a dotted straight line, on which both divergences are equal, crosses it at q "
        "star. The smallest ball around q star that holds both parents has them on its edge; the "
        "two balls of the same size around the parents touch at q star.",
        ("notebooks/exact_sampling.ipynb",),
    ),
}
"""Every explorer by its name, which is also that of its script, `book/_static/explorer-NAME.js`."""
