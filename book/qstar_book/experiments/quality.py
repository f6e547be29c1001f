"""Is the quality kept, and is q* worth sampling from? Answers of two models, scored exactly.

    qstar-book record quality --out data/results/quality_cpu.json

Two questions. Whether speculative decoding changes what is answered: two-sample tests of whole
answers between plain and speculative draws, with their power, and with the source's loop as a
control that must be found out. And whether q* answers better than its parents: the suite of
`tasks`, whose right answers are known, for seven targets. The probability of a right answer is
computed, not counted in draws; so only items and models are a sample.
"""

import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from ..files import provenance, write_json
from ..records import mean_with_interval
from . import targets, tasks
from .jobs import device_name
from .targets import COMPARED, Reader

SPECULATIVE: dict[str, dict[str, Any]] = {
    "plain again": {"scheme": "plain"},
    "one-sided 3": {"scheme": "one-sided", "gamma": 3, "drafter": "policy"},
    "alternating 1": {"scheme": "alternating", "gamma": 1},
    "alternating 3, block rule": {
        "scheme": "alternating",
        "gamma": 3,
        "block_verification": True,
    },
    "coin": {"scheme": "coin", "stay": 0.5},
    "lookup 3": {"scheme": "lookup", "gamma": 3},
    "draft model 3": {"scheme": "draft-model", "gamma": 3},
}
"""Ways to draw from q* that are compared with "plain"; the first is a control without drafts."""

LEVEL = 0.01
"""Of a test, before it is divided by the number of tests."""


@dataclass(frozen=True, slots=True)
class Quality:
    """What is measured.

    Attributes:
        pairs: By name, pairs of a policy's and a teacher's name, one for each seed of the training;
            without a teacher's, the name of a pair that `pairs` loads, which is scored and no more.
        draft: A draft model of the first pair; none if empty.
        items: Held-out items of the suite, of all kinds evenly.
        drawn_items: The first of each kind, answered by draws too, together so many.
        draws: Answers drawn to each of these.
        tested_prompts: Items whose answers the two-sample tests compare; 0 for no tests.
        tested_draws: Answers to each of these, from either sampler.
        permutations: Of a two-sample test.
        power_rounds: Tests in each estimate of the power.
        shares: Of answers that the source's loop gave, in these estimates.
        max_new_tokens: The longest an answer may get.
        seed: Of items, draws and tests.
    """

    pairs: Mapping[str, Sequence[tuple[str, str]]]
    draft: str = ""
    items: int = 384
    drawn_items: int = 128
    draws: int = 4
    tested_prompts: int = 16
    tested_draws: int = 64
    permutations: int = 999
    power_rounds: int = 100
    shares: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5, 1.0)
    max_new_tokens: int = 40
    seed: int = 0

    def quick(self) -> "Quality":
        """Small and few: a rehearsal."""
        return replace(
            self,
            items=32,
            drawn_items=16,
            draws=2,
            tested_prompts=4,
            tested_draws=16,
            permutations=99,
            power_rounds=10,
        )


# --- The suite -----------------------------------------------------------------------------------


def choices(item: tasks.Item, *, seed: int = 0) -> list[str]:
    """The right answer and wrong ones of the same form, at most three; the right one comes first.

    Numbers are off by one or ten, words and digits stand in another order.
    """
    if item.choices:
        return [item.answer, *(c for c in item.choices if c != item.answer)]
    draw = random.Random(f"{seed} {item.prompt}")
    if item.kind in ("sum", "difference"):
        right = int(item.answer)
        wrong = [str(x) for x in (right + 1, right - 1, right + 10, right - 10) if x >= 0]
        return [item.answer, *draw.sample(wrong, 3)]
    if item.kind == "json":
        number = int(item.answer.split()[-1].rstrip("}"))
        others = [number % 99 + 1, (number + 9) % 99 + 1, (number + 49) % 99 + 1]
        return [item.answer, *(item.answer.replace(f" {number}}}", f" {n}}}") for n in others)]
    words = item.answer.split()
    found = [item.answer]
    if item.kind == "capitals":
        found += [" ".join(words[::-1]), item.answer.lower(), " ".join(words[::-1]).lower()]
    while len(found) < 4:
        mixed = " ".join(draw.sample(words, len(words)))
        if mixed not in found:
            found.append(mixed)
    return found


