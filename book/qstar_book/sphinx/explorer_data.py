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
from sphinx.locale import get_translation

from qstar.decoding.costs import PARENTS, Costs, expected_speedup
from qstar.decoding.planner import COIN_GAMMA
from qstar.gaussian import geometric_mean, kl_to_parents
from qstar_book import figures
from qstar_book.numbers import read_expected
from qstar_book.parameters import read_parameters
from qstar_book.presets import PRESETS, preset_pair
from qstar_book.sphinx.edition import CATALOG

_ = get_translation(CATALOG)


@dataclass(frozen=True, slots=True)
class Explorer:
    """One of the book's explorers.

    Attributes:
        data: From the folder of the checkout to what the script is given, plain values only.
        picture: From that to what a reader without scripts sees.
        alt: What the picture shows, for readers who cannot see it.
    """

    data: Callable[[Path], dict[str, Any]]
    picture: Callable[[Mapping[str, Any]], Figure]
    alt: str


def _gaussians(root: Path) -> dict[str, Any]:
    published = read_expected(root / "data" / "expected" / "gaussians.json")
    return {"presets": json.loads(str(published[PRESETS].value)), "start": 6}


def _draw_gaussians(data: Mapping[str, Any]) -> Figure:
    every = [case for cases in data["presets"].values() for case in cases]
    pair = preset_pair(every[data["start"]])
    alphas = np.linspace(0, 1, 101)
    path = [geometric_mean(pair.policy, pair.teacher, at) for at in alphas]
    with figures.in_style():
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
    with figures.in_style():
        fig = Figure(figsize=(figures.WIDTH, 4.6), layout="constrained")
        figures.simplex(*(np.array(first[who]) for who in PARENTS), ax=fig.subplots())
    return fig


MEASURED = (
    ("two prompts", "two prompts of one model, CPU"),
    ("noised copy", "noised copy, CPU"),
    ("lora-manual", "fine-tune on a manual, CPU"),
    ("lora-arithmetic", "fine-tune on sums, CPU"),
)
"""Pairs of the record of a CPU, with packed layers, and what the reader calls them."""


def _pays(root: Path) -> dict[str, Any]:
    from qstar_book.records import decoding  # torch: only where it is asked for

    results = root / "data" / "results"

    def read(name: str) -> Any:
        return json.loads((results / name).read_bytes())

    record = read("decoding_cpu.json")
    cells = [_cell(decoding.find_cell(record, pair, "packed"), name) for pair, name in MEASURED]
    stages = read("accelerator_h200.json")["stages"]
    device = stages["machine"]["name"].removeprefix("NVIDIA ")
    # The second cell of the synthetic pair is of other ways, measured in another run.
    apart = [stages["decode synthetic"]["cells"][0], *stages["decode apart"]["cells"]]
    for cell in sorted(apart, key=lambda cell: cell["pair"]):
        cells.append(_cell(decoding.warm(cell), f"{cell['pair'].replace(',', ' at')}, {device}"))
    return {"cells": cells, "start": 1, "coinGamma": COIN_GAMMA}


