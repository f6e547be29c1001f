"""A small draft model trained towards q* of two models: what is accepted, and when it pays.

    qstar-book train drafter --policy 1m-numbers --teacher 1m-words --out data/family/drafter
    qstar-book record drafters --policy 1m-numbers --teacher 1m-words --out FILE

Texts are whole documents that q* writes after the sign that begins one, so that the draft model
learns, and is tested, where it will draft. Draft lengths are compared by replay: given the text
that was emitted, a draft x is kept with probability min(1, draft(x) / q*(x)) at each position,
whatever the rule that chose the length. So all rules meet the same texts and the same luck.
"""

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from qstar.decoding import costs as cost
from qstar.decoding.coin import log_even_mixture
from qstar.decoding.costs import Costs
from qstar.decoding.judging import Rule
from qstar.decoding.planner import GAMMAS, Evidence, Lookup, Plan, observe
from qstar.decoding.state import Step

from ..files import RefusedError, provenance, write_json
from ..records.decoding import seconds_by_width
from . import family, targets, tasks
from .jobs import device_name
from .targets import Reader

OBJECTIVES = ("kl", "tv", "sampled")
"""KL(q* || draft), TV(q*, draft), and the log-loss of the tokens that q* drew."""

LEARNING_RATE = 1e-3
"""The highest, after a twentieth of the steps; a cosine leads to a tenth."""


@dataclass(frozen=True, slots=True)
class Drafting:
    """What is trained and measured.

    Attributes:
        policy: A trained small model.
        teacher: Another.
        start: What the draft model is before it is trained towards q*: one that learned from the
            documents themselves.
        texts: Documents of q* that are learned from.
        steps: Optimiser steps.
        batch: Documents a step.
        seeds: How often each objective is trained, with other texts in another order.
        tested: Documents of q* that no draft model has seen, and as many of the held-out tasks.
        replays: How often each tested document is replayed under each rule.
        live: Documents that are decoded under each rule, and by each scheme.
        draft_costs: What a forward of the draft model costs in the replays, where one of a parent
            costs 1.
        max_new_tokens: The longest a document may get.
        seed: The first one.
    """

    policy: str
    teacher: str
    start: str = "300k"
    texts: int = 1_024
    steps: int = 600
    batch: int = 64
    seeds: int = 3
    tested: int = 128
    replays: int = 5
    live: int = 12
    draft_costs: tuple[float, ...] = (0.02, 0.1, 0.3)
    max_new_tokens: int = 100
    seed: int = 0

    def quick(self) -> "Drafting":
        """Small and few: a rehearsal."""
        return replace(self, texts=16, steps=3, batch=8, seeds=2, tested=8, replays=2, live=2)


# --- Texts of q* ---------------------------------------------------------------------------------


def documents(
    pair: tuple[Reader, Reader], count: int, *, seed: int, max_new_tokens: int, **options: Any
) -> list[list[int]]:
    """Whole documents of q* of a pair, from the first character on."""
    begin = [family.prompt_ids("")] * count
    return targets.draw(
        pair, (begin, begin), "q*", seed=seed, max_new_tokens=max_new_tokens, **options
    )


def held_out(count: int) -> list[list[int]]:
    """Documents with right answers to questions that no training text holds."""
    return [
        [*family.prompt_ids(tasks.document(item)).tolist()[1:], 1]
        for item in tasks.items(None, count)
    ]


@dataclass(frozen=True, slots=True, eq=False)
class Lessons:
    """What a draft model learns from.

    Attributes:
        ids: Documents, filled up on the right. Shape (documents, tokens).
        log_target: log q* where each token but the first was drawn, float32. Shape (documents,
            tokens - 1, vocab).
        real: Which of these tokens are no filling. Shape (documents, tokens - 1).
    """

    ids: Tensor
    log_target: Tensor
    real: Tensor


@torch.inference_mode()
def lessons(
    pair: tuple[Reader, Reader], texts: Sequence[Sequence[int]], *, rows: int = 256
) -> Lessons:
    """Documents with the distribution that a draft model should have there."""
    device = next(pair[0].model.parameters()).device
    longest = max(map(len, texts))
    ids = torch.tensor([[0, *t, *[0] * (longest - len(t))] for t in texts], device=device)
    real = torch.arange(longest, device=device) < torch.tensor(
        [[len(t)] for t in texts], device=device
    )
    parts = []
    for some in ids.split(rows):
        log_parents = [
            reader.model(some, use_cache=False).logits[:, :-1].double().log_softmax(-1)
            for reader in pair
        ]
        parts.append(Rule().mix(*log_parents)[0].float())
    return Lessons(ids, torch.cat(parts), real)


