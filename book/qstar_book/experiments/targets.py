"""Texts under several targets made of two models: drawn by the decoder, and read again exactly.

A target says what the next token is drawn from, given the distributions of both parents. Its
probability of a whole text is a product, read off one forward of each parent: so the chance that a
target answers a question rightly is known without drawing anything.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from qstar.decoding.coin import log_even_mixture
from qstar.decoding.generate import decode
from qstar.decoding.judging import Rule
from qstar.decoding.options import check

from .. import shipped_model
from . import family, rollouts, tasks

CANDIDATES = 4
"""Of the source's loop."""


class ArithmeticMean(Rule):
    """The decoder's rule with the parents' even mixture in place of q_alpha."""

    def mix(self, log_policy: Tensor, log_teacher: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The logarithm of the mixture, and what the trace keeps."""
        _, known = Rule.mix(self, log_policy, log_teacher)
        return log_even_mixture(log_policy, log_teacher), known


class SourceLoop(Rule):
    """What the source's loop draws in place of q*, with candidates of the policy's.

    Source: the closed form of `qstar.theory.acceptance.source_loop_distribution`.
    """

    def mix(self, log_policy: Tensor, log_teacher: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The logarithm of the loop's distribution, and what the trace keeps."""
        log_q, known = Rule.mix(self, log_policy, log_teacher)
        shared = torch.minimum(log_policy, log_q)
        accepted = shared.logsumexp(-1, keepdim=True).clamp(max=0)
        all_rejected = CANDIDATES * (-accepted.expm1()).log()
        some_kept = (-all_rejected.expm1()).log() - accepted
        return torch.logaddexp(shared + some_kept, log_q + all_rejected), known


TARGETS: dict[str, Rule] = {
    "policy": Rule(alpha=1.0),
    "teacher": Rule(alpha=0.0),
    "half": Rule(alpha=0.5),
    "q*": Rule(),
    "mixture": ArithmeticMean(alpha=0.5),
    "guided policy": Rule(alpha=1.5),
    "guided teacher": Rule(alpha=-0.5),
    "source loop": SourceLoop(),
}
"""By name, how a target is made of the parents; guidance divides by the other parent."""

COMPARED = tuple(name for name in TARGETS if name != "source loop")


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """A model, and how it is asked.

    Attributes:
        model: A causal language model.
        ask: What it reads before it answers an item. Shape (tokens,).
        say: The tokens of an answer, with what ends it.
        write: The text of drawn tokens.
    """

    model: Any
    ask: Callable[[tasks.Item], Tensor]
    say: Callable[[str], list[int]]
    write: Callable[[Sequence[int]], str] = family.text_of


def of_family(name: str, *, device: str, loaded: dict[str, Any]) -> Reader:
    """A trained small model by name; with "+hint" after it, it reads the answer as a hint.

    Args:
        name: Of the folder in data/family.
        device: Where.
        loaded: By name, models that are there already; a new one is added.
    """
    which, _, hint = name.partition("+")
    if hint not in ("", "hint"):
        raise ValueError(f"expected NAME or NAME+hint; got {name!r}")
    if which not in loaded:
        loaded[which], _ = family.load(which, device=device)
    return Reader(
        loaded[which],
        lambda item: family.prompt_ids(tasks.question(item, hint=item.answer if hint else "")),
        lambda answer: [*family.prompt_ids(f" {answer}").tolist()[1:], 1],
    )


EXAMPLES = "smollm2/examples"
"""The shipped model, which as the teacher is shown how such questions are answered."""


def of_pair(name: str, *, device: str) -> tuple[Reader, Reader]:
    """Both parents of a pair that `pairs.load_pair` knows, which answer as their chat has it; or
    `EXAMPLES`: one model, which as the teacher reads worked examples first, as in `rollouts`.
    """
    if name == EXAMPLES:
        model, tokenizer = shipped_model.load(device=device)
        asked = rollouts.of_chat(tokenizer, hint="examples")
        return (
            _of_chat(model, tokenizer, lambda item: asked([item]).plain[0]),
            _of_chat(model, tokenizer, lambda item: asked([item]).hinted[0]),
        )
    from .pairs import load_pair  # type: ignore[import-not-found, unused-ignore]

    found = load_pair(name, device=device)
    return (
        _of_chat(found.policy, found.tokenizer, lambda item: found.ask(item.prompt)[0]),
        _of_chat(found.teacher, found.tokenizer, lambda item: found.ask(item.prompt)[1]),
    )


def _of_chat(model: Any, tokenizer: Any, ask: Callable[[tasks.Item], Tensor]) -> Reader:
    """A chat model whose answers end as its turns do."""

    def say(answer: str) -> list[int]:
        return [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]

    return Reader(model, ask, say, partial(tokenizer.decode, skip_special_tokens=True))


def draw(
    pair: tuple[Reader, Reader],
    prompts: tuple[Sequence[Tensor], Sequence[Tensor]],
    target: str,
    *,
    seed: int,
    max_new_tokens: int,
    rows: int = 1_024,
    choose: Any = None,
    **options: Any,
) -> list[list[int]]:
    """The new tokens of a text after each prompt, drawn from a target by the decoder.

    Args:
        pair: Policy and teacher.
        prompts: Theirs, one for each text.
        target: A key of `TARGETS`.
        seed: Of the draws; a row's draw hangs on it and on its place.
        max_new_tokens: The longest a text gets.
        rows: Texts in one batch.
        choose: As in `qstar.decoding.generate.decode`.
        **options: For the decoder, such as a scheme.
    """
    texts: list[list[int]] = []
    for start in range(0, len(prompts[0]), rows):
        setup = check(
            pair[0].model,
            pair[1].model,
            *(list(own[start : start + rows]) for own in prompts),
            generator=seed + start,
            max_new_tokens=max_new_tokens,
            alpha=TARGETS[target].alpha,
            **{"scheme": "plain", "cache_implementation": "dynamic", **options},
        )
        rule = type(TARGETS[target])(**{f.name: getattr(setup.rule, f.name) for f in fields(Rule)})
        result, _ = decode(replace(setup, rule=rule), choose=choose)
        lengths = result.lengths.tolist()
        texts += [row[:n] for row, n in zip(result.tokens.tolist(), lengths, strict=True)]
    return texts


def log_rows(model: Any, prompts: Sequence[Tensor], texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """A model's log-probabilities where each token of a text was drawn, in float64.

    Args:
        model: One that masks what follows a token, so that what a shorter text is filled up with
            on its right does not matter.
        prompts: What is read before each text. Shape (tokens,).
        texts: The texts.

    Returns:
        For each text. Shape (tokens, vocab).
    """
    whole = [[*p.tolist(), *text] for p, text in zip(prompts, texts, strict=True)]
    longest = max(map(len, whole))
    device = next(model.parameters()).device
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in whole], device=device)
    logits = model(ids, use_cache=False).logits
    return [
        row[len(p) - 1 : len(p) - 1 + len(text)].double().log_softmax(-1)
        for row, p, text in zip(logits, prompts, texts, strict=True)
    ]


