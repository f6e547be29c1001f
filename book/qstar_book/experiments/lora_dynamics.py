"""alpha*, C and the divergences while an adapter is trained, from the adapters kept on the way.

    qstar-book train lora lora-manual --checkpoints FOLDER/lora-manual
    qstar-book record lora-dynamics FOLDER/lora-manual FOLDER/lora-arithmetic --out FILE

Policy is the model after t steps. Teacher is the model before the training ("from the start", which
it leaves) or after it ("to the end", which it reaches). Both read text that is given: the recorded
answers of data/continuations.json, and what no step of the training held; the first `LONGEST`
tokens of each. Nothing is drawn.

The record (JSON):

    runs    {name: {texts, steps}}
        texts   {kind: [{prompt, tokens}]}, token ids; kinds "answers" and "held out"
        steps   [{step, pairs {"from the start" and "to the end": {kind: {field: values}}}}], one
                value for each position of the texts of a kind, of the `FIELDS`
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qstar.adapters import checkpoints
from qstar.decoding.diagnostics import measure

from .. import shipped_model
from ..files import RefusedError, cpu_name, provenance, write_json
from ..records import corpus
from . import lora

LONGEST = 16
ENOUGH = 128

FIELDS = ("alpha", "chernoff", "policy_to_teacher", "teacher_to_policy", "largest_log_ratio")
"""Of a position: alpha*; C; KL(policy || teacher); KL(teacher || policy); and the largest
|log policy - log teacher| of all tokens. Nats."""

Texts = Mapping[str, Sequence[tuple[Tensor, Tensor]]]
"""By kind, pairs of a prompt and the tokens after it, as token ids. Shapes (length,)."""


def texts_of(training: lora.Training, tokenizer: Any) -> Texts:
    """What both models read: recorded answers, and what the training did not hold."""
    recorded = corpus.read_corpus(corpus.data_file("continuations.json"))
    answers = [
        (
            checkpoints.chat_ids(tokenizer, a.prompt.user, system=a.prompt.policy_system),
            torch.tensor(a.tokens)[:LONGEST],
        )
        for a in recorded.continuations
    ]
    held_out: list[tuple[Tensor, Tensor]] = []
    for example in lora.TEXTS[training.text].held_out():
        if sum(len(tokens) for _, tokens in held_out) < ENOUGH:
            prompt, tokens = lora.token_ids(tokenizer, example)
            held_out.append((prompt, tokens[:LONGEST]))
    return {"answers": answers, "held out": held_out}


def read(model: Any, texts: Texts) -> dict[str, Tensor]:
    """Log-probabilities at every position of the texts, by kind. Shape (positions, vocab)."""
    return {
        kind: torch.cat([checkpoints.log_distributions(model, *text) for text in chosen])
        for kind, chosen in texts.items()
    }


def compare(log_policy: Tensor, log_teacher: Tensor) -> dict[str, Tensor]:
    """The `FIELDS` at positions with these log-probabilities. Shapes (positions, vocab)."""
    seen = measure(log_policy, log_teacher)
    found = {
        "alpha": seen.balance.alpha,
        "chernoff": seen.balance.chernoff,
        "policy_to_teacher": seen.policy_to_teacher,
        "teacher_to_policy": seen.teacher_to_policy,
        "largest_log_ratio": (log_policy - log_teacher).abs().amax(-1).double(),
    }
    return {name: found[name] for name in FIELDS}


def adapted(folder: Path) -> Any:
    """The shipped model with the adapter of a folder merged."""
    return shipped_model.load(folder)[0]


def follow(folder: Path, texts: Texts) -> list[dict[str, Any]]:
    """Each kept adapter of a training against the model before and after it.

    Args:
        folder: Holds step-N for some N, the last of them the end of the training.
        texts: What is read.
    """
    found = {int(path.name.removeprefix("step-")): path for path in folder.glob("step-*")}
    if len(found) < 2:
        raise RefusedError(f"expected folders step-N of two steps or more in {folder}")
    end = read(adapted(found[max(found)]), texts)
    start = read(adapted(found[min(found)]), texts)
    steps = []
    for step in sorted(found):
        here = read(adapted(found[step]), texts)
        pairs = {
            name: {
                kind: {
                    field: [float(f"{x:.4g}") for x in values.tolist()]
                    for field, values in compare(here[kind], rows).items()
                }
                for kind, rows in teacher.items()
            }
            for name, teacher in (("from the start", start), ("to the end", end))
        }
        steps.append({"step": step, "pairs": pairs})
        print(f"{folder.name}, step {step}: done", file=sys.stderr, flush=True)
    return steps


def command(*, folders: Sequence[Path], out: Path, threads: int) -> None:
    """`qstar-book record lora-dynamics`."""
    torch.set_num_threads(threads)
    _, tokenizer = shipped_model.load()
    runs = {}
    for folder in folders:
        if folder.name not in lora.TRAININGS:
            raise RefusedError(f"a folder's name is one of {', '.join(lora.TRAININGS)}: {folder}")
        training, _ = lora.read_training(corpus.adapter_folder(folder.name))
        texts = texts_of(training, tokenizer)
        runs[folder.name] = {
            "texts": {
                kind: [{"prompt": p.tolist(), "tokens": tokens.tolist()} for p, tokens in chosen]
                for kind, chosen in texts.items()
            },
            "steps": follow(folder, texts),
        }
    made_by = provenance("torch", "transformers", device="cpu", cpu=cpu_name(), threads=threads)
    write_json(out, {**made_by, "runs": runs})
    print(out)
