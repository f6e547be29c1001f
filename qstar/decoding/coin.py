"""Coin drafting: chance decides which parent proposes, and q* judges the mixture of both.

Who proposed last proposes again with a probability of its own ("stay"); else the other parent reads
what waits, judges it, and proposes. Given all tokens before it and who proposed last, a proposal
then follows the mixture m = w policy + (1 - w) teacher of the parents' distributions, w being the
chance that the policy proposes. Both are known once it is judged, so that it is kept with
probability min(1, q*/m) and redrawn from the normalised (q* - m)+. The token is as exact as with
any draft distribution, for coin and token are integrated out together: the coin is tossed before
the token is drawn, and nothing that judges the token looks at it.

Acceptance: m >= exp(-d) policy^alpha teacher^(1-alpha) by the inequality of the means, d being the
divergence of a coin with probability w from one with alpha, so that a proposal is kept with
probability sum min(q*, m) >= exp(-C - d); at w = alpha d is 0. One parent alone guarantees only
1 - sqrt(C / 2). And it is at least the coin's average of the parents' own probabilities, for the
total variation distance is convex. Alternating, one proposal at a time, is the coin that
never stays.

With guidance (alpha outside [0, 1]) the coin is as exact, and the average still holds, but not the
bound by C; and the nearer parent's own proposals are kept at least as often as any mixture's. For
in the order of the log-ratio the other parent, the mixture, the nearer parent and the target have
increasing likelihood ratios, and total variation grows along such a row.

The mixture judges in both cases or in none: where the coin said "stay" its proposal was judged at
once, so where it did not, what the other parent drew has to be judged as well. `go_on_with` sees to
that when the plan changes in between.

Each row tosses for itself, so rows stay independent: under one coin for all each row would still be
exact by itself, but two rows would not be independent.

Derived in: the chapter "Speculative decoding". We know of no earlier statement of it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..sampling.chance import Chance
from .costs import PARENTS, TURNS
from .planner import Plan
from .state import Begun, Proposal, tensor_on


@dataclass(frozen=True, slots=True)
class Tosses:
    """What the coins of a round said, row by row; nothing was drawn yet.

    Attributes:
        more: How many tokens the proposer adds to its first one before the other parent reads.
        stay: The probability with which it was to propose each of these.
        after: The probability with which the reading parent was to propose what comes beyond.
    """

    more: tuple[int, ...]
    stay: float
    after: tuple[float, ...]

    @classmethod
    def none(cls, rows: int, gamma: int) -> "Tosses":
        """No coin: a proposal has gamma tokens, whose proposer was certain."""
        return cls((gamma - 1,) * rows, 1.0, (1.0,) * rows)


def toss(chance: Chance, most: Sequence[int], stay: float) -> Tosses:
    """Toss whether the proposer goes on, in each row until it does not, `most` times at the most.

    Where the last of these said "stay", it is certain that the other parent is next: the limit is
    part of the draft distribution.
    """
    widest = max(most)
    if widest < 1:
        return Tosses((0,) * len(most), stay, (1.0,) * len(most))
    log_stay = torch.full((len(most), widest), stay, dtype=torch.float64).log()
    stays = chance.keep(log_stay).cumprod(-1).sum(-1).tolist()  # on the CPU: no wait for a device
    more = tuple(min(told, limit) for told, limit in zip(stays, most, strict=True))
    after = tuple(1 - stay if told < limit else 1.0 for told, limit in zip(more, most, strict=True))
    return Tosses(more, stay, after)


def toss_for_first(chance: Chance, stay: tuple[float, float]) -> tuple[str, float]:
    """Who proposes where nobody has proposed yet, and the probability that it was this parent."""
    weight = (stay[0] + 1 - stay[1]) / 2  # between what it is after the policy and the teacher
    policy = bool(chance.keep(torch.tensor([[weight]], dtype=torch.float64).log()))
    return (PARENTS[0], weight) if policy else (PARENTS[1], 1 - weight)


def go_on_with(begun: Begun | None, plan: Plan) -> Plan:
    """The plan of a round, but one that judges what is begun if a coin decided who began it."""
    if begun is None or plan.scheme in TURNS or all(weight == 1 for weight in begun.weights):
        return plan
    return replace(plan, scheme="alternating", gamma=1, stay=None)


def weighed(
    proposal: Proposal, has: Sequence[bool], first: Sequence[float], tosses: Tosses
) -> Proposal:
    """A proposal with the probabilities with which its proposer was to propose its tokens.

    Args:
        proposal: The tokens.
        has: Which rows had their first token before these tosses.
        first: With which probability its proposer was to propose it.
        tosses: What decided on the others.
    """
    weights = tuple(
        (*[weight] * own, *[tosses.stay] * (count - own))[:count]
        for own, weight, count in zip(has, first, proposal.counts, strict=True)
    )
    certain = all(weight == 1 for row in weights for weight in row)
    return replace(proposal, weights=None if certain else weights, after=tosses.after)


def log_mixture(proposal: Proposal, log_other: Tensor) -> Tensor:
    """What the tokens were drawn from, coin and all, once both parents are known.

    Args:
        proposal: The tokens, and the distributions of their proposer.
        log_other: What the other parent would have drawn them from. Shape (rows, width, vocab).
    """
    if proposal.weights is None:
        return proposal.log_draft
    padded = [(*row, *[1.0] * (proposal.width - len(row))) for row in proposal.weights]
    own = tensor_on(log_other.device, padded, log_other.dtype).unsqueeze(-1)
    return torch.logaddexp(own.log() + proposal.log_draft, (-own).log1p() + log_other)


def log_even_mixture(log_policy: Tensor, log_teacher: Tensor) -> Tensor:
    """What a fair coin draws from: half of each parent's distribution."""
    return torch.logaddexp(log_policy, log_teacher).sub_(math.log(2))
