"""What makes the output distribution: the exponent, the filters, and how drafts are judged."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import rows_torch
from ..result import STATUSES, Balance
from ..sampling import rules
from ..sampling.chance import Chance
from .coin import log_mixture
from .costs import PARENTS, other
from .filters import Filters
from .state import Proposal, State, tensor_on

NO_FILTERS = Filters()
DISJOINT = STATUSES.index("disjoint")


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """What was decided of a proposal, on the device.

    Attributes:
        verdict: How many drafts were kept and tested, and the token after them.
        exact: Whether that token is of q* where all drafts were kept; else it is of whoever looked
            one position further.
        target: log q*, filtered. Shape (rows, positions, vocab).
        known: By name, what the trace keeps of each position. Shape (rows, positions).
    """

    verdict: rules.Round
    exact: bool
    target: Tensor
    known: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Rule:
    """How the target is made from the parents' distributions, and drafts from their drafter's.

    Attributes:
        alpha: The exponent on the policy, None for alpha* at each position; outside [0, 1] it is
            guidance (`Sampling`).
        filters: What stands between a distribution and a draw.
        filtered: "target" filters q*, "parents" the parents before q* is formed.
        disjoint: "raise", or "mixture" for the parents' even mixture where they share no token.
        blocks: Judge a round's drafts together.
    """

    alpha: float | None = None
    filters: Filters = NO_FILTERS
    filtered: str = "target"
    disjoint: str = "raise"
    blocks: bool = False

    @property
    def divisor(self) -> str | None:
        """The parent whose exponent is negative, if there is one."""
        if self.alpha is None or 0 <= self.alpha <= 1:
            return None
        return PARENTS[self.alpha > 1]

    @property
    def of_parents(self) -> Filters:
        """What is done to a parent's distribution before q* is formed."""
        return Filters(self.filters.steps) if self.filtered == "parents" else NO_FILTERS

    @property
    def of_target(self) -> Filters:
        """What is done to q*; and to what a draft is drawn from, which should resemble it."""
        if self.filtered == "parents":
            return Filters(greedy=self.filters.greedy)
        return self.filters

    def texts(
        self,
        state: State,
        name: str,
        device: torch.device,
        drafts: Tensor | None = None,
        counts: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """The texts that filters see; empty if none of them looks."""
        return state.texts(name, device, drafts, counts) if self.filters.reads_text else []

    def parent(self, state: State, name: str, raw: Tensor, drafts: Tensor | None) -> Tensor:
        """A parent's distributions as they go into q*, after the text and after its drafts."""
        return self.of_parents(raw, self.texts(state, name, raw.device), drafts)

    def draw(
        self, state: State, name: str, raw: Tensor, tails: list[Tensor] | None, chance: Chance
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One draft token of each row.

        Args:
            state: The texts so far.
            name: Who drafts.
            raw: Its distribution after the drafts so far. Shape (rows, 1, vocab).
            tails: These drafts, row by row; None if there are none.
            chance: The source of the choice.

        Returns:
            (token, what it was drawn from, what goes into q* if the drafter is a parent).
        """
        log_parent, log_draft = raw, raw
        if self.filters.steps or self.filters.greedy:
            own = self.texts(state, name, raw.device)
            policys = self.texts(state, "policy", raw.device)
            if tails is not None and self.filters.reads_text:
                own = [torch.cat(pair) for pair in zip(own, tails, strict=True)]
                policys = [torch.cat(pair) for pair in zip(policys, tails, strict=True)]
            log_parent = self.of_parents(raw, own) if name in PARENTS else raw
            log_draft = self.of_target(log_parent, policys)
        token = chance.draw(log_draft).squeeze(-1)
        return token.clamp(min=0), log_draft, log_parent  # from nothing, it is found out if judged

    def mix(self, log_policy: Tensor, log_teacher: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """log q_alpha at every position, and what the trace keeps of it."""
        inside = self.divisor is None
        if self.alpha is None:
            balance = rows_torch.solve_kl_symmetry(log_policy, log_teacher, validate=False)
            alpha, minus_log_partition = balance.alpha, balance.chernoff
        else:  # nothing to solve
            alpha = torch.full_like(log_policy[..., 0], self.alpha)
            minus_log_partition = -rows_torch.log_partition(
                log_policy, log_teacher, alpha, inside=inside
            )
            balance = _unsolved(minus_log_partition)
        log_q = rows_torch.log_geometric_mean(log_policy, log_teacher, alpha, inside=inside)
        if self.disjoint == "mixture":
            apart = balance.status == DISJOINT
            halves = torch.logaddexp(log_policy, log_teacher).log_softmax(-1)
            log_q = torch.where(apart.unsqueeze(-1), halves, log_q)
        known = {"alpha": alpha, "minus_log_partition": minus_log_partition}
        return log_q, known | {f"balance.{k}": getattr(balance, k) for k in Balance.__slots__}

    def judge(
        self,
        state: State,
        proposal: Proposal,
        log_policy: Tensor,
        log_teacher: Tensor,
        log_beyond: Tensor | None,
        chance: Chance,
    ) -> Judged:
        """Keep each row's drafts up to the first that q* rejects, and draw the token after them.

        q* is known at as many positions as the parents are. One more than the drafts: the last one
        gives every row a token beyond its accepted drafts. As many as the drafts: then that token
        is drawn from `log_beyond`, or means nothing.

        Args:
            state: The texts so far.
            proposal: The drafts.
            log_policy: The policy's distributions. Shape (rows, positions, vocab).
            log_teacher: The teacher's.
            log_beyond: What the next proposal is drawn from. Shape (rows, 1, vocab).
            chance: The source of the choices.
        """
        log_q, known = self.mix(log_policy, log_teacher)
        texts = self.texts(state, "policy", log_q.device)
        shaped = {
            name: self.of_target(log_parent, texts, proposal.tokens)
            for name, log_parent in zip(PARENTS, (log_policy, log_teacher), strict=True)
        }
        log_draft = proposal.log_draft
        if proposal.weights is not None:
            log_draft = log_mixture(proposal, shaped[other(proposal.by)][:, : proposal.width])
        target = self.of_target(log_q, texts, proposal.tokens)
        drafted = tensor_on(log_q.device, proposal.counts)
        exact = target.shape[1] > proposal.width
        log_target = target
        if not exact:
            beyond = target[:, -1:] if log_beyond is None else log_beyond
            log_target = torch.cat([target, beyond], 1)
            if min(proposal.counts) < proposal.width:
                place = torch.arange(proposal.width + 1, device=log_q.device)
                log_target = torch.where((place == drafted[:, None])[..., None], beyond, log_target)
        verify = rules.verify_block if self.blocks else rules.verify
        verdict = verify(
            proposal.tokens, log_draft, log_target, drafted=drafted, generator=chance, check=False
        )
        mass = {name: log_parent.exp() for name, log_parent in shaped.items()}
        mass["coin"] = (mass["policy"] + mass["teacher"]).div_(2)
        wanted = target.exp()
        for name, proposed in mass.items():  # nan where a parent or the target is
            known[f"accept_{name}"] = torch.minimum(proposed, wanted).sum(-1).clamp(max=1)
        chosen = verdict.tokens[:, : target.shape[1], None].clamp(min=0)
        for name, log_p in (("target", target), ("policy", log_policy), ("teacher", log_teacher)):
            known[f"log_{name}"] = log_p.gather(-1, chosen).squeeze(-1)
        return Judged(verdict, exact, target, known)


def _unsolved(minus_log_partition: Tensor) -> Any:
    """The balance where the exponent was fixed: that there is none, and no more."""
    nothing = torch.full_like(minus_log_partition, torch.nan)
    apart = minus_log_partition == torch.inf
    values = dict.fromkeys(Balance.__slots__, nothing)
    status = torch.where(apart, DISJOINT, -1).to(torch.int8)
    none = torch.zeros_like(apart, dtype=torch.int32)
    return Balance(**values | {"status": status, "converged": apart & ~apart, "passes": none})
