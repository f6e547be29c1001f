"""A family of small Llama models over one tokenizer of characters, trained here from scratch.

    qstar-book train family 1m --out FOLDER
    qstar-book train family 1m --check          # the first steps again, against the recorded losses

Documents are generated (`tasks`): a question, its answer, and before a share of them a hint, which
is the answer itself. So one checkpoint has two contexts, with the hint and without, whose answers
differ in quality; and sizes differ by a factor of hundred over one vocabulary.
"""

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qstar.decoding.diagnostics import measure

from ..files import (
    RefusedError,
    command_line,
    find_checkout,
    provenance,
    write_json,
)
from ..records.corpus import data_file
from ..shipped_model import weights_digest
from . import tasks
from .jobs import device_name

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
SIZES = {  # hidden size, layers, highest learning rate
    "300k": (96, 3, 4e-3),
    "1m": (128, 5, 3e-3),
    "4m": (256, 5, 2e-3),
    "12m": (384, 7, 1e-3),
    "30m": (512, 10, 1e-3),
}


@dataclass(frozen=True, slots=True)
class Training:
    """How a model of the family is trained.

    Attributes:
        size: A key of `SIZES`.
        steps: Optimiser steps.
        batch: Documents a step.
        hints: Share of documents that begin with a hint.
        kinds: What is asked; empty: every kind of `tasks.KINDS`.
        seed: Of the weights and of the documents.
    """

    size: str
    steps: int = 2_500
    batch: int = 128
    hints: float = 0.5
    kinds: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}; got {self.size!r}")
        if self.steps < 1 or self.batch < 1 or not 0 <= self.hints <= 1:
            raise ValueError(f"expected steps and batch >= 1 and hints in [0, 1]; got {self}")


