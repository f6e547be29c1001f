"""Every argument of a decode, checked once, before anything is read."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_count, check_fixed_alpha
from ..sampling.chance import Chance, RowCoins
from . import cache_check, planner
from .costs import PARENTS, other
from .filters import FILTERED, MEMORYLESS, filters_for
from .inputs import Prompts, check_prompts, check_shown, check_vocab, check_weights
from .judging import Rule
from .kv_cache import KVCache
from .sampling_options import Sampling, Stop, check_names
from .state import State
from .traits import bare

SCHEMES = (*planner.SCHEMES, "auto")


@dataclass(frozen=True, slots=True, eq=False)
class Setup:
    """What was asked for, once it makes sense.

    Attributes:
        caches: By model, what reads it.
        state: The prompts.
        rule: What the output distribution is.
        chance: The source of all choices.
        vocab: How many token ids are used.
        ends: The ids that end a row.
        stopping_criteria: What else may end it.
        scheme: One of `SCHEMES`.
        gamma: The draft length, None to adapt it.
        sampling: All that was asked for, as it was.
        on_tokens: Called after each round.
        single: Whether the prompts came without a batch axis.
        device: Theirs.
    """

    caches: Mapping[str, KVCache]
    state: State
    rule: Rule
    chance: Chance
    vocab: int
    ends: frozenset[int]
    stopping_criteria: tuple[Stop, ...]
    scheme: str
    gamma: int | None
    sampling: Sampling
    on_tokens: Callable[[Tensor], object] | None
    single: bool
    device: torch.device


def check(
    policy: Any,
    teacher: Any,
    policy_ids: Prompts,
    teacher_ids: Prompts | None = None,
    *,
    sampling: Sampling | None = None,
    generator: torch.Generator | Chance | int | None = None,
    draft_model: Any = None,
    draft_ids: Prompts | None = None,
    shown_ids: Sequence[Tensor] | None = None,
    on_tokens: Callable[[Tensor], object] | None = None,
    **options: Any,
) -> Setup:
    """The arguments of `generate`, which documents them, as a decode needs them.

    Each kind of model is tried with its cache here, once a process.

    Raises:
        TypeError: An option is no field of `Sampling`.
        ValueError: As `generate`.
    """
    if sampling is not None and options:
        raise ValueError(
            f"{', '.join(options)} came by name beside sampling=..., which says it too: use "
            f"dataclasses.replace(sampling, ...)."
        )
    check_names(options)
    asked = Sampling(**options) if sampling is None else sampling
    policy, teacher, draft_model = bare(policy), bare(teacher), bare(draft_model)
    models = {"policy": policy, "teacher": teacher, "draft": draft_model}
    if asked.cache_implementation is not None:
        _check_choice("cache_implementation", asked.cache_implementation, ("static", "dynamic"))
    caches = {
        name: KVCache(
            model,
            name=name,
            context_length=asked.context_length,
            implementation=asked.cache_implementation,
        )
        for name, model in models.items()
        if name != "draft" or model is not None
    }
    check_weights({"policy": policy, "teacher": teacher, "draft model": draft_model})
    max_new_tokens = check_count("max_new_tokens", asked.max_new_tokens)
    gamma = _check_scheme(asked, draft_model, draft_ids)
    _check_choice("filtered", asked.filtered, FILTERED)
    size = check_vocab(caches, asked.vocab)
    prompts, single, device = check_prompts(
        caches,
        size,
        max_new_tokens,
        {"policy": policy_ids, "teacher": teacher_ids, "draft": draft_ids},
    )
    rows = len(prompts["policy"])
    rule = Rule(
        alpha=check_fixed_alpha(asked.alpha),
        filters=filters_for(
            temperature=asked.temperature,
            top_k=asked.top_k,
            top_p=asked.top_p,
            logits_processor=_check_callable("logits_processor", asked.logits_processor),
            greedy=asked.greedy,
        ),
        filtered=asked.filtered,
        blocks=asked.block_verification,
    )
    rule = replace(rule, disjoint=_check_disjoint(asked, rule, size))
    shown = check_shown(shown_ids, prompts["policy"])
    chance = _check_generator(generator, rows)
    ends = _check_ends(asked.eos_token_id, policy, size)
    stopping_criteria = _check_callable("stopping_criteria", asked.stopping_criteria)
    scheme, gamma = _settle(asked, gamma, caches, prompts, max_new_tokens)
    return Setup(
        caches=caches,
        state=State(
            prompts=prompts,
            shown=shown,
            new=((),) * rows,
            rows=tuple(range(rows)),
            limit=max_new_tokens,
        ),
        rule=rule,
        chance=chance,
        vocab=size,
        ends=ends,
        stopping_criteria=stopping_criteria,
        scheme=scheme,
        gamma=gamma,
        sampling=asked,
        on_tokens=on_tokens,
        single=single,
        device=device,
    )


def _settle(
    asked: Sampling,
    gamma: int | None,
    caches: Mapping[str, KVCache],
    prompts: dict[str, list[list[int]]],
    max_new_tokens: int,
) -> tuple[str, int | None]:
    """The scheme and draft length, once each model has been tried with its cache.

    The one step that reads: what can be refused without reading has been before.
    """
    rows = len(prompts["policy"])
    longest = max(len(prompt) for texts in prompts.values() for prompt in texts) + max_new_tokens
    one_model = caches["policy"].model is caches["teacher"].model
    in_one_call = one_model and asked.one_call is not False
    settle = partial(
        planner.asked_for,
        asked.scheme,
        gamma,
        in_one_call=in_one_call,
        has_draft="draft" in caches,
    )
    expected, _ = settle(plain_only=False)
    if asked.one_call and (not one_model or expected not in (*planner.TOGETHER, "auto")):
        raise ValueError(
            f"one_call needs one model as both parents, and a scheme in which both read the same "
            f"tokens at once ({', '.join(planner.TOGETHER)}): got scheme={expected!r} and "
            f"{'one model' if one_model else 'two models'}."
        )
    paired = in_one_call and asked.scheme in (None, *planner.TOGETHER, "auto")
    for name, cache in caches.items():
        cache.reserved = longest
        cache_check.check(cache, longest, rows=rows + (paired and name != "draft"))
    holed = _holed(caches, prompts, max_new_tokens)
    # Read anew for every token, a draft would be a reading of its own.
    rereads = any(cache.rereads for cache in caches.values())
    scheme, gamma = settle(plain_only=holed is not None or rereads)
    if holed is not None and scheme != "plain":
        raise ValueError(
            f"the {holed}, and scheme={scheme!r} leaves holes in the cache of a batch whose texts "
            f"may outgrow that. Leave scheme and gamma out, or pass scheme='plain', which is exact "
            f"for a batch too; or decode its rows one at a time."
        )
    return scheme, gamma


def _holed(
    caches: Mapping[str, KVCache], prompts: dict[str, list[list[int]]], max_new_tokens: int
) -> str | None:
    """The first model that holes in its cache may mislead, and what it does, if there is any.

    The holes are where the rejected drafts of a batch were; a window must not reach them.

    A cache holds no more than the longest text and one forward, of the tokens that its row has
    not read and of its drafts: at most max_new_tokens of either.
    """
    if len(prompts["policy"]) == 1 or max_new_tokens == 1:  # a last token is not drafted for
        return None
    for name, reader in caches.items():
        longest = max(map(len, prompts[name]))
        if reader.slides(longest + 3 * max_new_tokens):
            return f"{'draft model' if name == 'draft' else name} {reader.minds_holes}"
    return None


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}: got {value!r}.")


def _check_scheme(asked: Sampling, draft_model: Any, draft_ids: Any) -> int | None:
    """The draft length as an int, once what was asked for fits together."""
    scheme, gamma, stay, drafter = asked.scheme, asked.gamma, asked.stay, asked.drafter
    if scheme is not None:
        _check_choice("scheme", scheme, SCHEMES)
    if scheme == "coin" and asked.block_verification:
        raise ValueError(
            "scheme='coin' judges token by token: with block_verification=True how long a block is "
            "would depend on who proposes. Leave out one of the two."
        )
    if stay is not None:
        if scheme != "coin":
            raise ValueError(
                f"stay weighs the coin of scheme='coin': got stay={stay!r} with scheme={scheme!r}."
            )
        if not 0 <= float(stay) < 1:
            raise ValueError(
                f"stay is the probability that a parent goes on proposing and must lie in [0, 1): "
                f"got {stay}. None lets the planner choose it."
            )
    if gamma is not None:
        try:
            gamma = check_count("gamma", gamma)
        except ValueError as error:
            raise ValueError(
                f"{error} It counts the draft tokens of a round: None adapts it, scheme='plain' "
                f"drafts nothing."
            ) from None
        if scheme == "plain":
            raise ValueError(f"scheme='plain' drafts nothing: leave gamma out (got {gamma}).")
    if drafter is not None:
        _check_choice("drafter", drafter, PARENTS)
        if scheme != "one-sided":
            raise ValueError(
                f"drafter says who drafts with scheme='one-sided': got drafter={drafter!r} with "
                f"scheme={scheme!r}."
            )
    if draft_model is None:
        if scheme == "draft-model":
            raise ValueError(
                "scheme='draft-model' needs draft_model, a third causal language model."
            )
        if draft_ids is not None:
            raise ValueError("draft_ids are read by a draft model: pass draft_model=... too.")
    elif scheme in (None, "draft-model", "auto") and asked.costs and asked.costs.draft is None:
        raise ValueError(
            "costs say nothing of the draft model: pass Costs(..., draft={1: seconds}), or leave "
            "costs out."
        )
    return gamma


def _check_callable(name: str, functions: Any) -> tuple[Any, ...]:
    """Functions as a tuple; ValueError before anything is read with them."""
    if callable(functions) and not isinstance(functions, Sequence):
        raise ValueError(f"{name} holds functions, in a list: got {functions!r} alone.")
    for function in functions:
        if not callable(function):
            raise ValueError(f"{name} must hold functions: got {function!r}.")
    return tuple(functions)


def _check_disjoint(asked: Sampling, rule: Rule, vocab: int) -> str:
    """What to do without a q*; ValueError where nobody said and filters make it to be expected."""
    if asked.disjoint is not None:
        _check_choice("disjoint", asked.disjoint, ("raise", "mixture"))
        if asked.disjoint == "mixture" and rule.divisor is not None:
            raise ValueError(
                f"disjoint='mixture' is what smoothing gives for an alpha in [0, 1]: with alpha="
                f"{rule.alpha} the {rule.divisor} is divided by, and there is no such limit where "
                f"it excludes what the {other(rule.divisor)} keeps. Leave disjoint out."
            )
        return asked.disjoint
    cut = [type(step).__name__ for step in rule.filters.steps if _cuts(step, vocab)]
    if asked.filtered == "parents" and cut and rule.divisor is not None:
        raise ValueError(
            f"{', '.join(cut)} on the parents can take a token from the {rule.divisor} that the "
            f"{other(rule.divisor)} keeps, and with alpha={rule.alpha} there is then nothing to "
            f"draw from. Apply it to what is drawn from (filtered='target'), or pass "
            f"disjoint='raise', which stops there and loses what was drawn."
        )
    if asked.filtered == "parents" and cut:
        raise ValueError(
            f"{', '.join(cut)} on the parents can leave them without a shared token, where q* does "
            f"not exist. Apply it to q* (filtered='target'), or say what is to be done there: "
            f"disjoint='mixture' draws from their even mixture, disjoint='raise' stops and loses "
            f"what was drawn."
        )
    return "raise"


def _cuts(step: Any, vocab: int) -> bool:
    """Whether a filter takes improbable tokens away, be they what the other parent keeps."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    if isinstance(step, TopKLogitsWarper):
        return bool(step.top_k < vocab)
    if isinstance(step, TopPLogitsWarper):
        return bool(step.top_p < 1)
    return isinstance(step, MEMORYLESS) and not isinstance(step, TemperatureLogitsWarper)


