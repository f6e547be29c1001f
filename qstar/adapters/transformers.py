"""q* through transformers' own `generate`: its configs, processors, criteria and streamers.

    policy.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=40, do_sample=True,
                    custom_generate=hook.q_star, teacher=teacher)

transformers prepares everything as for a call of its own, and hands it to `q_star`, which draws
the tokens by `qstar.generate`. What cannot be done that way is refused, by name.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import _quiet  # noqa: F401 - before transformers

# isort: split
from transformers import GenerationConfig
from transformers.generation import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.utils import ModelOutput

from ..arguments import check_fixed_alpha
from ..decoding.generate import Generation, Trace, generate
from ..decoding.sampling_options import Sampling, shows_options
from ..decoding.traits import CACHE_NAMES
from ..sampling.chance import Chance
from .processors import check_gauge, for_one_row, seen_with_padding


@dataclass
class QStarOutput(ModelOutput):  # type: ignore[misc]
    """What `generate` returns with `return_dict_in_generate=True`.

    Attributes:
        sequences: The prompts as they came and the new tokens, padded behind. Shape (batch,
            length).
        lengths: How many tokens of each row are new, the one that ended it included. Shape
            (batch,).
        trace: What was known where each token was drawn (`qstar.decoding.generate.Trace`), over all
            `max_new_tokens` positions.
    """

    sequences: Tensor | None = None
    lengths: Tensor | None = None
    trace: Trace | None = None


OF_THE_CONFIG = (
    *("max_new_tokens", "greedy", "temperature", "top_k", "top_p", "logits_processor"),
    *("eos_token_id", "stopping_criteria", "cache_implementation"),
)
"""The options that transformers' `generate` has prepared from its config."""

OPTIONS = {field.name for field in fields(Sampling)}.difference(OF_THE_CONFIG)


@partial(shows_options, but=OF_THE_CONFIG)  # transformers hands on what a signature names
def q_star(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    teacher: Any = None,
    teacher_input_ids: Tensor | None = None,
    teacher_attention_mask: Tensor | None = None,
    draft_model: Any = None,
    draft_input_ids: Tensor | None = None,
    draft_attention_mask: Tensor | None = None,
    generator: torch.Generator | Chance | int | None = None,
    streamer: Any = None,
    **others: Any,
) -> Tensor | QStarOutput:
    """Draw from q* of two models, called by `policy.generate(custom_generate=q_star, ...)`.

    What `generate` takes means what it means there: the generation config (`do_sample=False` is
    greedy; remember its default `top_k=50`), `logits_processor` and `stopping_criteria`, left
    padding with an `attention_mask`, `num_return_sequences`, `torch.manual_seed`, a streamer for
    one row. With alpha=1 it is the policy's own `generate`, token by token, and with alpha=0 the
    teacher's.

    Processors and filters apply to log q* and must be functions of (ids, scores) alone; criteria
    see (ids, None), one row at a time. Those that depend on what is added to all logits alike
    (`qstar.decoding.filters.GAUGED`) act on log-probabilities; with alpha=1 or 0 they are refused,
    since the model's own `generate` gives them its raw logits.

    A streamer gets the prompt and then the tokens one at a time; `qstar.adapters.pieces` has one
    that loses no spaces. transformers (5.23) loses the `tokenizer` that `stop_strings` needs before
    it calls a function like this one: pass `stopping_criteria=[StopStringCriteria(...)]`.

    Args:
        model: The policy; `generate` passes itself.
        input_ids: Its prompts, from `generate`, as are the next three. Shape (batch, length).
        logits_processor: Prepared processors.
        stopping_criteria: Prepared criteria.
        generation_config: The prepared config.
        teacher: The other parent, a causal language model over the same vocabulary, or the policy.
        teacher_input_ids: Its prompts; None for the policy's. Shape (rows, length).
        teacher_attention_mask: Zeros on the padding of its prompts, which must be on the left.
        draft_model: A third model, which drafts.
        draft_input_ids: Its prompts; None for the policy's. Shape (rows, length).
        draft_attention_mask: As for the teacher.
        generator: None means torch's own CPU generator, which `torch.manual_seed` seeds.
        streamer: Given to `generate`.
        others: The options of `qstar.generate` that the config does not have (`Sampling`: scheme,
            gamma, alpha, ...), and what `generate` prepared for the policy's forward pass.

    Returns:
        The prompts and the new tokens, rows that ended early padded with the pad token (the first
        end token if there is none; without both, the row's last one); a `QStarOutput` with
        `return_dict_in_generate=True`. Shape (batch, length).

    Raises:
        ValueError: Something was asked for that this decoder does not do (beams, another model's
            assistance, scores, a prepared cache, ...), or as `qstar.generate` raises.

    Warns:
        UserWarning: `generate` is not the one this was written for, and hides its streamer.
    """
    asked = _forgotten_arguments()
    sampling = Sampling(**{name: others.pop(name) for name in OPTIONS & others.keys()})
    with _following(asked["streamer"] if streamer is None else streamer, input_ids) as on_tokens:
        _check_request(teacher, generation_config, asked, others)
        mask = _mask(input_ids, others)
        rows = _rows("input_ids", input_ids, mask)
        padded = bool((~mask).any())
        pad = _pad_token(generation_config)
        copies = generation_config.num_return_sequences or 1
        steps = for_one_row(logits_processor, mask, sampling.filtered)
        if check_fixed_alpha(sampling.alpha) in (0, 1):
            vocab = sampling.vocab or _vocab(model, teacher)
            check_gauge(sampling.alpha, logits_processor, rows[0], vocab)
        result = generate(
            model,
            teacher,
            rows,
            _other_rows("teacher", teacher_input_ids, teacher_attention_mask, pad, rows, copies),
            sampling=replace(
                sampling,
                max_new_tokens=_limit(stopping_criteria, generation_config) - input_ids.shape[-1],
                greedy=not generation_config.do_sample,
                logits_processor=steps,
                eos_token_id=_ends(stopping_criteria),
                stopping_criteria=[
                    seen_with_padding(stop) if padded else stop
                    for stop in stopping_criteria
                    if not isinstance(stop, EosTokenCriteria | MaxLengthCriteria)
                ],
                cache_implementation=generation_config.cache_implementation,
            ),
            generator=generator,
            draft_model=draft_model,
            draft_ids=_other_rows(
                "draft", draft_input_ids, draft_attention_mask, pad, rows, copies
            ),
            shown_ids=list(torch.where(mask, input_ids, ~input_ids)) if padded else None,
            on_tokens=on_tokens,
        )
    sequences = _sequences(input_ids, result, pad)
    if not generation_config.return_dict_in_generate:
        return sequences
    return QStarOutput(sequences=sequences, lengths=result.lengths, trace=result.trace)


