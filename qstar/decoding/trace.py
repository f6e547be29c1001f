"""What is remembered of a decode: where each token was drawn, what each round took."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..result import Balance
from .costs import Costs
from .diagnostics import TensorBalance
from .state import PROPOSERS, Forward, Step

EQUAL_CHERNOFF = 1e-10
"""The Chernoff information, in nats, up to which two distributions are called one and the same."""


@dataclass(frozen=True, slots=True)
class RoundTrace:
    """What led to one verification, and what came of it, summed over the rows of the batch.

    Attributes:
        scheme: The scheme that the round followed.
        gamma: The draft length that was planned.
        forwards: The forwards since the round before, the verifying ones last.
        drafted: Draft tokens that were put to the test or would have been.
        tested: Those that were: the accepted ones, and the first rejected one of a row; with
            `block_verification` all of them, so that accepted / tested is then no estimate of an
            acceptance probability.
        accepted: Those that were kept.
        emitted: New tokens.
        seconds: Wall time since the round before.
    """

    scheme: str
    gamma: int
    forwards: tuple[Forward, ...]
    drafted: int
    tested: int
    accepted: int
    emitted: int
    seconds: float

    @classmethod
    def of(cls, step: Step, begun: float) -> "RoundTrace":
        """The sums over a round's rows, which began when the round before had ended."""
        return cls(
            scheme=step.plan.scheme,
            gamma=step.plan.gamma,
            forwards=step.forwards,
            drafted=sum(step.counts),
            tested=sum(step.tested),
            accepted=sum(step.accepted),
            emitted=sum(map(len, step.emitted)),
            seconds=step.at - begun,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """What was known where each token was drawn, and what each round took.

    One entry per position, shaped like the tokens: (*positions). Where no token was drawn numbers
    are nan, statuses and proposers -1. Divergences are in nats.

    Attributes:
        balance: alpha*, the Chernoff information, the status and the rest of the solution. Where
            the exponent was fixed nothing was solved: numbers are nan and statuses -1, but for
            "disjoint".
        alpha: The exponent that was used: alpha*, unless it was fixed.
        minus_log_partition: -log Z(alpha); at alpha* it is the Chernoff information. With guidance
            it is never positive, and bounds no acceptance: for alpha > 1 it is -(alpha - 1) times
            the Renyi divergence of order alpha from policy to teacher, for alpha < 0 alpha times
            that of order 1 - alpha from teacher to policy.
        accept_policy: The acceptance probability of a token drafted by the policy, after the
            filters.
        accept_teacher: The same for a token drafted by the teacher.
        accept_coin: The same where an even coin chooses which parent drafts.
        log_target: The log-probability of the token in what it was drawn from: q*, after the
            filters. What was drawn is thus a draw of the policy with the weight
            exp(log_policy - log_target), and of the teacher with exp(log_teacher - log_target),
            multiplied over the tokens of a text (where the filters leave out nothing).
        log_policy: The same in the policy, as it went into q*.
        log_teacher: The same in the teacher.
        weight: The probability with which the parent that proposed was to: 1 without a coin, nan
            where nobody proposed.
        proposer: Who proposed a token there, as an index into `PROPOSERS`.
        accepted: Whether the proposal was kept. False where nobody proposed.
        rounds: The rounds in order.
        prefill: The forwards before the first round, which read of a long prompt what its first
            forward leaves.
        costs: What forward passes take, as the caller said or, with "auto", as far as it has been
            learned; None where neither is so.
    """

    balance: TensorBalance
    alpha: Tensor
    minus_log_partition: Tensor
    accept_policy: Tensor
    accept_teacher: Tensor
    accept_coin: Tensor
    log_target: Tensor
    log_policy: Tensor
    log_teacher: Tensor
    weight: Tensor
    proposer: Tensor
    accepted: Tensor
    rounds: tuple[RoundTrace, ...]
    prefill: tuple[Forward, ...]
    costs: Costs | None

    @property
    def acceptance_rate(self) -> float:
        """Accepted over tested drafts, nan if none was tested."""
        tested = sum(r.tested for r in self.rounds)
        return sum(r.accepted for r in self.rounds) / tested if tested else float("nan")

    @property
    def forwards(self) -> int:
        """Forwards of the parents in the rounds; a call that served both counts two.

        The first one of each parent reads its prompt, too, or the rest of a long one.
        """
        return sum(1 + (f.model == "both") for f in self._calls if f.model != "draft")

    @property
    def model_calls(self) -> int:
        """Calls of any model in the rounds."""
        return len(self._calls)

    @property
    def tokens_per_forward(self) -> float:
        """New tokens per row and forward of a parent: 1/2 if both read every token."""
        rows = sum(f.rows for f in self._calls if f.model != "draft")
        return sum(r.emitted for r in self.rounds) / rows if rows else float("nan")

    @property
    def _calls(self) -> list[Forward]:
        return [forward for r in self.rounds for forward in r.forwards]


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """New tokens, how many there are, and what was known where each was drawn.

    Attributes:
        tokens: The new tokens only, `max_new_tokens` of them; a row that ended earlier is filled up
            with the token that ended it. Shape (*batch, new).
        lengths: How many tokens of each row were drawn, the one that ended it included. Shape
            (*batch).
        trace: What was known at each position; its entries have the shape of `tokens`.
    """

    tokens: Tensor
    lengths: Tensor
    trace: Trace


def assemble(
    steps: Sequence[Step],
    new: Sequence[Sequence[int]],
    limit: int,
    begun: float,
    *,
    prefill: tuple[Forward, ...],
    costs: Costs | None,
    shaped: Callable[[Tensor], Tensor],
) -> Generation:
    """The tokens of a decode, and what was known of each, from its rounds in order.

    Args:
        steps: The rounds.
        new: The new tokens of every row of the batch.
        limit: How many tokens a row has in the result.
        begun: When the first round began, on the clock of the rounds.
        prefill: The forward passes before the first round.
        costs: What the trace says that forward passes took.
        shaped: Gives a (batch, limit) tensor the shape and the place that the caller asked for.
    """
    source, place, proposer, weight, accepted = [], [], [], [], []
    offset = 0
    for step in steps:
        batch, positions = step.known["alpha"].shape
        for i, row in enumerate(step.rows):
            for j in range(len(step.emitted[i])):
                source.append(offset + i * positions + j)
                place.append(row * limit + step.starts[i] + j)
                drafted = j < step.counts[i]
                proposer.append(PROPOSERS.index(step.proposer) if drafted else 0)
                coin = step.weights[i][j] if drafted and step.weights else 1.0
                weight.append(coin if drafted and step.proposer != "none" else torch.nan)
                accepted.append(j < step.accepted[i])
        offset += batch * positions
    index, positions_of = torch.tensor(place), torch.tensor(source)

    def filled(values: Tensor) -> Tensor:
        nothing = torch.nan if values.is_floating_point() else -(values.dtype != torch.bool)
        out = torch.full((len(new) * limit,), nothing, dtype=values.dtype)
        out[index] = values
        return shaped(out.reshape(-1, limit))

    def known(name: str) -> Tensor:
        return filled(torch.cat([s.known[name].reshape(-1) for s in steps]).cpu()[positions_of])

    trace = Trace(
        balance=Balance(**{name: known(f"balance.{name}") for name in Balance.__slots__}),
        alpha=known("alpha"),
        minus_log_partition=known("minus_log_partition"),
        accept_policy=known("accept_policy"),
        accept_teacher=known("accept_teacher"),
        accept_coin=known("accept_coin"),
        log_target=known("log_target"),
        log_policy=known("log_policy"),
        log_teacher=known("log_teacher"),
        weight=filled(torch.tensor(weight, dtype=torch.float64)),
        proposer=filled(torch.tensor(proposer, dtype=torch.int8)),
        accepted=filled(torch.tensor(accepted, dtype=torch.bool)),
        rounds=tuple(map(RoundTrace.of, steps, [begun, *(step.at for step in steps)])),
        prefill=prefill,
        costs=costs,
    )
    tokens = torch.tensor([[*text, *[text[-1]] * (limit - len(text))] for text in new])
    return Generation(shaped(tokens), shaped(torch.tensor([len(text) for text in new])), trace)


def parents_are_equal(steps: Sequence[Step]) -> bool:
    """Whether the parents had one distribution wherever a token was drawn."""
    return all(
        bool(_equal(step.known["minus_log_partition"], step.known["alpha"])[i, : len(fresh)].all())
        for step in steps
        for i, fresh in enumerate(step.emitted)
    )


def _equal(minus_log_partition: Tensor, alpha: Tensor) -> Tensor:
    """Whether -log Z is zero; outside [0, 1], where it is never positive, up to its rounding."""
    rounding = max(EQUAL_CHERNOFF, 8 * torch.finfo(alpha.dtype).eps)
    outside = (alpha < 0) | (alpha > 1)
    zero = minus_log_partition.abs() <= rounding
    return torch.where(outside, zero, minus_log_partition <= EQUAL_CHERNOFF)