def _check_generator(generator: torch.Generator | Chance | int | None, rows: int) -> Chance:
    if generator is None:
        return RowCoins.of(torch.default_generator, rows)
    if isinstance(generator, torch.Generator):
        if generator.device.type != "cpu":
            raise ValueError(
                f"generator must live on the CPU (it serves models on any device): got one on "
                f"{generator.device}. Use torch.Generator() or pass a seed."
            )
        return RowCoins.of(generator, rows)
    if isinstance(generator, Chance):
        return generator
    try:
        seeded = torch.Generator().manual_seed(operator.index(generator))
    except (TypeError, RuntimeError, ValueError):  # no integer, or one of more than 64 bits
        raise ValueError(
            f"generator must be a seed (an integer of 64 bits), a torch.Generator or None: got "
            f"{generator!r}."
        ) from None
    return RowCoins.of(seeded, rows)


def _check_ends(
    eos_token_id: int | Sequence[int] | str | None, policy: Any, vocab: int
) -> frozenset[int]:
    """The ids that end a row, those of them that the vocabulary has."""
    given: Any = eos_token_id
    if isinstance(given, str) and given == "policy":
        config = getattr(policy, "generation_config", None)
        given = getattr(config, "eos_token_id", None)
    if isinstance(given, str):
        raise ValueError(
            f'eos_token_id must be an id, several, None or "policy" (what the policy\'s generation '
            f"config says): got {given!r}. Look a token's id up in the tokenizer."
        )
    given = given.tolist() if hasattr(given, "tolist") else given
    ids = [] if given is None else given if isinstance(given, Sequence) else [given]
    try:
        return frozenset(id_ for id_ in map(operator.index, ids) if 0 <= id_ < vocab)
    except TypeError:
        raise ValueError(f"eos_token_id must be ids, whole numbers: got {given!r}.") from None
