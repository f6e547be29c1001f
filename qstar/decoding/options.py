"""Every argument of a decode, checked once, before anything is read."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_count, check_fixed_alpha
from ..sampling.rules import Chance, RowCoins
from . import planner
from .costs import PARENTS
from .filters import FILTERED, MEMORYLESS, Shaping, shaping
from .kv_cache import Reader, bare
from .rule import Rule
from .sampling_options import Sampling, Stop
from .state import State

SCHEMES = (*planner.SCHEMES, "auto")

Prompts = Tensor | Sequence[Tensor]


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

    caches: Mapping[str, Reader]
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
    asked = Sampling(**options) if sampling is None else sampling
    policy, teacher, draft_model = bare(policy), bare(teacher), bare(draft_model)
    models = {"policy": policy, "teacher": teacher, "draft": draft_model}
    caches = {
        name: Reader(model, name=name, context_length=asked.context_length)
        for name, model in models.items()
        if name != "draft" or model is not None
    }
    _check_weights({"policy": policy, "teacher": teacher, "draft model": draft_model})
    max_new_tokens = check_count("max_new_tokens", asked.max_new_tokens)
    gamma = _check_scheme(asked, draft_model, draft_ids)
    _check_choice("filtered", asked.filtered, FILTERED)
    size = _check_vocab(caches, asked.vocab)
    prompts, single, device = _check_prompts(
        caches,
        size,
        max_new_tokens,
        {"policy": policy_ids, "teacher": teacher_ids, "draft": draft_ids},
    )
    rows = len(prompts["policy"])
    longest = max(len(prompt) for texts in prompts.values() for prompt in texts) + max_new_tokens
    in_one_call = policy is teacher and asked.one_call is not False
    paired = in_one_call and asked.scheme in (None, *planner.TOGETHER, "auto")
    for name, cache in caches.items():
        cache.check(longest, rows=rows + (paired and name != "draft"))
    holed = _holed(caches, prompts, max_new_tokens)
    scheme, gamma = planner.asked_for(
        asked.scheme,
        gamma,
        in_one_call=in_one_call,
        has_draft=draft_model is not None,
        # Read anew for every token, a draft would be a reading of its own.
        plain_only=holed is not None or any(cache.rereads for cache in caches.values()),
    )
    if holed is not None and scheme != "plain":
        raise ValueError(
            f"the {holed}, and scheme={scheme!r} leaves holes in the cache of a batch whose texts "
            f"may outgrow that. Leave scheme and gamma out, or pass scheme='plain', which is exact "
            f"for a batch too; or decode its rows one at a time."
        )
    if asked.one_call and (policy is not teacher or scheme not in (*planner.TOGETHER, "auto")):
        raise ValueError(
            f"one_call needs one model as both parents, and a scheme in which both read the same "
            f"tokens at once ({', '.join(planner.TOGETHER)}): got scheme={scheme!r} and "
            f"{'one model' if policy is teacher else 'two models'}."
        )
    filters = shaping(
        temperature=asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p,
        logits_processor=_check_callable("logits_processor", asked.logits_processor),
        greedy=asked.greedy,
    )
    rule = Rule(
        alpha=check_fixed_alpha(asked.alpha),
        filters=filters,
        filtered=asked.filtered,
        disjoint=_check_disjoint(asked, filters, size),
        blocks=asked.block_verification,
    )
    return Setup(
        caches=caches,
        state=State(
            prompts=prompts,
            shown=_check_shown(shown_ids, prompts["policy"]),
            new=((),) * rows,
            rows=tuple(range(rows)),
            limit=max_new_tokens,
        ),
        rule=rule,
        chance=_check_generator(generator, rows),
        vocab=size,
        ends=_check_ends(asked.eos_token_id, policy, size),
        stopping_criteria=_check_callable("stopping_criteria", asked.stopping_criteria),
        scheme=scheme,
        gamma=gamma,
        sampling=asked,
        on_tokens=on_tokens,
        single=single,
        device=device,
    )


def _check_weights(models: dict[str, Any]) -> None:
    """ValueError where two models that are not one object are one set of weights.

    An adapter changes its base in place, and so all models that wrap it: they would all answer
    alike. Models that share some weights (their embeddings, say), or that read the same weights by
    different configs, are different models.
    """
    given = {name: model for name, model in models.items() if model is not None}
    weights = {name: _weights(model) for name, model in given.items()}
    for one, other in combinations(given, 2):
        if (
            given[one] is not given[other]
            and weights[one]
            and weights[one] == weights[other]
            and _settings(given[one]) == _settings(given[other])
        ):
            raise ValueError(
                f"{one} and {other} are two objects over one set of weights, so that both answer "
                f"alike (an adapter changes its base in place, for all that hold the base). For "
                f"two models load the base model a second time, for an adapter of its own. For "
                f"one model pass one object twice; in an adapted model's own generate that is "
                f"model.get_base_model()."
            )


def _weights(model: Any) -> set[tuple[Any, ...]]:
    """Where a model's parameters and kept buffers lie in memory."""
    found = set()
    for module in model.modules():
        kept = {k: v for k, v in module._buffers.items() if k not in _passing(module)}
        for tensor in (*module._parameters.values(), *kept.values()):
            try:
                address = 0 if tensor is None else tensor.data_ptr()
            except (RuntimeError, NotImplementedError):  # a tensor without memory of its own
                address = id(tensor)
            if address:
                found.add((str(tensor.device), address, tuple(tensor.shape)))
    return found


