"""Hugging Face causal language models: loading, chat templates, vocabularies.

    model, tokenizer = checkpoints.load("folder")    # or the id of a model on the hub
    pair = checkpoints.load_pair("folder", "another", device_map="auto")
    checkpoints.check_same_vocabulary(tokenizer, other_tokenizer)
    ids = checkpoints.chat_ids(tokenizer, "Why is the sky blue?")
    log_p = checkpoints.log_distributions(model, ids, answer_ids)

Weights are read from safetensors files only, and no model brings code of its
own.
"""

import inspect
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _quiet  # noqa: F401 - before transformers

# --- Loading -------------------------------------------------------------------------------------


def load(
    name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    base: str | Path | None = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
    quantization_config: Any = None,
) -> tuple[Any, Any]:
    """A causal language model in eval mode, and its tokenizer.

    Args:
        name: A local folder, or the id of a model on the hub. Weights must be safetensors; code
            that a model brings along is never run. A folder that holds a LoRA adapter stands for
            the model it was trained on with the adapter merged (`merge_lora`).
        dtype: Of the weights.
        device: Where to put it; "auto" is the first GPU that CUDA sees, else the CPU.
        base: What an adapter was trained on, instead of what its configuration says.
        device_map: What transformers is told to spread the layers over devices, such as "auto";
            then `device` is not used. Needs accelerate.
        attn_implementation: What transformers is told, such as "sdpa" or "eager".
        quantization_config: What transformers is told, to quantise the weights as they are read,
            such as `QuantoConfig(weights="int8")`.

    Raises:
        ValueError: No model can be loaded from `name`; the message says why.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not str(name):
        raise ValueError(
            "the name of a model is empty: expected a folder, or the id of a model on the hub."
        )
    given = {
        "device_map": device_map,
        "attn_implementation": attn_implementation,
        "quantization_config": quantization_config,
    }
    options = {key: value for key, value in given.items() if value is not None}
    trained_on = adapter_base(name)
    if trained_on is not None:
        if quantization_config is not None:
            raise ValueError(
                f"{name!s} is an adapter, which cannot be merged into quantised weights: merge it "
                f"first, save the model, and load that with quantization_config."
            )
        model, tokenizer = load(base or trained_on, dtype=dtype, device=device, **options)
        return merge_lora(model, name), tokenizer
    try:
        with _no_progress_bar():
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype, use_safetensors=True, trust_remote_code=False, **options
            )
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"{name!s} could not be loaded. Expected a folder with config.json, tokenizer files "
            f"and weights in safetensors, or the id of such a model on the hub (which needs a "
            f"network or the hub's cache, and no code of its own): {error}"
        ) from error
    placed = device_map is not None or quantization_config is not None
    return (model.eval() if placed else model.eval().to(choose_device(device))), tokenizer


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """Two causal language models over one vocabulary, ready to decode.

    Attributes:
        policy: A model in eval mode.
        teacher: The other; the same object where both names are one.
        tokenizer: The policy's.
        teacher_tokenizer: The teacher's, which may have another chat template.
    """

    policy: Any
    teacher: Any
    tokenizer: Any
    teacher_tokenizer: Any


def load_pair(policy: str | Path, teacher: str | Path, **options: Any) -> Pair:
    """Two models by folder or hub id, whose tokenizers were compared.

    Args:
        policy: What `load` is given.
        teacher: The same; the same name loads one model that is both.
        options: Further arguments of `load`, for both.

    Raises:
        ValueError: A model cannot be loaded, or the two do not share one vocabulary.
    """
    one, tokenizer = load(policy, **options)
    if str(teacher) == str(policy):
        return Pair(one, one, tokenizer, tokenizer)
    other, teacher_tokenizer = load(teacher, **options)
    check_same_vocabulary(tokenizer, teacher_tokenizer)
    rows = [model.get_output_embeddings().weight.shape[0] for model in (one, other)]
    if rows[0] != rows[1]:
        raise ValueError(
            f"policy and teacher share a vocabulary, but their output layers have {rows[0]} and "
            f"{rows[1]} rows, some of them for no token: cut both with "
            f"model.resize_token_embeddings({len(tokenizer)})."
        )
    return Pair(one, other, tokenizer, teacher_tokenizer)


# --- LoRA adapters -------------------------------------------------------------------------------


def adapter_base(name: str | Path) -> str | None:
    """What the LoRA adapter in a folder was trained on; None if the folder holds no adapter."""
    config = Path(name) / "adapter_config.json"
    if not config.is_file() or (Path(name) / "config.json").is_file():
        return None
    return str(json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"])


@torch.no_grad()
def merge_lora(model: Any, folder: str | Path) -> Any:
    """The model with a LoRA adapter merged into its weights: W + scale B A. Changed in place.

    Args:
        model: What the adapter was trained on.
        folder: Holds adapter_config.json and adapter_model.safetensors, as peft writes them.

    Raises:
        ValueError: The adapter is of another kind than plain LoRA of linear layers (peft merges
            those), or does not fit the model.
    """
    from safetensors.torch import load_file

    path = Path(folder)
    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    known: dict[str, Any] = {
        "peft_type": "LORA",
        "bias": "none",
        "modules_to_save": None,
        "use_dora": False,
        "fan_in_fan_out": False,
        "alpha_pattern": {},
        "rank_pattern": {},
        "lora_bias": False,
    }
    given = {key: config[key] for key in known if config.get(key) is not None}
    odd = {key: value for key, value in given.items() if value != known[key]}
    if odd:
        raise ValueError(
            f"only plain LoRA adapters are merged here, and {path} has {odd}: load it with peft "
            f"and call merge_and_unload()."
        )
    root = config["r"] ** 0.5 if config.get("use_rslora") else config["r"]
    scale = config["lora_alpha"] / root
    weights = load_file(path / "adapter_model.safetensors")
    prefix, low = "base_model.model.", ".lora_A.weight"
    names = [name.removeprefix(prefix).removesuffix(low) for name in weights if name.endswith(low)]
    layers = dict(model.named_modules())
    if 2 * len(names) != len(weights) or not names:
        raise ValueError(f"{path} holds other weights than pairs of lora_A and lora_B.")
    for name in names:
        a, b = (weights[f"{prefix}{name}.lora_{part}.weight"] for part in "AB")
        layer = layers.get(name)
        if layer is None or layer.weight.shape != (b.shape[0], a.shape[1]):
            has = "no such layer" if layer is None else f"a layer of {tuple(layer.weight.shape)}"
            raise ValueError(
                f"{path} changes {name} of shape {(b.shape[0], a.shape[1])}, and the model has "
                f"{has}: it was trained on another one, {config['base_model_name_or_path']}."
            )
        change = scale * (b.double() @ a.double())
        layer.weight += change.to(layer.weight.device, layer.weight.dtype)
    return model


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """The device itself; for "auto" the first GPU that CUDA sees, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Loading takes a second; its bar would only litter a notebook."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# --- Tokenizers ----------------------------------------------------------------------------------


