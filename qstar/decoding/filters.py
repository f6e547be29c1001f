"""What is done to a distribution before a draw: temperature, top-k, top-p, processors.

What judges a draft must be what it was drawn from, and a filter that reads the text must read it as
it would stand at that very position. Both are settled here, once: the decoder passes every
distribution through one `Filters`, whoever drew from it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from .. import _quiet  # noqa: F401 - before transformers

# isort: split
from transformers import (
    EncoderRepetitionPenaltyLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from ..arguments import check_count
from ..sampling.rules import log_point_mass

FILTERED = ("target", "parents")
"""What the filters may apply to: q* once it is formed, or both parents before."""

MEMORYLESS = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
)
"""Processors that do not read the text, so that all positions can be filtered at once."""

Processor = Callable[[Tensor, Tensor], Tensor]


def reads_text(step: Processor) -> bool:
    """Whether a processor may look at the ids; a subclass of `MEMORYLESS` may, whatever it is."""
    return type(step) not in MEMORYLESS


GAUGED = (
    RepetitionPenaltyLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    ExponentialDecayLengthPenalty,
)
"""Processors of transformers that go by the sign or the size of a score.

A constant added to all logits is nothing to a softmax, and much to these. A model has such a
constant of its own; the geometric mean of two has none. Processors see log-probabilities here,
which are never above zero, so that a repetition penalty multiplies each of them.
"""


def is_gauged(step: Processor, ids: Tensor, vocab: int) -> bool:
    """Whether a constant added to all scores would change what a processor means.

    Known of those in `GAUGED`; tried out, with the text as it stands, on any other that is not
    transformers' own.
    """
    if isinstance(step, GAUGED):
        return True
    if type(step).__module__ == LogitsProcessor.__module__ and not _fills_in(step):
        return False
    spread = torch.arange(vocab, dtype=torch.float32, device=ids.device)
    scores = (7 * spread).sin().mul(3).log_softmax(-1)[None]
    plain, above, below = (
        step(ids[None], scores + offset).softmax(-1) for offset in (0.0, 16.0, -16.0)
    )
    return not all(torch.allclose(plain, other, atol=1e-4) for other in (above, below))


def _fills_in(step: Processor) -> bool:
    """Whether a filter sets scores to a number, which is not below every other."""
    return bool(getattr(step, "filter_value", -torch.inf) != -torch.inf)


@dataclass(frozen=True, slots=True)
class Filters:
    """The filters between a distribution and a draw, in order.

    Attributes:
        steps: Called with (ids, scores) as processors of transformers are. They must be functions
            of these two alone: a position may be asked about more than once.
        greedy: Keep the most probable token only, after all else.
    """

    steps: tuple[Processor, ...] = ()
    greedy: bool = False
    reads_text: bool = field(init=False)

    def __post_init__(self) -> None:
        reads = any(map(reads_text, self.steps))
        object.__setattr__(self, "reads_text", reads)

    def __call__(
        self, log_p: Tensor, texts: Sequence[Tensor], drafts: Tensor | None = None
    ) -> Tensor:
        """Filtered: what follows each row's text and its first 0, 1, 2, ... drafts.

        Args:
            log_p: Log-probabilities. The steps see these as their scores, not a model's logits,
                which matters to the processors in `GAUGED`. Shape (batch, positions, vocab).
            texts: Each row's text up to the first position. Read only if `reads_text`. Shape
                (length,).
            drafts: What follows it, as far as the positions need it. Shape (batch, drafts).
        """
        scores = log_p
        for reads, steps in groupby(self.steps, reads_text):
            if reads:
                scores = _one_by_one(tuple(steps), scores, texts, drafts)
                continue
            scores = scores.flatten(0, 1).clone()
            for step in steps:
                scores = step(torch.empty(0, 0, dtype=torch.long), scores)
            scores = scores.reshape(log_p.shape)
        if self.steps:
            log_p = scores.log_softmax(-1)
        if self.greedy:
            nowhere = log_p.amax(-1, keepdim=True).isnan()  # nothing is the most probable of nan
            log_p = log_point_mass(log_p.argmax(-1), log_p.shape[-1], dtype=log_p.dtype)
            log_p = log_p.masked_fill(nowhere, torch.nan)
        return log_p


def _one_by_one(
    steps: Sequence[Processor], log_p: Tensor, texts: Sequence[Tensor], drafts: Tensor | None
) -> Tensor:
    """Scores after steps that read the text, each position of each row in a call of its own.

    Not in one call for all rows: a step may hold the ids of one text, as those that look at an
    encoder's do, and would then change the first row alone.
    """
    positions = log_p.shape[1]
    assert drafts is not None or positions == 1
    scored = []
    for row, text in enumerate(texts):
        ids = text.to(log_p.device)[None]
        if drafts is not None:
            ids = torch.cat([ids, drafts[row : row + 1, : positions - 1].clamp(min=0)], 1)
        for position in range(positions):
            scores = log_p[row, position : position + 1].clone()
            for step in steps:
                scores = step(ids[:, : len(text) + position], scores)
            scored.append(scores)
    return torch.cat(scored).reshape(log_p.shape)


def filters_for(
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    logits_processor: Sequence[Processor] = (),
    greedy: bool = False,
) -> Filters:
    """Processors first, then temperature, top-k and top-p, as transformers orders them.

    Raises:
        ValueError: A number is out of range; the message says which.
    """
    steps: list[Any] = list(logits_processor)
    if not temperature > 0:
        raise ValueError(
            f"temperature must be positive: got {temperature}. greedy=True takes the most probable "
            f"token."
        )
    if temperature != 1:
        steps.append(TemperatureLogitsWarper(float(temperature)))
    if top_k is not None:
        steps.append(TopKLogitsWarper(check_count("top_k", top_k)))
    if top_p is not None:
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p is a probability and must lie in (0, 1]: got {top_p}.")
        steps.append(TopPLogitsWarper(float(top_p)))
    return Filters(tuple(steps), greedy)
