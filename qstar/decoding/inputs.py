"""The models of a decode and their prompts, checked before anything is read."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_count
from .kv_cache import KVCache
from .traits import address_of, modules_of

Prompts = Tensor | Sequence[Tensor]


def check_weights(models: dict[str, Any]) -> None:
    """ValueError where two models that are not one object are one set of weights.

    An adapter changes its base in place, and so all models that wrap it: they would all answer
    alike. Models that share some weights (their embeddings, say), or that read the same weights by
    different configs, are different models.
    """
    given = {name: model for name, model in models.items() if model is not None}
    for one, other in combinations(given, 2):
        if (
            given[one] is not given[other]
            and _shares_all(given[one], given[other])
            and _settings(given[one]) == _settings(given[other])
        ):
            raise ValueError(
                f"{one} and {other} are two objects over one set of weights, so that both answer "
                f"alike (an adapter changes its base in place, for all that hold the base). For "
                f"two models load the base model a second time, for an adapter of its own. For "
                f"one model pass one object twice; in an adapted model's own generate that is "
                f"model.get_base_model()."
            )


def _shares_all(one: Any, other: Any) -> bool:
    """Whether all weights of two models are the same, and they have some."""
    theirs = set(_weights(other))
    return next(_weights(one), None) in theirs and set(_weights(one)) == theirs


def _weights(model: Any) -> Iterator[tuple[Any, ...]]:
    """Where a model's parameters and kept buffers lie in memory."""
    for module in modules_of(model):
        anew = getattr(module, "_non_persistent_buffers_set", ())  # worked out when it is loaded
        kept = [tensor for name, tensor in module._buffers.items() if name not in anew]
        for tensor in (*module._parameters.values(), *kept):
            if tensor is not None and (address := address_of(tensor)):
                yield str(tensor.device), address, tuple(tensor.shape)


def _settings(model: Any) -> Any:
    config = getattr(model, "config", None)
    to_dict = getattr(config, "to_dict", None)
    return config if to_dict is None else to_dict()


def check_vocab(caches: Mapping[str, KVCache], vocab: int | None) -> int:
    """How many token ids the distributions are over."""
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


def check_prompts(
    caches: Mapping[str, KVCache], vocab: int, max_new_tokens: int, given: dict[str, Prompts | None]
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
                f"{shape}. Nothing follows an empty prompt: start from the tokenizer's bos token."
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


def check_shown(shown_ids: Sequence[Tensor] | None, prompts: list[list[int]]) -> list[list[int]]:
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