# --- What comes in -------------------------------------------------------------------------------


FORGOTTEN = ("streamer", "assistant_model", "synced_gpus")
"""What `generate` takes, yet hands to no callable: transformers 5.23 drops it silently."""


def _forgotten_arguments() -> dict[str, Any]:
    """What `generate` was given and forgets: the frame of its call still has it.

    A streamer that nobody ends would let its reader wait for ever, and an assistant that nobody
    asks would be ignored without a word.
    """
    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals if frame.f_code.co_name == "generate" else {}
        if {"custom_generate", *FORGOTTEN} <= found.keys():
            return {name: found[name] for name in FORGOTTEN}
        frame = frame.f_back
    warnings.warn(
        f"q_star was not called by a generate that looks like transformers', so that it cannot see "
        f"whether {', '.join(FORGOTTEN)} were given: they are not used. For a streamer pass "
        f"custom_generate=functools.partial(q_star, streamer=...).",
        stacklevel=3,
    )
    return dict.fromkeys(FORGOTTEN)


def _check_request(
    teacher: Any, config: GenerationConfig, asked: dict[str, Any], model_kwargs: dict[str, Any]
) -> None:
    """Refuse what `generate` understands and this decoder does not."""
    if teacher is None:
        raise ValueError(
            "q* has two parents: pass teacher=..., a causal language model over the policy's "
            "vocabulary, or the policy itself with teacher_input_ids=..., its other prompt."
        )
    if asked["assistant_model"] is not None:
        raise ValueError("assistant_model is not used here: pass draft_model=..., for the same.")
    mode = config.get_generation_mode().value
    if mode not in ("greedy_search", "sample"):
        raise ValueError(
            f"q_star draws (do_sample=True) or is greedy: got a config for {mode}. Leave num_beams "
            f"and the like out; for prompt lookup pass scheme='lookup', and gamma=... if you like."
        )
    if asked["synced_gpus"]:
        raise ValueError("q_star does not keep several processes in step: got synced_gpus=True.")
    outputs = ("attentions", "hidden_states", "scores", "logits")
    wanted = [f"output_{name}" for name in outputs if getattr(config, f"output_{name}", None)]
    if wanted:
        raise ValueError(
            f"q_star keeps no {', '.join(wanted)}: return_dict_in_generate=True returns a trace of "
            f"the two distributions; checkpoints.log_distributions gives those of given tokens."
        )
    named = [name for name in CACHE_NAMES if model_kwargs.get(name) is not None]
    own = [name for name in named if getattr(model_kwargs[name], "_is_user_defined", False)]
    kind = config.cache_implementation
    if own or kind not in (None, "dynamic", "static"):
        raise ValueError(
            f"each parent keeps a cache of its own, which takes rejected drafts back: leave "
            f"{(own or CACHE_NAMES)[0]} out, and cache_implementation={kind!r}: 'static' or "
            f"'dynamic' will do."
        )
    prepared = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", *CACHE_NAMES}
    extra = sorted(
        name
        for name, value in model_kwargs.items()
        if name not in prepared and value is not None and value is not False
    )
    if extra:
        raise ValueError(f"the models are given token ids only: leave {', '.join(extra)} out.")


