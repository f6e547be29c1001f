"""What a decode has at hand between two rounds, and what it remembers of one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .planner import Plan

PROPOSERS = ("none", "policy", "teacher", "draft", "lookup")


@dataclass(frozen=True, slots=True, eq=False)
class Proposal:
    """Tokens that somebody proposed, row by row, and the distributions they were drawn from.

    Attributes:
        by: One of `PROPOSERS`.
        tokens: Shape (rows, width).
        log_draft: What the tokens were drawn from, after the filters. Shape (rows, width, vocab).
        log_parent: The distribution that goes into q*, if a parent proposed. Shape (rows, width,
            vocab).
        counts: How many tokens of each row are real; the rest is anything.
        weights: For each row, the probability with which a coin had its proposer propose each of
            its tokens, given all before it; else the other parent would have. None is 1 throughout.
        after: For each row, the same of the reading parent and the token beyond. None is 1.
    """

    by: str
    tokens: Tensor
    log_draft: Tensor
    log_parent: Tensor | None
    counts: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...] | None = None
    after: tuple[float, ...] | None = None

    @property
    def width(self) -> int:
        """The most tokens that a row has."""
        return self.tokens.shape[-1]


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """One draft token of each row, and the distributions it was drawn from.

    Attributes:
        token: Shape (rows,).
        log_draft: What it was drawn from, after the filters. Shape (rows, 1, vocab).
        log_parent: The drafter's own distribution. Shape (rows, 1, vocab).
    """

    token: Tensor
    log_draft: Tensor
    log_parent: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Begun:
    """A parent's next proposal, of which one token is drawn.

    Attributes:
        by: The parent, which has read all that stands before that token.
        first: The token of each running row.
        has: Whether it is a proposal; in the other rows it is the last emitted token.
        gamma: How many drafts it is to have; with a coin, at most.
        weights: For each row, the probability with which this parent was to propose that token.
    """

    by: str
    first: Draft
    has: tuple[bool, ...]
    gamma: int
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """The texts of a decode under way, and what is proposed.

    Attributes:
        prompts: By model ("policy", "teacher", "draft"), the prompt of every row of the batch.
        shown: The policy's prompts as processors and criteria see them.
        new: The new tokens of every row of the batch.
        rows: Which rows are not finished.
        limit: The most new tokens of a row.
        pending: A parent's proposal, begun where it looked further than the other.
    """

    prompts: Mapping[str, Sequence[Sequence[int]]]
    shown: Sequence[Sequence[int]]
    new: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]
    limit: int
    pending: Begun | None = None

    def left(self) -> list[int]:
        """How many tokens each running row may still get."""
        return [self.limit - len(self.new[row]) for row in self.rows]

    def texts(
        self,
        name: str,
        device: torch.device,
        drafts: Tensor | None = None,
        counts: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """The texts of the running rows as filters see them, and some drafts behind them."""
        prompts = self.shown if name == "policy" else self.prompts[name]
        found = []
        for place, row in enumerate(self.rows):
            ids = tensor_on(device, [*prompts[row], *self.new[row]])
            if drafts is not None and counts is not None:
                ids = torch.cat([ids, drafts[place, : counts[place]]])
            found.append(ids)
        return found


def tensor_on(device: torch.device, values: Sequence[Any], dtype: Any = None) -> Tensor:
    """Numbers of the host as a tensor on a device, for which the host does not wait.

    `torch.tensor(..., device=...)` waits until the device has done all that was asked of it before.
    """
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Forward:
    """One call of one model.

    Attributes:
        model: "policy", "teacher" or "draft"; "both" where one call served both parents.
        width: How many columns it read.
        rows: In how many rows of the batch, each parent's counted.
        seconds: What it took; on an accelerator, on the device.
        begins: Whether it read some of a prompt, too.
    """

    model: str
    width: int
    rows: int
    seconds: float
    begins: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What one round did, row by row of those that were running.

    Attributes:
        plan: What it followed.
        proposer: One of `PROPOSERS`.
        rows: The running rows, as indices into the batch.
        starts: How many new tokens each had before.
        counts: How many tokens were proposed.
        accepted: How many of these were kept.
        tested: How many were put to the test.
        emitted: The new tokens.
        known: By name, what the trace keeps of each position; on the device. Shape (rows,
            positions).
        accept: By parent, and for an even coin, the acceptance probability at each emitted position
            of every row.
        weights: The probabilities with which a coin had the proposer propose, as in `Proposal`.
        forwards: The forward passes since the round before.
        at: When the host knew, in seconds on the clock of time.perf_counter.
    """

    plan: Plan
    proposer: str
    rows: tuple[int, ...]
    starts: list[int]
    counts: tuple[int, ...]
    accepted: list[int]
    tested: list[int]
    emitted: list[list[int]]
    known: dict[str, Any]
    accept: dict[str, list[float]]
    weights: tuple[tuple[float, ...], ...] | None
    forwards: tuple[Forward, ...]
    at: float