def _cell(cell: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What was measured of one pair: the seconds of forwards, acceptances, and speed-ups."""
    from qstar_book.records import decoding

    points = []
    for way, options in decoding.OURS.items():
        if options["scheme"] in DRAFTING and decoding.runs_of(cell, way):
            gain = decoding.speed_ratio(cell, way)
            points.append(
                {
                    "scheme": options["scheme"],
                    "gamma": options.get("gamma"),
                    "median": round(gain.median, 4),
                    "low": round(gain.low, 4),
                    "high": round(gain.high, 4),
                }
            )
    seconds = decoding.measured_costs(cell).policy
    return {
        "name": name,
        "seconds": {str(width): round(spent, 7) for width, spent in seconds.items()},
        "accept": {who: round(x, 6) for who, x in decoding.mean_acceptance(cell).items()},
        "points": points,
        "said": _said(cell),
    }


DRAFTING = ("alternating", "coin", "one-sided")


def _said(cell: Mapping[str, Any]) -> str:
    """What the reader has to know of a pair before its numbers are believed."""
    from qstar_book.records import decoding

    if "two prompts" in cell["pair"]:
        once = decoding.speed_ratio(cell, "plain, one call")
        return (
            "One model under two prompts. Plain decoding is two calls a token here; one call that "
            f"reads both texts is {once.median:.2f} times as fast as that."
        )
    if "shape" in cell["pair"]:
        return "A synthetic pair: random weights of that shape, and a copy with noise at its end."
    if cell["pair"] in decoding.ADAPTERS:
        return "A real pair: the model, and its fine-tune."
    return "A synthetic pair: the model, and a copy of it with noise in its layers."


def _draw_pays(data: Mapping[str, Any]) -> Figure:
    cell = data["cells"][data["start"]]
    seconds = {int(width): spent for width, spent in cell["seconds"].items()}
    takes, accept = Costs(seconds, seconds), np.linspace(0, 1, 101)
    measured: dict[str, list[tuple[float, float, float, float]]] = {"alternating 1": [], "coin": []}
    for one in data["cells"]:
        at = float(np.mean([one["accept"][parent] for parent in PARENTS]))
        for point in one["points"]:
            way = f"{point['scheme']} {point['gamma'] or ''}".strip()
            if way in measured:
                measured[way].append((at, point["median"], point["low"], point["high"]))
    # Of what a parent misses the mixture keeps as large a part everywhere as it does here.
    at = float(np.mean([cell["accept"][parent] for parent in PARENTS]))
    missed = (1 - cell["accept"]["coin"]) / (1 - at)
    curves: dict[str, list[float]] = {way: [] for way in measured}
    for a in accept.tolist():
        chances = {"policy": a, "teacher": a, "coin": 1 - (1 - a) * missed}
        for way, gamma in (("alternating 1", 1), ("coin", data["coinGamma"])):
            times = expected_speedup(chances, takes, way.split()[0], gamma=gamma)
            curves[way].append(times)
    predicted = {way: (accept, np.array(values)) for way, values in curves.items()}
    nothing: dict[str, list[tuple[float, float]]] = {way: [] for way in measured}
    with figures.in_style():
        fig = Figure(figsize=(figures.WIDTH, 3.9), layout="constrained")
        figures.speed_by_acceptance(measured, nothing, predicted, ax=fig.subplots())
    return fig


def _spoken(root: Path) -> dict[str, Any]:
    record = json.loads((root / "data" / "results" / "spoken_cpu.json").read_bytes())
    texts = []
    for text in record["texts"]:
        teacher = text["teacher_system"].removeprefix("You are ").split(".")[0]
        texts.append({"name": f"{text['user']} Teacher: {teacher}", "tokens": text["tokens"]})
    return {"texts": texts}


def _draw_spoken(data: Mapping[str, Any]) -> Figure:
    tokens = data["texts"][0]["tokens"]
    columns = [[token[key] for token in tokens] for key in ("text", "by", "kept")]
    numbers = [[token[key] for token in tokens] for key in ("alpha", "chernoff")]
    with figures.in_style():
        fig = Figure(figsize=(figures.WIDTH, 4.8), layout="constrained")
        figures.spoken(*columns, *numbers, fig=fig)
    return fig


EXPLORERS = {
    "gaussians": Explorer(
        _gaussians,
        _draw_gaussians,
        _(
            "Two Gaussians on the plane, a narrow policy and a wide teacher, with the contours of"
            " their geometric means between them; below, the two divergences from the geometric "
            "mean against alpha, which cross once, at alpha star."
        ),
    ),
    "tokens": Explorer(
        _tokens,
        _draw_tokens,
        _(
            "The triangle of all distributions of three tokens. A curve leads from the teacher to"
            " the policy; a dotted straight line, on which both divergences are equal, crosses it"
            " at q star. The smallest ball around q star that holds both parents has them on its "
            "edge; the two balls of the same size around the parents touch at q star."
        ),
    ),
    "pays": Explorer(
        _pays,
        _draw_pays,
        _(
            "Times as fast as plain decoding against the acceptance probability: two rising "
            "curves, what is expected of alternating drafts and of the coin, which cross one; and"
            " marks with intervals, what was measured of both, at acceptances of 0.6 and more."
        ),
    ),
    "spoken": Explorer(
        _spoken,
        _draw_spoken,
        _(
            "A text of some thirty tokens that was decoded from one model under two prompts. "
            "Above each token alpha star, around one half, marked by which prompt proposed the "
            "token and whether it was kept; and as bars the Chernoff information, a few "
            "hundredths of a nat at most tokens and more at some."
        ),
    ),
}
"""Every explorer by its name, which is also that of its script, `book/_static/explorer-NAME.js`."""