# --- Training ------------------------------------------------------------------------------------


def loss_of(objective: str, log_draft: Tensor, log_target: Tensor, drawn: Tensor) -> Tensor:
    """What an objective charges at each position.

    Args:
        objective: One of `OBJECTIVES`.
        log_draft: Shape (positions, vocab).
        log_target: Shape (positions, vocab).
        drawn: The tokens that q* drew. Shape (positions,).
    """
    if objective == "kl":
        target = log_target.exp()
        return (torch.xlogy(target, target) - target * log_draft).sum(-1)
    if objective == "tv":
        return 1 - torch.minimum(log_draft, log_target).exp().sum(-1)
    if objective == "sampled":
        return -log_draft.gather(-1, drawn[:, None]).squeeze(-1)
    raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}: got {objective!r}.")


def train_drafter(
    start: Any, lessons: Lessons, objective: str, *, steps: int, batch: int, seed: int
) -> tuple[Any, list[float]]:
    """A copy of a model, trained towards q* and rounded to bfloat16; and the loss of each step.

    Args:
        start: Where to begin; it is left as it is.
        lessons: What to learn from.
        objective: One of `OBJECTIVES`.
        steps: Optimiser steps.
        batch: Documents a step.
        seed: Of the order of the documents.
    """
    model = copy.deepcopy(start).train()
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.1)
    generator = torch.Generator().manual_seed(seed)
    warm, losses = max(1, steps // 20), []
    for step in range(steps):
        way = max(0.0, (step - warm) / max(1, steps - warm))
        rate = min(1.0, (step + 1) / warm) * (0.55 + 0.45 * np.cos(np.pi * way))
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * rate
        chosen = torch.randint(len(lessons.ids), (batch,), generator=generator)
        chosen = chosen.to(lessons.ids.device)
        ids, real = lessons.ids[chosen], lessons.real[chosen]
        log_draft = model(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        loss = loss_of(
            objective, log_draft[real], lessons.log_target[chosen][real], ids[:, 1:][real]
        ).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.detach())
    model.to(torch.bfloat16).float()  # as it is kept
    return model.eval(), torch.stack(losses).double().cpu().tolist()


# --- Acceptance ----------------------------------------------------------------------------------

DRAFTERS = ("policy", "teacher", "coin", "lookup")
"""Who can draft without a model of its own."""


@torch.inference_mode()
def acceptances(
    pair: tuple[Reader, Reader],
    drafts: Mapping[str, Any],
    texts: Sequence[Sequence[int]],
    *,
    rows: int = 128,
) -> list[dict[str, ndarray]]:
    """What is accepted at each position of some documents, read once by every model.

    Args:
        pair: Policy and teacher.
        drafts: Draft models by name.
        texts: Documents without the sign that begins one.
        rows: Documents in one batch.

    Returns:
        For each text, shape (tokens,): "chernoff" in nats; by drafter its acceptance probability,
        1 - TV; for "lookup" q*'s probability of the token that followed the last two or three where
        they stood before, nan where they did not;
        and with "kept " before a draft's name, the probability min(1, draft / q*) that the token
        that was emitted is a draft that was kept.
    """
    found: list[dict[str, ndarray]] = []
    for start in range(0, len(texts), rows):
        some = texts[start : start + rows]
        begin = [family.prompt_ids("")] * len(some)
        log_p, log_t = (torch.cat(targets.log_rows(r.model, begin, some)) for r in pair)
        log_q, known = Rule().mix(log_p, log_t)
        drawn = torch.tensor([t for text in some for t in text], device=log_q.device)[:, None]
        values: dict[str, Tensor] = {"chernoff": known["minus_log_partition"]}
        proposing = {"policy": log_p, "teacher": log_t, "coin": log_even_mixture(log_p, log_t)}
        for name, log_draft in proposing.items():
            values[name] = torch.minimum(log_draft, log_q).exp().sum(-1)
        for name, model in drafts.items():
            log_draft = torch.cat(targets.log_rows(model, begin, some))
            values[name] = torch.minimum(log_draft, log_q).exp().sum(-1)
            ratio = (log_draft - log_q).gather(-1, drawn).squeeze(-1)
            values[f"kept {name}"] = ratio.clamp(max=0).exp()
        guesses = [guess for text in some for guess in _guesses(text)]
        sought = torch.tensor([max(g, 0) for g in guesses], device=log_q.device)[:, None]
        looked_up = log_q.gather(-1, sought).squeeze(-1).exp()
        missing = torch.tensor([g < 0 for g in guesses], device=log_q.device)
        values["lookup"] = looked_up.masked_fill(missing, torch.nan)
        ends = np.cumsum([len(text) for text in some])[:-1]
        split = {name: np.split(v.cpu().numpy(), ends) for name, v in values.items()}
        found += [{name: parts[i] for name, parts in split.items()} for i in range(len(some))]
    return found


def _guesses(text: Sequence[int]) -> list[int]:
    """What a lookup proposes for each token of a document, -1 where the last two are new."""
    lookup, found = Lookup([0], {3: 0.5, 2: 0.5}), []
    for token in text:
        found.append((lookup.propose(1) or [-1])[0])
        lookup.append([token])
    return found


# --- Draft lengths -------------------------------------------------------------------------------


@dataclass(slots=True)
class History:
    """What a rule may look at: rounds that are over, and tokens that were emitted.

    Attributes:
        rounds: Of each round, how many tokens were drafted and how many kept.
        observed: As `planner.observe` keeps it.
        chernoff: Of the emitted positions, in nats.
        ahead: The probabilities that the next tokens are kept drafts; for the oracle alone.
    """

    rounds: list[tuple[int, int]]
    observed: dict[str, tuple[float, float]]
    chernoff: list[float]
    ahead: Sequence[float] = ()


Length = Callable[[History, Costs], int]


def best_length(acceptance: float, costs: Costs) -> int:
    """The draft length with the fewest seconds per token, at one acceptance everywhere."""
    return min(GAMMAS, key=lambda gamma: cost.third(costs, gamma, acceptance, draft_forwards=gamma))


def _heuristic(history: History, costs: Costs) -> int:
    """Two more after a round whose drafts were all kept, else one less; 5 at first."""
    gamma = 5
    for drafted, kept in history.rounds:
        gamma = gamma + 2 if kept == drafted else max(1, gamma - 1)
    return min(gamma, GAMMAS[-1])


def _average(history: History, costs: Costs) -> int:
    evidence = Evidence(history.observed, remaining=0, lookups=(), outstanding=False)
    return best_length(evidence.acceptance("draft"), costs)


def _mean_chernoff(history: History, costs: Costs) -> int:
    return best_length(float(np.exp(-np.mean(history.chernoff or [0.1]))), costs)


def _last_chernoff(history: History, costs: Costs) -> int:
    return best_length(float(np.exp(-(history.chernoff or [0.1])[-1])), costs)


def _oracle(history: History, costs: Costs) -> int:
    """The best length of one round, had one known what would be kept."""
    ahead = np.array(history.ahead[: GAMMAS[-1]])

    def seconds(gamma: int) -> float:
        tokens = 1 + np.cumprod(ahead[:gamma])[: len(history.ahead) - 1].sum()
        return float((gamma * costs.of("draft", 1) + cost.plain(costs)) / tokens)

    return min(GAMMAS, key=seconds)


RULES: dict[str, Length] = {
    **{f"fixed {gamma}": (lambda _, __, gamma=gamma: gamma) for gamma in GAMMAS},  # type: ignore[misc]
    "up and down": _heuristic,
    "planner": _average,
    "mean C": _mean_chernoff,
    "last C": _last_chernoff,
    "oracle": _oracle,
}
"""How many tokens the next round drafts. "up and down" is the heuristic of transformers, "planner"
the decoder's own rule, by the acceptance that was observed; the two of C take exp(-C) for the
acceptance. "oracle" knows what no rule can."""


def replay(
    trace: Mapping[str, ndarray], draft: str, rule: Length, costs: Costs, luck: ndarray
) -> tuple[float, int, int]:
    """Decode a document again, of which every token is known.

    Args:
        trace: Of one text, from `acceptances`.
        draft: Whose drafts.
        rule: How many of them each round.
        costs: What forwards take; a parent's takes the same at every width.
        luck: A uniform number for each token, which decides whether its draft is kept.

    Returns:
        The cost, the rounds and the forwards of the draft model.
    """
    probability, chernoff = trace[f"kept {draft}"], trace["chernoff"]
    kept = luck < probability
    history, at, drafts = History([], {}, []), 0, 0
    while at < len(kept):
        history.ahead = probability[at:].tolist()
        gamma = rule(history, costs)
        drafts += gamma
        run = kept[at : at + gamma]
        accepted = int(run.argmin()) if not run.all() else len(run)
        history.rounds.append((gamma, accepted))
        # As in a decode, where the end of a text cuts the drafts off after it.
        observe(history.observed, "draft", accepted, min(accepted + 1, gamma))
        emitted = min(accepted + 1, len(kept) - at)
        history.chernoff += chernoff[at : at + emitted].tolist()
        at += emitted
    rounds = len(history.rounds)
    return drafts * costs.of("draft", 1) + rounds * cost.plain(costs), rounds, drafts


def compare_lengths(
    traces: Sequence[Mapping[str, ndarray]], draft: str, costs: Costs, *, replays: int, seed: int
) -> dict[str, list[float]]:
    """The cost of a token of each text under each rule, all with the same luck."""
    found: dict[str, list[float]] = {name: [] for name in RULES}
    generator = np.random.default_rng(seed)
    for trace in traces:
        luck = generator.random((replays, len(trace["chernoff"])))
        for name, rule in RULES.items():
            spent = [replay(trace, draft, rule, costs, numbers)[0] for numbers in luck]
            found[name].append(float(np.mean(spent) / luck.shape[1]))
    return found


def live(
    pair: tuple[Reader, Reader],
    draft: Any,
    rule: Length,
    costs: Costs,
    *,
    seed: int,
    max_new_tokens: int,
) -> dict[str, int]:
    """One document, decoded by the rule: its tokens, rounds, and forwards of the draft model."""
    planned: list[int] = []

    def choose(evidence: Evidence, steps: Sequence[Step]) -> Plan:
        history = History(
            [(step.counts[0], step.accepted[0]) for step in steps],
            dict(evidence.observed),
            [
                x
                for step in steps
                for x in step.known["minus_log_partition"][0, : len(step.emitted[0])].tolist()
            ],
        )
        room = max(1, evidence.remaining - 1)
        planned.append(min(room, rule(history, costs)))
        return Plan("draft-model", planned[-1], "policy")

    [text] = documents(
        pair,
        1,
        seed=seed,
        max_new_tokens=max_new_tokens,
        scheme="draft-model",
        draft_model=draft,
        choose=choose,
    )
    return {"tokens": len(text), "rounds": len(planned), "drafts": sum(planned)}


# --- The commands --------------------------------------------------------------------------------


def _reader(name: str, device: str) -> Reader:
    return targets.of_family(name, device=device, loaded={})


def train_command(
    *,
    policy: str,
    teacher: str,
    start: str,
    steps: int | None,
    objective: str,
    out: Path,
    seed: int,
    device: str,
) -> None:
    """`qstar-book train drafter`."""
    if objective not in OBJECTIVES:
        raise RefusedError(f"--objective must be one of {', '.join(OBJECTIVES)}; got {objective!r}")
    c = Drafting(policy, teacher, start, seed=seed)
    c = c if steps is None else replace(c, steps=steps)
    pair = _reader(policy, device), _reader(teacher, device)
    model, losses = _train(c, pair, family.load(start, device=device)[0], objective, seed)
    _save(c, model, losses, objective, out, device)
    print(f"{out}: last loss {losses[-1]:.4f}")


def _train(
    c: Drafting, pair: tuple[Reader, Reader], start: Any, objective: str, seed: int
) -> tuple[Any, list[float]]:
    texts = documents(pair, c.texts, seed=_texts_seed(seed), max_new_tokens=c.max_new_tokens)
    learned = lessons(pair, texts)
    return train_drafter(start, learned, objective, steps=c.steps, batch=c.batch, seed=seed)


def _texts_seed(seed: int) -> int:
    return 10_000_019 * (seed + 1)


def _save(
    c: Drafting, model: Any, losses: list[float], objective: str, out: Path, device: str
) -> None:
    told = family.Training(**_training_of(c.start))
    made_by = provenance("torch", "transformers", device=device_name(device))
    family.save(model, out, told, losses, objective=objective, drafter=asdict(c), made_by=made_by)


def _training_of(name: str) -> dict[str, Any]:
    import json

    told = json.loads((family.folder_of(name) / "training.json").read_text("utf8"))["training"]
    return told | {"kinds": tuple(told["kinds"])}


def measure(
    configuration: Drafting, *, device: str, save: Any = None, keep: Path | None = None
) -> dict[str, Any]:
    """The whole record, but how it was made.

    Args:
        configuration: What is trained and measured.
        device: Where.
        save: Called with what there is so far, after each part.
        keep: Where the draft model of the first seed, trained by KL, is written.
    """
    c = configuration
    pair = _reader(c.policy, device), _reader(c.teacher, device)
    start, _ = family.load(c.start, device=device)
    untrained = family.new_model(family.Training(**_training_of(c.start)).size, seed=c.seed)
    drafts: dict[str, Any] = {"untrained": untrained.to(device), "own data": start}
    found: dict[str, Any] = {"configuration": asdict(c), "losses": {}}

    def tell(said: str) -> None:
        print(said, file=sys.stderr, flush=True)
        if save is not None:
            save(found)

    for seed in range(c.seed, c.seed + c.seeds):
        texts = documents(pair, c.texts, seed=_texts_seed(seed), max_new_tokens=c.max_new_tokens)
        learned = lessons(pair, texts)
        for objective in OBJECTIVES:
            name = f"{objective} {seed}"
            tell(name)
            drafts[name], losses = train_drafter(
                start, learned, objective, steps=c.steps, batch=c.batch, seed=seed
            )
            if keep is not None and name == f"kl {c.seed}":
                _save(c, copy.deepcopy(drafts[name]), losses, objective, keep, device)
            found["losses"][name] = [float(f"{x:.4g}") for x in losses]
    tell("acceptances")
    fresh = documents(pair, c.tested, seed=c.seed + 77, max_new_tokens=c.max_new_tokens)
    kinds = {"of q*": fresh, "held out": held_out(c.tested)}
    traces = {name: acceptances(pair, drafts, texts) for name, texts in kinds.items()}
    best = f"kl {c.seed}"
    found["texts"] = {
        "of q*": fresh,
        "examples": [family.text_of(text) for text in fresh[:5]],
    }
    found["acceptance"] = {
        kind: {
            name: [_short(np.nanmean(t[name])) if name in t else None for t in of]
            for name in [*DRAFTERS, *drafts, "chernoff"]
            if name != "lookup"
        }
        | {"tokens": [len(t["chernoff"]) for t in of]}
        | {
            "lookup": [_short(np.nansum(t["lookup"])) for t in of],
            "looked up": [int(np.isfinite(t["lookup"]).sum()) for t in of],
        }
        for kind, of in traces.items()
    }
    found["positions"] = {
        name: [[_short(x) for x in t[name]] for t in traces["of q*"]]
        for name in ("chernoff", "policy", "teacher", best, f"kept {best}", f"tv {c.seed}")
    }
    tell("draft lengths, replayed")
    found["replayed"] = {
        str(draft_cost): {
            rule: [_short(x) for x in spent]
            for rule, spent in compare_lengths(
                traces["of q*"], best, stated(draft_cost), replays=c.replays, seed=c.seed
            ).items()
        }
        for draft_cost in c.draft_costs
    }
    tell("draft lengths, live")
    assumed = stated(c.draft_costs[len(c.draft_costs) // 2])
    found["live"] = {
        rule: [
            live(
                pair,
                drafts[best],
                RULES[rule],
                assumed,
                seed=c.seed + 1_000 + i,
                max_new_tokens=c.max_new_tokens,
            )
            for i in range(c.live)
        ]
        for rule in ("fixed 4", "up and down", "planner", "mean C", "last C")
    }
    tell("forwards")
    prompt = torch.tensor([0, *fresh[0]])[:30]
    with torch.no_grad():
        found["seconds"] = {
            name: seconds_by_width(model, prompt, rounds=20)
            for name, model in (
                ("policy", pair[0].model),
                ("teacher", pair[1].model),
                ("draft", drafts[best]),
            )
        }
    found["weights"] = {
        name: sum(x.numel() for x in model.parameters())
        for name, model in (
            ("policy", pair[0].model),
            ("teacher", pair[1].model),
            ("draft", drafts[best]),
        )
    }
    return found


def stated(draft_cost: float) -> Costs:
    """A forward of a parent costs 1 at every width, one of the draft model so much."""
    return Costs(policy={1: 1.0}, teacher={1: 1.0}, draft={1: draft_cost})


def _short(x: Any) -> float:
    return float(f"{float(x):.4g}")


def command(
    *,
    out: Path,
    policy: str,
    teacher: str,
    start: str,
    steps: int | None,
    texts: int | None,
    keep: Path | None,
    device: str,
    quick: bool,
    seed: int,
) -> None:
    """`qstar-book record drafters`."""
    c = Drafting(policy, teacher, start, seed=seed)
    c = c.quick() if quick else c
    c = c if steps is None else replace(c, steps=steps)
    c = c if texts is None else replace(c, texts=texts)
    made_by = provenance("numpy", "torch", "transformers", device=device_name(device))

    def save(found: Mapping[str, Any]) -> None:
        write_json(out, {"made_by": made_by, **found})

    save(measure(c, device=device, save=save, keep=keep))
    print(out)