Messages = Mapping[str, Any] | Sequence[Mapping[str, Any] | tuple[str, str]]
"""The messages of a chat, {"role": ..., "content": ...} or (role, content); or only one."""


def chat_ids(tokenizer: Any, user: str | Messages, *, system: str | None = None) -> Tensor:
    """A user's message, or the messages of a chat, as token ids, ready for the assistant's answer.

    The tokenizer's chat template decides the form. Without `system` it may put a default of its
    own there. A content may be a list of parts, {"type": "text", "text": ...}: their texts become
    lines of one text.

    Raises:
        ValueError: The tokenizer has no chat template, or its template refuses the messages (some
            take no system turn, or want user and assistant to take turns); or they are no messages.

    Warns:
        UserWarning: The template drops a system turn without a word, so that its model will not
            read it.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "this tokenizer has no chat template, so its model is no chat model: write the prompt "
            "out and pass tokenizer(text).input_ids instead."
        )
    messages = _messages(user)
    if system is not None:
        if messages[0]["role"] == "system":
            raise ValueError(
                "the messages begin with a system turn, and system=... would put another before "
                "it: leave one of them out."
            )
        messages.insert(0, {"role": "system", "content": system})
    text = _rendered(tokenizer, messages)
    if _drops_system(tokenizer, messages, text):
        warnings.warn(
            "the chat template drops the system turn: the model will not read it. Put its text "
            "before the user's message.",
            stacklevel=2,
        )
    ids = tokenizer(text, add_special_tokens=False).input_ids  # the template wrote them already
    return torch.tensor(ids, dtype=torch.long)


def _messages(given: Any) -> list[dict[str, Any]]:
    """The messages of a chat, whatever shape they came in; ValueError if they are none."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if isinstance(given, Mapping):
        given = [given]
    if not isinstance(given, Sequence) or isinstance(given, bytes) or len(given) == 0:
        what = "an empty one" if isinstance(given, Sequence) else f"a {type(given).__name__}"
        raise ValueError(
            f'expected a text or a list of messages, such as [{{"role": "user", "content": '
            f'"..."}}]: got {what}. Token ids go to generate.'
        )
    return [_message(place, message) for place, message in enumerate(given)]


def _message(place: int, given: Any) -> dict[str, Any]:
    if isinstance(given, tuple) and len(given) == 2:
        given = dict(zip(("role", "content"), given, strict=True))
    if not isinstance(given, Mapping):
        raise ValueError(
            f'message {place} must be {{"role": ..., "content": ...}}: got '
            f"{type(given).__name__} {given!r}."
        )
    role, content = given.get("role"), given.get("content")
    if not isinstance(role, str) or not role:
        raise ValueError(
            f'message {place} must say whose turn it is, such as "role": "user": got {role!r}.'
        )
    if isinstance(content, list | tuple):
        content = "\n".join(_part(place, part) for part in content)
    if not isinstance(content, str) and not (content is None and given.get("tool_calls")):
        raise ValueError(
            f'the "content" of message {place} must be a text, or a list of parts with text: got '
            f"{content!r}."
        )
    return {**given, "content": content}


