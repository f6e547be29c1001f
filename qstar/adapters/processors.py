"""Processors and criteria of transformers, as `qstar.generate` asks them: a row at a time.

The hook (`qstar.adapters.transformers`) passes through here what was prepared for a whole batch,
and refuses, by name, what would mean something else here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _quiet  # noqa: F401 - before transformers

# isort: split
from transformers.generation import logits_process as theirs

from ..decoding.filters import Processor, is_gauged, reads_text

REMEMBERING = (theirs.SynthIDTextWatermarkLogitsProcessor,)
"""Processors that keep what they saw."""

OF_SOUND = (
    theirs.ClassifierFreeGuidanceLogitsProcessor,
    theirs.DiaClassifierFreeGuidanceLogitsProcessor,
    theirs.DiaEOSChannelFilterLogitsProcessor,
    theirs.DiaEOSDelayPatternLogitsProcessor,
    theirs.WhisperNoSpeechDetection,
)
"""Processors of models of sound, which see several rows for one, or keep what they saw."""

OF_A_ROW = (
    theirs.EncoderNoRepeatNGramLogitsProcessor,
    theirs.EncoderRepetitionPenaltyLogitsProcessor,
    theirs.PrefixConstrainedLogitsProcessor,
)
"""Processors that tell the rows of a batch apart."""


def for_one_row(processors: Sequence[Processor], mask: Tensor, filtered: str) -> list[Processor]:
    """The same processors, ready to be asked about one row and one position at a time."""
    steps: list[Processor] = []
    for step in processors:
        name = type(step).__name__
        if filtered == "parents" and reads_text(step):
            raise ValueError(
                f"{name} reads the text, and filtered='parents' shows it each parent's own, whose "
                f"prompt may have another length than the one it was prepared for: leave filtered "
                f"out, or call qstar.generate with processors of your own."
            )
        if isinstance(step, theirs.UnbatchedClassifierFreeGuidanceLogitsProcessor):
            raise ValueError(
                f"{name} reads the model by itself: pass its guidance_scale as alpha=..., with the "
                f"same model as teacher=... and the negative prompt as teacher_input_ids=...."
            )
        if isinstance(step, REMEMBERING):
            raise ValueError(
                f"{name} remembers what it was asked before, and a draft may be asked about and "
                f"thrown away: use processors that are functions of (ids, scores) alone."
            )
        if isinstance(step, OF_SOUND):
            raise ValueError(
                f"{name} belongs to a model of sound: q_star draws from models of text, one token "
                f"a row."
            )
        if len(mask) > 1 and isinstance(step, OF_A_ROW):
            raise ValueError(f"{name} treats each row in its own way: decode them one by one.")
        if isinstance(step, theirs.RepetitionPenaltyLogitsProcessor) and isinstance(
            step.prompt_ignore_length, Tensor
        ):
            if not torch.equal(step.prompt_ignore_length.cpu(), (~mask).sum(-1).cpu()):
                raise ValueError(
                    f"{name} may ignore the padding of each row, or the same number of tokens in "
                    f"all of them (an int): got {step.prompt_ignore_length.tolist()}."
                )
            steps.append(_penalty_without_padding(step.penalty))
        elif reads_text(step) and not bool(mask.all()):
            steps.append(seen_with_padding(step))
        else:
            steps.append(step)
    return steps


def check_gauge(
    alpha: float | None, processors: Sequence[Processor], ids: Tensor, vocab: int
) -> None:
    """Refuse what would not mean at alpha = 1 (0) what it means in the parent's own `generate`."""
    for step in processors:
        if type(step) is theirs.LogitNormalization:
            return  # what comes after it sees the same scores here and there
        if is_gauged(step, ids, vocab):
            parent = "policy" if alpha == 1 else "teacher"
            raise ValueError(
                f"{type(step).__name__} depends on what is added to all logits alike: with "
                f"alpha={alpha} it would see log-probabilities here, and raw logits in the "
                f"{parent}'s own generate, which this should equal. Leave it out, call that, or "
                f"pass logits_processor=[LogitNormalization(), ...] with it behind, which means "
                f"the same in both."
            )


# The decoder shows ~id where id is padding.


def seen_with_padding(function: Callable[..., Any]) -> Callable[[Tensor, Any], Any]:
    """The same processor or criterion, which counts the padding as transformers has it."""

    def seen(ids: Tensor, scores: Any) -> Any:
        return function(torch.where(ids < 0, ~ids, ids), scores)

    return seen


def _penalty_without_padding(penalty: float) -> Processor:
    """A repetition penalty on the text alone."""

    def seen(ids: Tensor, scores: Tensor) -> Tensor:
        padding = (ids < 0).sum(-1)
        return theirs.RepetitionPenaltyLogitsProcessor(penalty, padding)(ids, scores)  # type: ignore[no-any-return]

    return seen