def score_suite(
    pair: tuple[Reader, Reader], items: Sequence[tasks.Item], *, compared: Sequence[str] = COMPARED
) -> dict[str, dict[str, ndarray]]:
    """How each target answers each item, from one reading of the right answer and of wrong ones.

    Returns:
        By measure, by target. Shape (items,). "right": the probability of the right answer and of
        the end after it. "greedy": whether each of its tokens is the target's most probable one, so
        that taking these gives the right answer. "choice": whether the right answer is the most
        probable of `choices`.
    """
    told = [choices(item) for item in items]
    owners = [i for i, options in enumerate(told) for _ in options]
    prompts = tuple([reader.ask(items[i]) for i in owners] for reader in pair)
    texts = [pair[0].say(option) for options in told for option in options]
    seen = targets.read(pair, prompts, texts, targets=compared)  # type: ignore[arg-type]
    first = np.cumsum([0, *map(len, told)])[:-1]
    found: dict[str, dict[str, ndarray]] = {"right": {}, "greedy": {}, "choice": {}}
    for target in compared:
        log_p = np.array([reading[target].sum() for reading in seen])
        found["right"][target] = np.exp(log_p[first])
        found["greedy"][target] = np.array([float(seen[i][f"top {target}"].all()) for i in first])
        found["choice"][target] = np.array(
            [float(log_p[a : a + len(o)].argmax() == 0) for a, o in zip(first, told, strict=True)]
        )
    return found


# --- Draws ---------------------------------------------------------------------------------------


