"""What a causal language model is, as far as its cache is concerned: windows, ropes, limits.

Read from what its layers do and from its configuration, before anything is decoded.
"""

import inspect
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import _quiet  # noqa: F401 - before transformers

# isort: split
from transformers import DynamicCache


@dataclass(frozen=True, slots=True)
class Sliding:
    """From which length on a cache may have no holes, and what such a model does."""

    length: int
    does: str


@dataclass(frozen=True, slots=True)
class Limit:
    """The most tokens of a text, if there is such a number, whether it is firm, and why."""

    stated: int | None
    firm: bool
    why: str = ""

    def allowing(self, context_length: int | None) -> int | None:
        """The limit where the caller says how long texts may be."""
        if context_length is None:
            return self.stated
        if isinstance(context_length, bool) or operator.index(context_length) < 1:
            raise ValueError(
                f"context_length is the most tokens of a text, at least 1: got {context_length}. "
                f"None takes what the models' configurations say."
            )
        if self.firm and self.stated is not None:
            return min(self.stated, context_length)
        return context_length


def modules_of(model: Any) -> list[nn.Module]:
    """Each module of a model once, itself first: `nn.Module.modules`, which takes ten times as long
    for a deep one."""
    found = {model: None}
    left = [model]
    while left:
        for child in left.pop()._modules.values():
            if child is not None and child not in found:
                found[child] = None
                left.append(child)
    return list(found)


def tensors_of(module: nn.Module) -> list[Tensor]:
    """A module's own parameters and buffers."""
    own = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in own if tensor is not None]


def address_of(tensor: Tensor) -> int:
    """Where a tensor lies in memory; who it is, if it has no memory of its own."""
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError):
        return id(tensor)


def log_p_of(out: Any, positions: int, after: list[int] | None = None) -> Tensor:
    """The last log-probabilities of a forward, or those after so many tokens, in float32 or wider.

    Shape (batch, positions, vocab).
    """
    logits = out[0] if isinstance(out, tuple) else out.logits
    logits = logits[:, -positions:] if after is None else logits[:, [n - 1 for n in after]]
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.log_softmax(logits, dim=-1, dtype=wide)


def bare(model: Any) -> Any:
    """The model that `torch.nn.DataParallel` and its like run: a text is read in one place."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return bare(model.module) if isinstance(model, wrappers) else model


def core_of(model: Any, name: str) -> Any:
    """The model under a compiler's or an adapter's wrapper, whose own signature says nothing."""
    core = model
    while True:
        if hasattr(core, "_orig_mod"):
            core = core._orig_mod
        elif hasattr(core, "get_base_model"):
            core = core.get_base_model()
        else:
            break
    if not isinstance(core, nn.Module) or not hasattr(
        getattr(core, "config", None), "get_text_config"
    ):
        raise ValueError(
            f"the {name} must be a causal language model of transformers, loaded: got "
            f"{type(model).__name__}."
        )
    device = getattr(model, "device", None)
    if device is None or device.type == "meta":
        raise ValueError(
            f"the {name} ({type(core).__name__}) must have its weights on a device: got {device}. "
            f"Load it without offloading its first layer."
        )
    return core


def check_cache(core: Any, text: Any, name: str, layers: Sequence[Any]) -> None:
    """Raise ValueError for models whose cache, of these layers, has no way back."""
    if getattr(core.config, "is_encoder_decoder", False):
        raise ValueError(f"the {name} must be a decoder-only language model: got an encoder too.")
    kinds = {
        kind
        for kind in getattr(text, "layer_types", None) or []
        if re.search("linear|conv|mamba|recurrent|hybrid|ssm", kind)
    }
    states = any(hasattr(layer, "conv_states") for layer in layers)
    if kinds or states or getattr(core, "_is_stateful", False):
        what = ", ".join(sorted(kinds)) or "a recurrent state"
        raise ValueError(
            f"the {name} ({type(core).__name__}) keeps {what} in its cache, which cannot take "
            f"rejected drafts back exactly. Use a model whose layers all attend to keys and values."
        )


CACHE_NAMES = "past_key_values", "cache"
"""What forwards of transformers call their keys and values: the second since 5.24."""


def cache_name(core: Any) -> str | None:
    """What a model's forward calls its cache; None if it takes none that it names."""
    taken = inspect.signature(core.forward).parameters
    return next((name for name in CACHE_NAMES if name in taken), None)