def _mask(input_ids: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
    """Which ids are text; ValueError if the positions are not what this says."""
    given = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids, dtype=torch.bool) if given is None else given.bool()
    positions = model_kwargs.get("position_ids")
    expected = mask.long().cumsum(-1) - 1
    if positions is not None and bool((mask & (positions.to(mask.device) != expected)).any()):
        raise ValueError("texts are read from position 0 on: leave position_ids out.")
    return mask


def _rows(name: str, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """The texts of a padded batch, each as long as it is."""
    if ids.ndim != 2 or mask.shape != ids.shape:
        raise ValueError(
            f"{name} and its attention mask must have two dimensions, batch and length: got shapes "
            f"{tuple(ids.shape)} and {tuple(mask.shape)}."
        )
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise ValueError(
            f"{name} must be padded on the left, and nowhere else: row "
            f"{int((mask[:, :-1] & ~mask[:, 1:]).any(-1).nonzero()[0])} has a masked token after "
            f"its text has begun. Set padding_side='left' in the tokenizer; where a text holds the "
            f"pad token itself, pass an attention_mask (transformers takes it for padding)."
        )
    return [row[kept] for row, kept in zip(ids, mask, strict=True)]


def _other_rows(
    name: str,
    ids: Tensor | None,
    given: Tensor | None,
    pad: int | None,
    policy_rows: list[Tensor],
    copies: int,
) -> list[Tensor] | None:
    """Another model's texts, repeated as `num_return_sequences` has repeated the policy's."""
    if ids is None:
        if given is not None:
            raise ValueError(f"{name}_attention_mask came without {name}_input_ids: pass both.")
        return None
    mask = torch.ones_like(ids, dtype=torch.bool) if given is None else given.bool()
    rows = _rows(f"{name}_input_ids", ids, mask)
    unsaid = given is None and len(rows) > 1
    if unsaid and pad is not None and bool(ids[:, 0].eq(pad).any()):
        raise ValueError(
            f"{name}_input_ids begin with the pad token in some row: pass "
            f"{name}_attention_mask=... to say what is padding."
        )
    if copies * len(rows) != len(policy_rows):
        raise ValueError(
            f"{name}_input_ids must have a row for each of the policy's prompts: got {len(rows)} "
            f"rows for {len(policy_rows) // copies}."
        )
    return [row for row in rows for _ in range(copies)]


def _pad_token(config: GenerationConfig) -> int | None:
    for given in (config.pad_token_id, config.eos_token_id):
        if given is not None:
            return int(given[0] if isinstance(given, list | tuple) else given)
    return None


# --- What ends a row ---------------------------------------------------------------------


def _limit(criteria: StoppingCriteriaList, config: GenerationConfig) -> int:
    """The most tokens of a row, the prompt's included; a criterion of the caller's comes first."""
    limits = [stop.max_length for stop in criteria if isinstance(stop, MaxLengthCriteria)]
    return int(min(limits) if limits else config.max_length)


def _ends(criteria: StoppingCriteriaList) -> list[int] | None:
    """The tokens that end a row. The decoder knows these without asking anybody."""
    found = [stop.eos_token_id for stop in criteria if isinstance(stop, EosTokenCriteria)]
    return [int(token) for ids in found for token in ids] or None


def _vocab(*models: Any) -> int:
    return min(int(model.config.get_text_config().vocab_size) for model in models)


# --- What goes out -------------------------------------------------------------------------------


@contextmanager
def _following(streamer: Any, input_ids: Tensor) -> Iterator[Callable[[Tensor], None] | None]:
    """Hands new tokens to a streamer one at a time, as transformers does, and ends it.

    Also where something is refused or fails: whoever reads the stream must not wait for ever.
    """
    if streamer is None:
        yield None
        return

    def put(tokens: Tensor) -> None:
        for token in tokens[0].split(1):
            streamer.put(token)

    try:
        if len(input_ids) > 1:
            raise ValueError(f"a streamer follows one row: got {len(input_ids)}.")
        yield put
    finally:
        streamer.end()


def _sequences(input_ids: Tensor, result: Generation, pad: int | None) -> Tensor:
    """Prompts and new tokens, as wide as the longest row needs."""
    tokens = result.tokens[:, : int(result.lengths.max())].to(input_ids.device)
    if pad is not None:
        place = torch.arange(tokens.shape[-1], device=tokens.device)
        behind = place >= result.lengths.to(tokens.device).unsqueeze(-1)
        tokens = tokens.masked_fill(behind, pad)
    return torch.cat([input_ids, tokens.to(input_ids.dtype)], -1)