def describe_draws(
    pair: tuple[Reader, Reader],
    items: Sequence[tasks.Item],
    *,
    draws: int,
    seed: int,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Answers drawn from each target, what the other targets think of them, and how they differ.

    Returns:
        By target: "right", the share of right answers; "nats", by target, the mean of -log p of a
        token of these draws (its exponential is the perplexity); "minus_log_p", of each draw under
        its own target; "tokens" of an answer; "distinct", the mean share of different answers among
        the draws to an item; "distinct_4", of different sequences of four tokens among all; "text",
        the first draw to the first item of each kind; and "by_item", for intervals: the "tokens" of
        the draws to it, their "nats" by target (a sum), and the "distinct" share of its answers.
    """
    asked = targets.asked(pair, items)
    prompts = tuple([p for p in own for _ in range(draws)] for own in asked)
    found = {}
    for target in COMPARED:
        texts = targets.draw(
            pair,
            prompts,  # type: ignore[arg-type]
            target,
            seed=seed,
            max_new_tokens=max_new_tokens,
        )
        seen = targets.read(pair, prompts, texts)  # type: ignore[arg-type]
        tokens = sum(map(len, texts))
        said = [pair[0].write(text) for text in texts]
        of_item = [said[i : i + draws] for i in range(0, len(said), draws)]
        right = [
            np.mean([item.correct(x) for x in answers])
            for item, answers in zip(items, of_item, strict=True)
        ]
        fours = [tuple(t[i : i + 4]) for t in texts for i in range(len(t) - 3)]
        nats = {other: [-float(of[other].sum()) for of in seen] for other in COMPARED}
        summed = {name: np.reshape(x, (-1, draws)).sum(1) for name, x in nats.items()}
        distinct = [len(set(answers)) / draws for answers in of_item]
        shown: dict[str, str] = {}
        for item, answers in zip(items, of_item, strict=True):
            shown.setdefault(item.kind, answers[0])
        found[target] = {
            "right": [round(float(x), 4) for x in right],
            "nats": {other: float(x.sum() / tokens) for other, x in summed.items()},
            "minus_log_p": [round(x, 4) for x in nats[target]],
            "tokens": tokens / len(texts),
            "distinct": float(np.mean(distinct)),
            "distinct_4": len(set(fours)) / max(1, len(fours)),
            "text": shown,
            "by_item": {
                "tokens": np.reshape([len(x) for x in texts], (-1, draws)).sum(1).tolist(),
                "nats": {other: np.round(x, 4).tolist() for other, x in summed.items()},
                "distinct": distinct,
            },
        }
    return found


def perplexity(draws: Mapping[str, Any], target: str, other: str) -> dict[str, float]:
    """That of a target's draws under another, with its 95% bootstrap interval over the items.

    Args:
        draws: What `describe_draws` found.
        target: Whose draws.
        other: Who reads them.
    """
    by_item = draws[target]["by_item"]
    nats = mean_with_interval(np.array(by_item["nats"][other]), np.array(by_item["tokens"]))
    return {name: float(np.exp(x)) for name, x in nats.items()}


# --- Two samples ---------------------------------------------------------------------------------


def codes(*samples: Sequence[Sequence[Sequence[int]]]) -> list[ndarray]:
    """Samples of texts by prompt, as numbers: equal where prompt and text are equal.

    Returns:
        One for each sample. Shape (prompts, draws).
    """
    known: dict[tuple[int, tuple[int, ...]], int] = {}
    return [
        np.array(
            [
                [known.setdefault((prompt, tuple(text)), len(known)) for text in texts]
                for prompt, texts in enumerate(sample)
            ]
        )
        for sample in samples
    ]


def two_sample(
    first: ndarray, second: ndarray, *, permutations: int, generator: np.random.Generator
) -> float:
    """How probable it is that two samples of one distribution differ as much: a p-value.

    The statistic is the sum over prompts and texts of (a - b)^2 / (a + b), where a text was drawn
    a and b times. Permuting the draws of each prompt gives its distribution if both samplers draw
    alike, so that the level is exact whatever the texts are.

    Args:
        first: Of `codes`. Shape (prompts, draws).
        second: The same. Shape (prompts, draws).
        permutations: How many.
        generator: Of the permutations.
    """
    joint = np.concatenate([first, second], axis=1)
    totals = np.bincount(joint.ravel())
    used = totals > 0
    labels = np.zeros(joint.shape)
    labels[:, : first.shape[1]] = 1

    def statistic(of: ndarray) -> float:
        a = np.bincount(joint.ravel(), weights=of.ravel(), minlength=len(totals))
        return float((((2 * a - totals) ** 2)[used] / totals[used]).sum())

    seen = statistic(labels)
    as_large = sum(
        statistic(generator.permuted(labels, axis=1)) >= seen - 1e-9 for _ in range(permutations)
    )
    return (1 + as_large) / (1 + permutations)


def power(
    plain: ndarray,
    other: ndarray,
    share: float,
    *,
    level: float,
    rounds: int,
    permutations: int,
    generator: np.random.Generator,
) -> float:
    """How often a test finds out a sampler of which a share of the answers is another sampler's.

    Both samples of a round are drawn again, with replacement, from these.

    Args:
        plain: Of `codes`. Shape (prompts, draws).
        other: The same. Shape (prompts, draws).
        share: Of answers of the other sampler.
        level: Of the test.
        rounds: Tests.
        permutations: Of each.
        generator: Of everything.
    """
    found = 0
    for _ in range(rounds):
        fair, honest, biased = (
            np.take_along_axis(x, generator.integers(x.shape[1], size=x.shape), axis=1)
            for x in (plain, plain, other)
        )
        mixed = np.where(generator.random(plain.shape) < share, biased, honest)
        p = two_sample(fair, mixed, permutations=permutations, generator=generator)
        found += p <= level
    return found / rounds


def compare_samplers(
    pair: tuple[Reader, Reader],
    draft: Reader | None,
    items: Sequence[tasks.Item],
    configuration: Quality,
) -> dict[str, Any]:
    """Two-sample tests between plain and speculative answers, and of the source's loop.

    Each test has a plain sample of its own, so that its p-values are independent of each other.

    Returns:
        "ways": by way, the p-value, the share of right answers and its difference to plain with
        a 95% interval over prompts; "loop": the same of the source's loop; "distance": the mean
        total variation between the answers of q* and of the loop; "power": by share, that of one
        test at the level of each.
    """
    c = configuration
    prompts = tuple(
        [p for p in own for _ in range(c.tested_draws)] for own in targets.asked(pair, items)
    )
    ways = {w: o for w, o in SPECULATIVE.items() if draft is not None or "draft" not in w}

    def sample(target: str, seed: int, **options: Any) -> list[list[list[int]]]:
        if options.get("scheme") == "draft-model":
            assert draft is not None
            options |= {"draft_model": draft.model}
        texts = targets.draw(
            pair,
            prompts,  # type: ignore[arg-type]
            target,
            seed=seed,
            max_new_tokens=c.max_new_tokens,
            **options,
        )
        return [texts[i : i + c.tested_draws] for i in range(0, len(texts), c.tested_draws)]

    samples, plain = {}, {}
    for i, (way, options) in enumerate([*ways.items(), ("source loop", {})]):
        print(f"  {way}", file=sys.stderr, flush=True)
        seed = c.seed + 2_000_000 * i
        plain[way] = sample("q*", seed)
        target = "source loop" if way == "source loop" else "q*"
        samples[way] = sample(target, seed + 1_000_000, **options)
    every = codes(*samples.values(), *plain.values())
    numbers = dict(zip(samples, every, strict=False))
    plainly = dict(zip(plain, every[len(samples) :], strict=True))

    def right_of(answers: list[list[list[int]]]) -> ndarray:
        each = zip(items, answers, strict=True)
        marks = [[item.correct(pair[0].write(text)) for text in texts] for item, texts in each]
        return np.array(marks).mean(axis=1)

    generator = np.random.default_rng(c.seed)
    level = LEVEL / (len(ways) + 1)
    found: dict[str, Any] = {}
    for name, answers in samples.items():
        right = right_of(answers)
        mean, low, high = targets.interval(right - right_of(plain[name]))
        found[name] = {
            "p": two_sample(
                plainly[name], numbers[name], permutations=c.permutations, generator=generator
            ),
            "right": float(right.mean()),
            "right_difference": [mean, low, high],
        }
    texts = [text for of in plain["source loop"] for text in of]
    seen = targets.read(pair, prompts, texts, targets=("q*", "source loop"))  # type: ignore[arg-type]
    log_ratio = np.array([r["source loop"].sum() - r["q*"].sum() for r in seen])
    return {
        "prompts": [item.prompt for item in items],
        "draws": c.tested_draws,
        "level": level,
        "plain_right": float(np.mean([right_of(answers) for answers in plain.values()])),
        "distinct": float(np.mean([len(set(map(tuple, x))) for x in plain["source loop"]])),
        "ways": {name: found[name] for name in ways},
        "loop": found["source loop"],
        "distance": float((-np.expm1(np.minimum(log_ratio, 0))).mean()),
        "power": {
            str(share): power(
                plainly["source loop"],
                numbers["source loop"],
                share,
                level=LEVEL,
                rounds=c.power_rounds,
                permutations=199,
                generator=generator,
            )
            for share in c.shares
        },
    }


def uncertain(right: ndarray, count: int) -> list[int]:
    """The items whose right answer is nearest to a probability of one half: most can differ."""
    return np.argsort(np.abs(right - 0.5), kind="stable")[:count].tolist()


# --- The command ---------------------------------------------------------------------------------


def measure(
    configuration: Quality,
    *,
    device: str,
    save: Any = None,
    tests_only: bool = False,
    draws_only: bool = False,
) -> dict[str, Any]:
    """The whole record, but how it was made.

    Args:
        configuration: What is measured.
        device: Where.
        save: Called with what there is so far, after each part.
        tests_only: The two-sample tests of every pair's first seed, as "tested", and no more.
        draws_only: The draws of every seed of every pair, as "drawn", and no more.
    """
    c = configuration
    items = tasks.items(None, c.items, c.seed)
    first = _first_of_each(items, c.drawn_items)
    loaded: dict[str, Any] = {}
    found: dict[str, Any] = {
        "configuration": asdict(c),
        "kinds": [item.kind for item in items],
        "pairs": {},
    }

    def reader(name: str) -> Reader:
        return targets.of_family(name, device=device, loaded=loaded)

    def tested(pair: Any, scores: Mapping[str, Mapping[str, ndarray]]) -> dict[str, Any]:
        chosen = [items[i] for i in uncertain(scores["right"]["q*"], c.tested_prompts)]
        draft = reader(c.draft) if c.draft else None
        return compare_samplers(pair, draft, chosen, c)

    def drawn(pair: Any) -> dict[str, Any]:
        told = {"draws": c.draws, "seed": c.seed, "max_new_tokens": c.max_new_tokens}
        return describe_draws(pair, first, **told)

    def both(policy: str, teacher: str) -> tuple[Reader, Reader]:
        if not teacher:
            return targets.of_pair(policy, device=device)
        return reader(policy), reader(teacher)

    if draws_only:
        found = {"configuration": asdict(c), "drawn": {}}
        for name, seeds in c.pairs.items():
            for policy, teacher in seeds:
                print(f"{name}: {policy}, {teacher}", file=sys.stderr, flush=True)
                of: dict[str, Any] = {"policy": policy, "teacher": teacher}
                of["draws"] = drawn(both(policy, teacher))
                found["drawn"].setdefault(name, []).append(of)
                if save is not None:
                    save(found)
        return found
    if tests_only:
        found = {"configuration": asdict(c), "tested": {}}
        for name, ((policy, teacher), *_) in c.pairs.items():
            print(f"{name}: {policy}, {teacher}", file=sys.stderr, flush=True)
            pair = reader(policy), reader(teacher)
            found["tested"][name] = tested(pair, score_suite(pair, items))
            if save is not None:
                save(found)
        return found
    for name, seeds in c.pairs.items():
        found["pairs"][name] = []
        for policy, teacher in seeds:
            print(f"{name}: {policy}, {teacher}", file=sys.stderr, flush=True)
            pair = both(policy, teacher)
            scores = score_suite(pair, items)
            told: dict[str, Any] = {
                "policy": policy,
                "teacher": teacher,
                "scores": {
                    measure: {target: _rounded(values) for target, values in of.items()}
                    for measure, of in scores.items()
                },
            }
            if not found["pairs"][name]:
                told["draws"] = drawn(pair)
            if not found["pairs"][name] and name == next(iter(c.pairs)) and c.tested_prompts:
                found["preserved"] = tested(pair, scores)
            found["pairs"][name].append(told)
            if save is not None:
                save(found)
    return found


def _rounded(values: ndarray) -> list[float]:
    return [float(f"{x:.4g}") if x > 1e-6 else 0.0 for x in values.tolist()]


def _first_of_each(items: Sequence[tasks.Item], count: int) -> list[tasks.Item]:
    """As many of each kind, from the first on, together `count`."""
    kinds = list(dict.fromkeys(item.kind for item in items))
    share = max(1, count // len(kinds))
    return [i for kind in kinds for i in [x for x in items if x.kind == kind][:share]]


def parse_pairs(told: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """NAME=POLICY:TEACHER,POLICY:TEACHER of the command line; NAME=PAIR for one of `pairs`.

    Raises:
        ValueError: It has another form.
    """
    found = {}
    for text in told:
        name, equal, seeds = text.partition("=")
        pairs = [tuple(seed.split(":")) for seed in seeds.split(",")]
        pairs = [(*pair, "") if len(pair) == 1 and "/" in pair[0] else pair for pair in pairs]
        if not equal or any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"expected NAME=POLICY:TEACHER[,POLICY:TEACHER...]; got {text!r}")
        found[name] = pairs
    return found  # type: ignore[return-value]


def command(
    *,
    out: Path,
    pairs: Sequence[str],
    draft: str,
    scores_only: bool,
    tests_only: bool,
    draws_only: bool,
    device: str,
    quick: bool,
    seed: int,
) -> None:
    """`qstar-book record quality`."""
    configuration = Quality(parse_pairs(pairs), draft=draft, seed=seed)
    if quick:
        configuration = configuration.quick()
    if scores_only:
        configuration = replace(configuration, tested_prompts=0, drawn_items=8, draws=1)
    where = device_name(device)
    made_by = provenance("numpy", "torch", "transformers", device=where)

    def save(found: Mapping[str, Any]) -> None:
        write_json(out, {"made_by": made_by, **found})

    only = {"tests_only": tests_only, "draws_only": draws_only}
    save(measure(configuration, device=device, save=save, **only))
    print(out)


# --- Reading the record --------------------------------------------------------------------------


def joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One record of several, of the same items: the first one's, and all pairs.

    Raises:
        ValueError: They are of other items. Of a pair that several have, the first one's counts.
    """
    for part in parts[1:]:
        for key in ("items", "seed"):
            if part["configuration"][key] != parts[0]["configuration"][key]:
                raise ValueError(f"records of other {key} cannot be joined.")
    pairs = {name: of for part in reversed(parts) for name, of in part["pairs"].items()}
    order = dict.fromkeys(name for part in parts for name in part["pairs"])
    return {**parts[0], "pairs": {name: pairs[name] for name in order}}


def scores_of(record: Mapping[str, Any], pair: str, measure: str, target: str) -> ndarray:
    """One measure of one target on every item, for each seed of a pair. Shape (seeds, items)."""
    return np.array([seed["scores"][measure][target] for seed in record["pairs"][pair]])


@dataclass(frozen=True, slots=True)
class Difference:
    """How much more often one target is right than another, on the same items.

    Attributes:
        mean: Over items and seeds.
        low: The lower end of its 95% bootstrap interval over items.
        high: Its upper end.
        by_seed: The mean of each seed.
    """

    mean: float
    low: float
    high: float
    by_seed: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """ "better" or "worse" if the interval lies on one side and every seed on the same."""
        if self.low > 0 and min(self.by_seed) > 0:
            return "better"
        if self.high < 0 and max(self.by_seed) < 0:
            return "worse"
        return "within noise"


def difference(
    record: Mapping[str, Any], pair: str, target: str, against: str, *, measure: str = "right"
) -> Difference:
    """A target's score minus another's; `against` may be "best parent", on average the better."""
    if against == "best parent":
        against = max(
            ("policy", "teacher"),
            key=lambda parent: float(scores_of(record, pair, measure, parent).mean()),
        )
    gaps = scores_of(record, pair, measure, target) - scores_of(record, pair, measure, against)
    mean, low, high = targets.interval(gaps.mean(axis=0))
    return Difference(mean, low, high, tuple(gaps.mean(axis=1).tolist()))