def _part(place: int, part: Any) -> str:
    """The text of a part of a content."""
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str) or part.get("type", "text") != "text":
        raise ValueError(
            f'a part of message {place} must be {{"type": "text", "text": ...}}, these models read '
            f"nothing else: got {part!r}."
        )
    return text


def _rendered(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    """What the template makes of the messages; ValueError if it refuses them."""
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # whatever the template raises
        turns = [message["role"] for message in messages]
        if "system" in turns and _renders(tokenizer, _without_system(messages)):
            raise ValueError(
                f"the chat template of this tokenizer takes no system turn: {error}. Leave the "
                f"system prompt out, or put its text before the user's message."
            ) from error
        raise ValueError(
            f"the chat template of this tokenizer refuses these messages (the turns are "
            f"{', '.join(turns)}): {error}."
        ) from error
    assert isinstance(text, str)
    return text


def _renders(tokenizer: Any, messages: list[dict[str, Any]]) -> bool:
    try:
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception:
        return False
    return bool(messages)


def _without_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [message for message in messages if message["role"] != "system"]


def _drops_system(tokenizer: Any, messages: list[dict[str, Any]], text: str) -> bool:
    """Whether another text in a system turn would make no difference."""
    for place, message in enumerate(messages):
        content = message["content"]
        if message["role"] == "system" and content and content.strip() not in text:
            other = {**message, "content": f".{content}."}
            changed = [*messages[:place], other, *messages[place + 1 :]]
            if _rendered(tokenizer, changed) == text:
                return True
    return False


def check_same_vocabulary(policy_tokenizer: Any, teacher_tokenizer: Any) -> None:
    """Raise unless two tokenizers give every text the same ids and every id the same meaning.

    Compared are the vocabularies, the added and special tokens, and, where the tokenizers show
    them, merges, normaliser, pre-tokenizer and decoder. Not compared are the chat templates, and
    which token plays which part (a base model and its chat fine-tune end with different tokens).

    Raises:
        ValueError: They differ; the message says in what.
    """
    policy, teacher = _description(policy_tokenizer), _description(teacher_tokenizer)
    for part in (part for part in policy if part in teacher):
        if policy[part] != teacher[part]:
            raise ValueError(
                f"policy and teacher must share one vocabulary: their {part} differ, "
                f"{_first_difference(policy[part], teacher[part])}. Token ids of one would mean "
                f"something else to the other; choose two models of one family."
            )


def _description(tokenizer: Any) -> dict[str, Any]:
    """What makes ids out of text, part by part, most telling first."""
    parts: dict[str, Any] = {
        "vocabularies": dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])),
        "added tokens": {
            index: (str(token), token.special, token.lstrip, token.rstrip, token.normalized)
            for index, token in tokenizer.added_tokens_decoder.items()
        },
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        inner = json.loads(backend.to_str())
        merges = inner["model"].get("merges") or []
        parts["merges"] = {i: tuple(_pair(merge)) for i, merge in enumerate(merges)}
        parts["normalisers"] = {"normalizer": inner["normalizer"]}
        parts["pre-tokenizers"] = {"pre_tokenizer": inner["pre_tokenizer"]}
        parts["decoders"] = {"decoder": inner["decoder"]}
    return parts


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _first_difference(policy: Mapping[Any, Any], teacher: Mapping[Any, Any]) -> str:
    keys = [*policy, *(key for key in teacher if key not in policy)]
    different = [key for key in keys if policy.get(key) != teacher.get(key)]
    first = different[0]
    return (
        f"in {len(different)} of {len(keys)} entries, first at {first!r}: policy has "
        f"{policy.get(first)!r}, teacher has {teacher.get(first)!r}"
    )


# --- Distributions -------------------------------------------------------------------------------


@torch.no_grad()
def log_distributions(model: Any, prompt_ids: Tensor, tokens: Tensor) -> Tensor:
    """The model's distribution of each of `tokens`, given the prompt and the tokens before it.

    One forward over the whole text (teacher forcing), without a cache: what decoding these very
    tokens would have seen, to rounding. The last token is not read. In float32 or wider.

    Raises:
        ValueError: There is nothing to read, or no token, or more than the context window holds.
    """
    text, new = torch.cat([prompt_ids, tokens[..., :-1]], dim=-1), tokens.shape[-1]
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if prompt_ids.shape[-1] == 0 or new == 0:
        raise ValueError(
            f"expected a prompt and tokens after it, at least one each: got "
            f"{prompt_ids.shape[-1]} and {new}."
        )
    if window is not None and text.shape[-1] > window:
        raise ValueError(
            f"the context window holds {window} tokens, and this text has {text.shape[-1]}."
        )
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    rows = text.reshape(-1, text.shape[-1]).to(model.device)
    out = model(rows, use_cache=False, **({"logits_to_keep": new} if keeps else {}))
    logits = out.logits[:, -new:]
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.log_softmax(logits, dim=-1, dtype=wide).reshape(*tokens.shape, -1)