def tokenizer() -> Any:
    """One token a character: printable ASCII, the line break, <s> (begins, and pads) and </s>."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *CHARACTERS])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<s>"
    )


def new_model(size: str, *, seed: int = 0) -> Any:
    """An untrained model, float32 on the CPU, its weights drawn from the seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, _ = SIZES[size]
    config = LlamaConfig(
        vocab_size=len(CHARACTERS) + 2,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def prompt_ids(text: str) -> Tensor:
    """Token ids of a text that begins a document, with <s> before it. Shape: (tokens,)."""
    return torch.tensor([0, *map(_ID.__getitem__, text)])


_ID = {character: i + 2 for i, character in enumerate(CHARACTERS)}


def batches(training: Training) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and targets of each step, right-padded; a target of -100 is not learned.

    Shapes: (batch, longest), twice. Step t depends on the seed and on t only.
    """
    for step in range(training.steps):
        found = tasks.stream((training.seed, step), training.kinds)
        draw = random.Random(f"hints {training.seed} {step}")
        rows = []
        for _ in range(training.batch):
            item = next(found)
            hint = item.answer if draw.random() < training.hints else ""
            rows.append([*prompt_ids(tasks.document(item, hint=hint)).tolist(), 1])
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        targets = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
        yield ids, targets


def learning_rate(training: Training, step: int) -> float:
    """Of one step: linear warm-up over a twentieth of the steps, then a cosine to a tenth."""
    *_, highest = SIZES[training.size]
    warm = max(1, training.steps // 20)
    if step < warm:
        return highest * (step + 1) / warm
    way = (step - warm) / max(1, training.steps - warm)
    return highest * (0.55 + 0.45 * math.cos(math.pi * way))


def train(
    training: Training,
    *,
    model: Any = None,
    device: str = "cpu",
    stop_after: int | None = None,
    on_step: Any = None,
    progress: bool = False,
) -> tuple[Any, list[float]]:
    """A trained model and the loss of each step, in nats a token.

    Args:
        training: What to do.
        model: Where to begin; None: an untrained model. It is changed in place.
        device: Where.
        stop_after: Steps to really make, of a schedule that stays that of `training.steps`.
        on_step: Called with (steps made, model) before the first step and after each.
        progress: Whether a bar shows the steps.
    """
    model = (new_model(training.size, seed=training.seed) if model is None else model).to(device)
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.1)
    steps = min(training.steps, stop_after or training.steps)
    losses: list[Tensor] = []
    if on_step is not None:
        on_step(0, model)
    shown = tqdm(
        islice(batches(training), steps), total=steps, disable=not progress, desc=training.size
    )
    for step, (ids, targets) in enumerate(shown):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(training, step)
        logits = model(ids.to(device), use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets[:, 1:].to(device).flatten()
        )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.detach())
        if on_step is not None:
            on_step(step + 1, model)
    model.eval()
    return model, torch.stack(losses).double().cpu().tolist()


@torch.inference_mode()
def answer(model: Any, questions: Sequence[str], *, max_new_tokens: int = 40) -> list[str]:
    """The greedy answer to each question, read up to the end of its document."""
    device = next(model.parameters()).device
    told = [prompt_ids(text).tolist() for text in questions]
    longest = max(map(len, told))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in told], device=device)
    mask = torch.tensor(
        [[0] * (longest - len(row)) + [1] * len(row) for row in told], device=device
    )
    said = model.generate(
        ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0
    )
    return [text_of(row) for row in said[:, longest:].tolist()]


def text_of(tokens: Sequence[int]) -> str:
    """The characters of a row of token ids up to </s>."""
    end = tokens.index(1) if 1 in tokens else len(tokens)
    return "".join(CHARACTERS[t - 2] for t in tokens[:end] if t >= 2)


def score(model: Any, items: Sequence[tasks.Item], *, hinted: bool) -> dict[str, float]:
    """Share of items answered right, greedily, by kind and ("all") over all."""
    told = [tasks.question(item, hint=item.answer if hinted else "") for item in items]
    right: dict[str, list[bool]] = {}
    for item, text in zip(items, answer(model, told), strict=True):
        for name in (item.kind, "all"):
            right.setdefault(name, []).append(item.correct(text))
    return {name: sum(marks) / len(marks) for name, marks in right.items()}


def save(
    model: Any, folder: Path, training: Training, losses: Sequence[float], **more: Any
) -> None:
    """Weights in bfloat16, tokenizer, and how they came about."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: x.detach().cpu() for name, x in model.state_dict().items()}
    model.to("cpu", torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    made = {
        "training": asdict(training),
        "command": command_line(),
        "weights_float32_sha256": weights_digest(weights),
        "losses": [round(loss, 6) for loss in losses],
        **more,
    }
    write_json(folder / "training.json", made)


@torch.inference_mode()
def log_probabilities(
    model: Any, documents: Sequence[tuple[str, str]], *, rows: int = 64
) -> list[Tensor]:
    """The distributions of each character of an answer and of its end, on the model's device.

    Args:
        model: One of the family.
        documents: Pairs of what is read (`tasks.question`) and the answer that follows, with its
            first space.
        rows: Documents in one batch.

    Returns:
        For each document log-probabilities in float32. Shape (characters of the answer + 1, vocab).
    """
    device = next(model.parameters()).device
    found = []
    for start in range(0, len(documents), rows):
        told = [
            (prompt_ids(asked).tolist(), prompt_ids(said).tolist()[1:])
            for asked, said in documents[start : start + rows]
        ]
        longest = max(len(asked) + len(said) for asked, said in told)
        ids = torch.tensor(
            [asked + said + [0] * (longest - len(asked) - len(said)) for asked, said in told]
        )
        logits = model(ids.to(device), use_cache=False).logits.float()
        for row, (asked, said) in zip(logits, told, strict=True):
            begin = len(asked) - 1
            found.append(row[begin : begin + len(said) + 1].log_softmax(-1))
    return found


def compare(names: Sequence[str], *, documents: int, device: str) -> dict[str, Any]:
    """Every pair of trained models, and each model with and without the hint, on right answers.

    Args:
        names: Trained models.
        documents: Held-out questions that are read.
        device: Where.
    """
    asked = tasks.items(None, documents)
    rows = {}
    for name in names:
        model, _ = load(name, device=device)
        for context in ("plain", "hinted"):
            told = [
                (tasks.question(x, hint=x.answer if context == "hinted" else ""), f" {x.answer}")
                for x in asked
            ]
            rows[name, context] = torch.cat(log_probabilities(model, told))
    pairs = [((a, "plain"), (b, "plain")) for i, a in enumerate(names) for b in names[i + 1 :]]
    pairs += [((name, "plain"), (name, "hinted")) for name in names]
    found = {}
    for policy, teacher in pairs:
        seen = measure(rows[policy], rows[teacher])
        alpha = seen.balance.alpha
        quantiles = torch.tensor([0, 0.1, 0.5, 0.9, 1], device=alpha.device, dtype=alpha.dtype)
        found[f"{' '.join(policy)}, {' '.join(teacher)}"] = {
            "positions": len(alpha),
            "alpha_quantiles": alpha.quantile(quantiles).tolist(),
            "chernoff": float(seen.balance.chernoff.mean()),
            "policy_to_teacher": float(seen.policy_to_teacher.mean()),
            "teacher_to_policy": float(seen.teacher_to_policy.mean()),
            "accept_policy": float(seen.accept_policy.mean()),
            "accept_teacher": float(seen.accept_teacher.mean()),
            "overlap": float(torch.minimum(rows[policy].exp(), rows[teacher].exp()).sum(-1).mean()),
        }
    return {"documents": documents, "pairs": found}


def compare_command(*, names: Sequence[str], out: Path, documents: int, device: str) -> None:
    """`qstar-book train compare`."""
    told = {
        name: json.loads((folder_of(name) / "training.json").read_text()) | {"losses": None}
        for name in names
    }
    made_by = provenance("torch", "transformers", device=device_name(device))
    found = compare(names, documents=documents, device=device)
    write_json(out, {"made_by": made_by, "models": told} | found)


def folder_of(name: str) -> Path:
    """Where a trained model of this name stands.

    Raises:
        RefusedError: If there is none.
    """
    try:
        return data_file(f"family/{name}/config.json").parent
    except FileNotFoundError as error:
        raise RefusedError(
            f"expected a trained model, one of {', '.join(SIZES)} or of your own in data/family/; "
            f"got {name!r}; `qstar-book train family SIZE --out data/family/{name}` makes it"
        ) from error


def kinds_of(name: str) -> tuple[str, ...]:
    """What a trained model was asked; empty: every kind of `tasks.KINDS`."""
    made = json.loads((folder_of(name) / "training.json").read_text(encoding="utf8"))
    return tuple(made["training"]["kinds"])


def load(name: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A trained model by name, ready to decode, and the tokenizer."""
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(folder_of(name), dtype=dtype)
    return model.to(device).eval(), tokenizer()


def command(
    *,
    name: str,
    out: Path | None,
    kinds: Sequence[str],
    steps: int | None,
    seed: int,
    device: str,
    check: int,
) -> int:
    """Train a size, or make the first steps of a trained model again and compare."""
    if check:
        return _check(name, check, device)
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32: the losses stay within TOLERANCE
    training = Training(name, kinds=tuple(kinds), seed=seed)
    if steps is not None:
        training = replace(training, steps=steps)
    model, losses = train(training, device=device, progress=True)
    asked = tasks.items(None, 400)
    scores = {
        context: score(model, asked, hinted=context == "hinted") for context in ("plain", "hinted")
    }
    parameters = sum(x.numel() for x in model.parameters())
    made_by = provenance("torch", "transformers", device=device_name(device))
    told = {"scores": scores, "parameters": parameters, "made_by": made_by}
    save(model, out or find_checkout() / "data" / "family" / name, training, losses, **told)
    print(f"{name}: {parameters:,} weights, last loss {losses[-1]:.3f}; {scores}")
    return 0


def _check(name: str, steps: int, device: str) -> int:
    recorded = json.loads((folder_of(name) / "training.json").read_text())
    told = recorded["training"] | {"kinds": tuple(recorded["training"]["kinds"])}
    _, losses = train(Training(**told), device=device, stop_after=steps, progress=True)
    gap = max(abs(a - b) for a, b in zip(losses, recorded["losses"], strict=False))
    print(
        f"{name}: {steps} steps again, losses within {gap:.1e} of the recorded ones; allowed "
        f"{TOLERANCE}"
    )
    return int(gap > TOLERANCE)


TOLERANCE = 5e-4
"""Of a loss among the first steps, in nats a token, between two machines."""