def _passing(module: Any) -> set[str]:
    """The names of buffers that are worked out anew where a model is loaded."""
    return getattr(module, "_non_persistent_buffers_set", set())


def _settings(model: Any) -> Any:
    config = getattr(model, "config", None)
    to_dict = getattr(config, "to_dict", None)
    return config if to_dict is None else to_dict()


def _holed(
    caches: Mapping[str, Reader], prompts: dict[str, list[list[int]]], max_new_tokens: int
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


def _check_disjoint(asked: Sampling, filters: Shaping, vocab: int) -> str:
    """What to do without a q*; ValueError where nobody said and filters make it to be expected."""
    if asked.disjoint is not None:
        _check_choice("disjoint", asked.disjoint, ("raise", "mixture"))
        return asked.disjoint
    cut = [type(step).__name__ for step in filters.steps if _cuts(step, vocab)]
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


def _check_vocab(caches: Mapping[str, Reader], vocab: int | None) -> int:
    """How many token ids the laws are over."""
    sizes = {name: reader.vocab for name, reader in caches.items()}
    if vocab is not None:
        shared = check_count("vocab", vocab)
        if shared > min(sizes.values()):
            raise ValueError(
                f"vocab is how many ids all models share, from 1 to {min(sizes.values())}: got "
                f"{vocab}."
            )
        return shared
    for name, size in sizes.items():
        if size != sizes["policy"]:
            raise ValueError(
                f"policy and {name} must share one vocabulary: the policy gives probabilities to "
                f"{sizes['policy']} tokens, the {name} to {size}. Choose models of one family "
                f"(checkpoints.check_same_vocabulary compares their tokenizers); if only the "
                f"padding of their output layers differs, pass vocab=len(tokenizer)."
            )
    return sizes["policy"]


def _check_prompts(
    caches: Mapping[str, Reader],
    vocab: int,
    max_new_tokens: int,
    given: dict[str, Prompts | None],
) -> tuple[dict[str, list[list[int]]], bool, torch.device]:
    """Each model's prompts as lists, whether they came without a batch axis, and their device."""
    prompts, batched_axes = {}, {}
    for name, reader in caches.items():
        ids: Any = given["policy"] if given[name] is None else given[name]
        rows: list[Any] = list(ids) if isinstance(ids, list | tuple) and ids else [ids]
        for row in rows:
            if not isinstance(row, Tensor) or row.dtype not in (torch.int64, torch.int32):
                kind = row.dtype if isinstance(row, Tensor) else type(ids).__name__
                raise ValueError(
                    f"{name}_ids must be a tensor of token ids (int64), or a list of such tensors "
                    f"of one dimension: got {kind}."
                )
        axes = 2 if rows[0] is not ids else rows[0].ndim
        if rows[0] is ids and axes == 2:
            rows = list(rows[0])
        if any(row.ndim != 1 for row in rows) or not rows or any(row.numel() == 0 for row in rows):
            shape = tuple(ids.shape) if isinstance(ids, Tensor) else [tuple(r.shape) for r in rows]
            raise ValueError(
                f"{name}_ids must hold at least one token per row, in one dimension, in two (a "
                f"batch of equal lengths), or as a list of one-dimensional tensors: got shape "
                f"{shape}. An empty prompt gives no first law; start from the tokenizer's bos "
                f"token."
            )
        low, high = min(int(row.min()) for row in rows), max(int(row.max()) for row in rows)
        if low < 0 or high >= reader.vocab:
            raise ValueError(
                f"{name}_ids must lie in 0..{reader.vocab - 1}, the {name}'s vocabulary: got "
                f"{low}..{high}."
            )
        # The last token drawn is not read any more.
        reader.check_room(max(len(row) for row in rows) + max_new_tokens - 1)
        whole = isinstance(ids, Tensor) and axes == 2
        prompts[name] = ids.tolist() if whole else [row.tolist() for row in rows]
        batched_axes[name] = axes
        if name == "policy":
            device = rows[0].device
    for name in caches:
        if batched_axes[name] != batched_axes["policy"] or len(prompts[name]) != len(
            prompts["policy"]
        ):
            raise ValueError(
                f"the prompts must come in one batch: got {len(prompts['policy'])} rows in "
                f"{batched_axes['policy']} dimensions for the policy, {len(prompts[name])} in "
                f"{batched_axes[name]} for the {name}."
            )
    return prompts, batched_axes["policy"] == 1, device


def _check_shown(shown_ids: Sequence[Tensor] | None, prompts: list[list[int]]) -> list[list[int]]:
    """The prompts as outsiders see them, row by row."""
    if shown_ids is None:
        return prompts
    shown = [row.tolist() for row in shown_ids]
    if len(shown) != len(prompts):
        raise ValueError(
            f"shown_ids must have a row for each of the policy's prompts: got {len(shown)} rows "
            f"for {len(prompts)}."
        )
    return shown


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