@torch.inference_mode()
def read(
    pair: tuple[Reader, Reader],
    prompts: tuple[Sequence[Tensor], Sequence[Tensor]],
    texts: Sequence[Sequence[int]],
    *,
    targets: Sequence[str] = COMPARED,
    rows: int | None = None,
) -> list[dict[str, ndarray]]:
    """The log-probability of every token of some texts by target, and whether it is the top.

    Args:
        pair: Policy and teacher.
        prompts: Theirs, one for each text.
        texts: What follows them.
        targets: Keys of `TARGETS`.
        rows: Texts in one batch; None for fewer the larger the vocabulary is.

    Returns:
        For each text, by target; with "top " before the target's name, whether no other token is
        more probable. Shape (tokens,).
    """
    found: list[dict[str, ndarray]] = []
    if rows is None:
        vocab = pair[0].model.get_output_embeddings().weight.shape[0]
        rows = max(1, min(256, 2**20 // vocab))
    for start in range(0, len(texts), rows):
        some = [list(text) for text in texts[start : start + rows]]
        log_policy, log_teacher = (
            torch.cat(log_rows(reader.model, own[start : start + rows], some))
            for reader, own in zip(pair, prompts, strict=True)
        )
        drawn = torch.tensor([t for text in some for t in text], device=log_policy.device)
        ends = np.cumsum([len(text) for text in some])[:-1]
        values: dict[str, Tensor] = {}
        for target in targets:
            log_q, _ = TARGETS[target].mix(log_policy, log_teacher)
            values[target] = log_q.gather(-1, drawn[:, None]).squeeze(-1)
            values[f"top {target}"] = values[target] == log_q.amax(-1)
        parts = {name: np.split(v.cpu().numpy(), ends) for name, v in values.items()}
        found += [{name: of[i] for name, of in parts.items()} for i in range(len(some))]
    return found


def asked(
    pair: tuple[Reader, Reader], items: Sequence[tasks.Item]
) -> tuple[list[Tensor], list[Tensor]]:
    """What policy and teacher read before they answer each item."""
    policy, teacher = ([reader.ask(item) for item in items] for reader in pair)
    return policy, teacher


def interval(values: ndarray, *, seed: int = 0, draws: int = 10_000) -> tuple[float, float, float]:
    """The mean over the first axis, and the ends of its 95% bootstrap interval.

    Differences of what was measured on the same items give a paired interval.
    """
    generator = np.random.default_rng(seed)
    means = [
        values[generator.integers(len(values), size=(block, len(values)))].mean(axis=1)
        for block in [1_000] * math.ceil(draws / 1_000)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)