def shares_scales(core: Any) -> str:
    """Whether what a model answers to one text depends on what it reads beside it, in words."""
    kind = "torch.ao.nn.quantized.dynamic"
    if any(type(module).__module__.startswith(kind) for module in modules_of(core)):
        return "its layers, quantised dynamically, round by the largest number of all they read"
    return ""


def layers_of_cache(config: Any) -> list[Any]:
    """The layers of the cache that transformers makes for a configuration, if it knows how."""
    try:
        return list(DynamicCache(config=config).layers)
    except Exception:  # kinds of layers that it has no cache for
        return []


def windows(text: Any, core: Any, layers: Sequence[Any]) -> tuple[list[int], list[int]]:
    """Lengths from which on layers do not see a whole text: of layers, and by other names.

    What sliding layers do is told by the layers of the cache that transformers makes for them;
    numbers that are called a window anywhere else are taken for one.
    """
    told = [layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False)]
    known = ("sliding_window", "attention_chunk_size") if layers else ()
    window = re.compile(r"window|chunk|local_attention|attention_span|block_size")
    other = re.compile(r"layers|pattern|feed_forward|lm_head|use_|mamba|num_|index_")
    odd = {
        value
        for settings in (vars(text), *map(vars, modules_of(core)))
        for key, value in settings.items()
        if type(value) is int
        and value > 1
        and window.search(key)
        and not other.search(key)
        and not (settings is vars(text) and key in known)
    }
    return [int(length) for length in told if length], sorted(odd - set(told))


def sliding(text: Any, lengths: list[int]) -> Sliding | None:
    if not lengths:
        return None
    least = min(lengths)
    chunks = "chunked_attention" in (getattr(text, "layer_types", None) or [])
    does = f"attends within chunks of {least}" if chunks else f"sees only its last {least}"
    return Sliding(least, f"{does} tokens, counted in cache slots")


def ropes_of(text: Any, core: Any) -> list[dict[str, Any]]:
    """The rotary embeddings of a model: what they are called, and their parameters."""
    given = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [value for value in given.values() if isinstance(value, dict)]
    ropes = [dict(rope) for rope in nested or [given] if rope]
    for rope in ropes:
        rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    for module in modules_of(core):
        kinds = vars(module).get("rope_type")
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if isinstance(kind, str) and all(kind != rope["rope_type"] for rope in ropes):
                ropes.append({"rope_type": kind})
    if any("dynamic_ntk" in key and value is True for key, value in vars(text).items()):
        ropes.append({"rope_type": "dynamic"})
    return ropes


def limit_of(text: Any, core: Any, ropes: list[dict[str, Any]]) -> Limit:
    """How many tokens a model can read, as far as it says."""
    stated = getattr(text, "max_position_embeddings", None)
    if stated is None or stated < 1 or getattr(text, "alibi", False):
        return Limit(None, False)
    if any("dynamic" in rope["rope_type"] for rope in ropes):
        return Limit(
            stated,
            True,
            "; beyond that its rope scaling is dynamic, which makes what it answers depend on what "
            "it has read before",
        )
    if not any("inv_freq" in key for module in modules_of(core) for key in module._buffers):
        return Limit(stated, True)
    reach = []
    for rope in ropes:
        first = rope.get("original_max_position_embeddings")
        if first is None and rope["rope_type"] == "linear":
            first = stated
        reach.append(max(stated, int((first or 0) * (rope.get("factor") or 1))))
    return Limit(
        min(reach, default=stated),
        False,
        ", or pass context_length=... to let it read longer texts than its configuration says",
    )


def switch_of(text: Any, ropes: list[dict[str, Any]]) -> int | None:
    """The length beyond which all of a text is read with other rope factors."""
    found = [
        rope.get("original_max_position_embeddings")
        or getattr(text, "original_max_position_embeddings", None)
        or text.max_position_embeddings
        for rope in ropes
        if rope["rope_type"] == "longrope"
    ]
    return min(found, default=None)
