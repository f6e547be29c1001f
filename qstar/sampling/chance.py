"""Where choices come from: to keep a token, and to draw one.

`generator` is a `torch.Generator` on any device (a CPU generator serves tensors on an accelerator),
or anything that can `keep` and `draw` as `Chance` does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

NO_TOKEN = -1
"""Stands where there is no token: past the end of a round, or when a draft has run out of them."""


@runtime_checkable
class Chance(Protocol):
    """A source of the two kinds of choice that the rules make.

    `Coins` makes them at random; `qstar.sampling.enumeration` makes every one of them in turn.
    """

    def keep(self, log_probability: Tensor) -> Tensor:
        """True with the given probability, independently in every entry."""

    def draw(self, log_p: Tensor) -> Tensor:
        """One token from each row of log-probabilities, independently."""


class _Numbers:
    """Choices made by uniform numbers in double precision, one for each."""

    __slots__ = ()

    def keep(self, log_probability: Tensor) -> Tensor:
        """True with the given probability: never at -inf (or nan), always at 0."""
        return self._uniform(log_probability, lots=False) < log_probability.double().exp()

    def draw(self, log_p: Tensor) -> Tensor:
        """The inverse distribution function at a uniform number; never a token of no mass.

        `NO_TOKEN` where a row has no token to give: all -inf, or nan. In double precision whatever
        the dtype of the row: with single precision, tokens rarer than 2^-24 would come too often or
        not at all.
        """
        p = log_p.to(torch.float64, copy=True).exp_()
        if not p.is_cpu:
            return self._draw_in_parallel(p)
        cumulative = p.cumsum_(-1)  # in order: it grows at tokens with mass alone
        total = cumulative[..., -1]
        threshold = (self._uniform(total, lots=True) * total).unsqueeze(-1)
        token = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
        return torch.where((total > 0) & (token < p.shape[-1]), token, NO_TOKEN)

    def _draw_in_parallel(self, p: Tensor) -> Tensor:
        """The same where a sum need not be quite monotone: only tokens with mass can be hit."""
        cumulative = p.cumsum(-1).masked_fill(p == 0, -torch.inf)
        total = cumulative.amax(-1)
        threshold = (self._uniform(total, lots=True) * total).unsqueeze(-1)
        above = cumulative > threshold
        token = above.to(torch.uint8).argmax(-1)
        return torch.where(above.any(-1), token, NO_TOKEN)

    def _uniform(self, like: Tensor, *, lots: bool) -> Tensor:
        """Numbers in [0, 1), in the shape of `like`: `lots` to draw by, others to keep by."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Coins(_Numbers):
    """Choices made at random, one uniform number in double precision for each.

    Attributes:
        generator: The only source of randomness; on the CPU or on the tensors' own device.
    """

    generator: torch.Generator

    def _uniform(self, like: Tensor, *, lots: bool) -> Tensor:
        uniform = torch.rand(
            like.shape, generator=self.generator, dtype=torch.float64, device=self.generator.device
        )
        return uniform.to(like.device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class RowCoins(_Numbers):
    """Choices made at random, each row of a batch by numbers of its own.

    What a row is given hangs on no other row: neither on how many there are, nor on how much
    randomness they use. Row 0 uses the generator itself, as a row alone would. Each other one has
    a stream that follows from the generator's state and the row's index.

    Attributes:
        streams: One for each row.
        coins: How many tokens of each row may be kept, if not the same number in all: the numbers
            for what is beyond are not drawn.
        lots: The same of the tokens that are drawn.
    """

    streams: tuple[torch.Generator | np.random.Generator, ...]
    coins: Sequence[int] | None = None
    lots: Sequence[int] | None = None

    @classmethod
    def of(cls, generator: torch.Generator, rows: int) -> "RowCoins":
        """The streams of a batch; a CPU generator, which is left as it was."""
        aside = torch.Generator()
        aside.set_state(generator.get_state())
        words = torch.randint(2**32, (4,), generator=aside).tolist()
        others = (
            np.random.default_rng(np.random.SeedSequence(words, spawn_key=(row,)))
            for row in range(1, rows)
        )
        return cls((generator, *others))

    def only(
        self,
        rows: Sequence[int],
        *,
        coins: Sequence[int] | None = None,
        lots: Sequence[int] | None = None,
    ) -> "RowCoins":
        """The same streams for some of the rows, in this order."""
        return RowCoins(tuple(self.streams[row] for row in rows), coins, lots)

    def _uniform(self, like: Tensor, *, lots: bool) -> Tensor:
        counts = self.lots if lots else self.coins
        rows, most = len(self.streams), like.shape[1:].numel()
        numbers = np.zeros((rows, most))
        for row, stream in enumerate(self.streams):
            count = most if counts is None else min(most, counts[row])
            if isinstance(stream, np.random.Generator):
                numbers[row, :count] = stream.random(count)
            else:
                drawn = torch.rand(count, generator=stream, dtype=torch.float64)
                numbers[row, :count] = drawn.numpy()
        return torch.from_numpy(numbers).reshape(like.shape).to(like.device, non_blocking=True)


def chance_of(generator: torch.Generator | Chance) -> Chance:
    return Coins(generator) if isinstance(generator, torch.Generator) else generator
