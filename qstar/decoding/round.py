"""One round of a decode: propose, read, judge, keep. All schemes, many rows, one wait.

A proposal has some tokens. Each parent's distribution is known at some number of positions: a
parent that proposed knows its own, the other reads. The target q* is known where both are. If that
is one position more than there are tokens, the token beyond them is drawn from q* itself; else
whoever looked further draws the next proposal there.

Derived in: the chapter "Speculative decoding". Source: the analysis, problem 1, whose loop is
replaced by exact rules. Alternating proposals: Fu et al. (2025), "Fast large language model
collaborative decoding via speculation", ICML (PMLR 267:17764).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from ..result import STATUSES
from ..sampling import rules
from ..sampling.chance import Chance, RowCoins
from .coin import Tosses, go_on_with, toss, toss_for_first, weighed
from .costs import OF_OTHERS, PARENTS, PROPOSING, TURNS, other
from .faults import check_emitted
from .judging import Judged, Rule
from .parents import Parents
from .planner import Plan
from .state import Begun, Draft, Proposal, State, Step, tensor_on


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """What stays the same from round to round.

    Attributes:
        parents: The models and their caches; `read`, `read_on` and `take_back` change these.
        rule: What the output distribution is, and how drafts are judged for it.
        chance: The source of all choices.
        look_up: (rows, how many at most) -> the tokens that followed the last ones earlier.
        ends: (row, its new tokens) -> whether the last of them ends the row; asked once of each.
    """

    parents: Parents
    rule: Rule
    chance: Chance
    look_up: Callable[[Sequence[int], Sequence[int]], list[list[int]]]
    ends: Callable[[int, Sequence[int]], bool]


def decode_round(to: Setting, state: State, plan: Plan) -> tuple[State, Step]:
    """The state after one round, and what was seen in it.

    Args:
        to: The models, the rule and the source of choices.
        state: The texts so far, and what is proposed and not judged yet.
        plan: Who proposes how much.
    """
    # 1. Who proposes, and what. A proposal that is begun may be dropped, unless a coin began it.
    plan = go_on_with(state.pending, plan)
    begun = state.pending if plan.scheme in TURNS else None
    proposal = propose(to, state, plan) if begun is None else go_on(to, state, begun, plan)

    # 2. What the parents make of it. Who proposed knows; who did not reads, in one forward pass.
    reading = [name for name in PARENTS if name != proposal.by]
    counts = reach(state, proposal, plan)
    raw = to.parents.read(reading, state, proposal.tokens[:, : max(counts)], counts)
    log_p = {name: to.rule.parent(state, name, raw[name], proposal.tokens) for name in raw}
    if proposal.log_parent is not None:
        log_p[proposal.by] = proposal.log_parent

    # 3. Where one parent alone looked a position further, its own distribution proposes there.
    beyond = None
    if plan.scheme in TURNS:
        beyond = look_beyond(to, state, proposal, log_p[other(proposal.by)])
        log_p = {name: known[:, : proposal.width] for name, known in log_p.items()}

    # 4. Judge the drafts against q*, and draw the token after those that are kept.
    chance = of_rows(to.chance, state, coins=proposal.counts)
    judged = to.rule.judge(
        state, proposal, log_p["policy"], log_p["teacher"], beyond and beyond[0], chance
    )
    # 5. Keep these; what was rejected is taken back, what was drawn beyond begins a proposal.
    return keep(to, state, plan, proposal, log_p, beyond, judged)


# --- Proposing -----------------------------------------------------------------------------------


def propose(to: Setting, state: State, plan: Plan) -> Proposal:
    """The drafts that a plan asks for; of nobody, and none, if no row has room for one."""
    # A token of q* itself follows a third's drafts, and needs room of its own.
    spare = plan.scheme in OF_OTHERS
    limits = [min(plan.gamma, left - spare) for left in state.left()]
    if max(limits) < 1:
        return nobody(to, state)
    if plan.scheme == "lookup":
        return looked_up(to, state, limits)
    if plan.scheme not in ("one-sided", "draft-model", *TURNS):
        raise NotImplementedError(f"who proposes in a round of {plan.scheme!r}")
    name, weight = "draft" if plan.scheme == "draft-model" else plan.drafter, 1.0
    if plan.stay is not None and len(state.new) == 1:  # in a batch one coin would tie the rows
        name, weight = toss_for_first(to.chance, plan.stay)
    tosses = toss_in(to, state, plan, name, plan.gamma)
    limits = [min(1 + more, limit) for more, limit in zip(tosses.more, limits, strict=True)]
    first, has = to.parents.read([name], state)[name], [True] * len(limits)
    drafts = draft_on(to, state, name, first, None, has, limits)
    return weighed(drafts, has, [weight] * len(has), tosses)


def toss_in(to: Setting, state: State, plan: Plan, name: str, gamma: int) -> Tosses:
    """How many tokens each row's proposal is to have: gamma, or as a coin of its own says."""
    if plan.stay is None:
        return Tosses.none(len(state.rows), gamma)
    most = [min(plan.gamma, left) - 1 for left in state.left()]
    chance = of_rows(to.chance, state, coins=most)
    return toss(chance, most, plan.stay[PARENTS.index(name)])


def nobody(to: Setting, state: State) -> Proposal:
    """No drafts."""
    shape, device = (len(state.rows), 0), to.parents.device
    empty = torch.empty(*shape, to.parents.vocab, device=device)
    tokens = torch.empty(shape, dtype=torch.long, device=device)
    return Proposal("none", tokens, empty, None, (0,) * len(state.rows))


def looked_up(to: Setting, state: State, limits: Sequence[int]) -> Proposal:
    """What followed each row's last tokens where they stood before."""
    vocab, device = to.parents.vocab, to.parents.device
    found = [list(takewhile(vocab.__gt__, tokens)) for tokens in to.look_up(state.rows, limits)]
    widest = max(map(len, found))
    if widest == 0:
        return nobody(to, state)
    padded = [tokens + [0] * (widest - len(tokens)) for tokens in found]
    tokens = tensor_on(device, padded)
    log_draft = rules.log_point_mass(tokens, vocab, dtype=torch.float32)
    return Proposal("lookup", tokens, log_draft, None, tuple(map(len, found)))


def draft_on(
    to: Setting,
    state: State,
    name: str,
    raw: Tensor | None,
    begun: Draft | None,
    has: Sequence[bool],
    limits: Sequence[int],
) -> Proposal:
    """Drafts of one model up to each row's limit, from a distribution or from first tokens.

    Args:
        to: The models, the rule and the source of choices.
        state: The texts so far.
        name: The drafting model, which reads all drafts but the last.
        raw: The distribution of the first draft, from which it is still to be drawn; or
        begun: that draft; rows that do not have one have the last emitted token in its place.
        has: Which rows have a first draft.
        limits: How many drafts each row is to have at most.
    """
    steps = [] if begun is None else [begun]
    most = [limit + (not own) for own, limit in zip(has, limits, strict=True)]
    while len(steps) < max(most):
        more = [int(len(steps) < limit) for limit in most]
        if raw is None:
            raw = to.parents.read_on(name, steps[-1].token, more)
        tails = None
        if steps and to.rule.filters.reads_text:
            # Where a row has no first draft, the first column is in its text already.
            made = torch.stack([step.token for step in steps], -1)
            tails = [made[i, (not own) :] for i, own in enumerate(has)]
        chance = of_rows(to.chance, state, lots=more)
        steps.append(Draft(*to.rule.draw(state, name, raw, tails, chance)))
        raw = None
    tokens = torch.stack([step.token for step in steps], 1)
    log_draft = torch.cat([step.log_draft for step in steps], 1)
    log_parent = torch.cat([step.log_parent for step in steps], 1)
    if not all(has):
        own = tensor_on(tokens.device, has)
        tokens = torch.where(own[:, None], tokens, tokens.roll(-1, 1))
        log_draft = torch.where(own[:, None, None], log_draft, log_draft.roll(-1, 1))
        log_parent = torch.where(own[:, None, None], log_parent, log_parent.roll(-1, 1))
    counts = [
        max(0, min(limit, len(steps) - (not own))) for own, limit in zip(has, limits, strict=True)
    ]
    widest = max(counts)
    return Proposal(
        name,
        tokens[:, :widest],
        log_draft[:, :widest],
        log_parent[:, :widest] if name in PARENTS else None,
        tuple(counts),
    )


def go_on(to: Setting, state: State, begun: Begun, plan: Plan) -> Proposal:
    """The rest of a proposal that is begun; rows whose drafts were rejected have one fewer."""
    tosses = toss_in(to, state, plan, begun.by, begun.gamma)
    limits = [
        min(more + own, left)
        for more, own, left in zip(tosses.more, begun.has, state.left(), strict=True)
    ]
    drafts = draft_on(to, state, begun.by, None, begun.first, begun.has, limits)
    return weighed(drafts, begun.has, begun.weights, tosses)


# --- Reading and keeping -------------------------------------------------------------------------


def reach(state: State, proposal: Proposal, plan: Plan) -> list[int]:
    """How many drafts of each row the reading models read.

    All of them, so that what follows the last is known too; but "one-sided" has no use for that,
    nor has a row that is full with its last draft.
    """
    if plan.scheme == "one-sided":
        return [max(0, count - 1) for count in proposal.counts]
    if plan.scheme in TURNS:
        pairs = zip(proposal.counts, state.left(), strict=True)
        return [min(count, left - 1) for count, left in pairs]
    return list(proposal.counts)


def look_beyond(
    to: Setting, state: State, proposal: Proposal, log_parent: Tensor
) -> tuple[Tensor, Tensor]:
    """What the reading parent's next proposal is drawn from, if a row keeps all its drafts.

    Returns:
        (after the filters, the parent's own). Shape (rows, 1, vocab).
    """
    furthest = log_parent.shape[1] - 1
    at = tensor_on(log_parent.device, [min(count, furthest) for count in proposal.counts])
    own = log_parent.gather(1, at[:, None, None].expand(-1, 1, log_parent.shape[-1]))
    texts = to.rule.texts(state, "policy", own.device, proposal.tokens, proposal.counts)
    return to.rule.of_target(own, texts), own


def keep(
    to: Setting,
    state: State,
    plan: Plan,
    proposal: Proposal,
    log_p: Mapping[str, Tensor],
    beyond: tuple[Tensor, Tensor] | None,
    judged: Judged,
) -> tuple[State, Step]:
    """The texts with what a round settled, and what it did; caches forget what was rejected."""
    seen = fetch(proposal, judged)
    at = time.perf_counter()
    starts = [len(state.new[row]) for row in state.rows]
    new, alive, emitted = list(state.new), [], []
    for place, row in enumerate(state.rows):
        fresh = seen["tokens"][place][: seen["accepted"][place]]
        if judged.exact or seen["accepted"][place] < proposal.counts[place]:
            fresh = [*fresh, seen["next"][place]]
        ended = False
        for n, token in enumerate(fresh):
            new[row] = (*new[row], token)
            if ended := len(new[row]) >= state.limit or to.ends(row, new[row]):
                fresh = fresh[: n + 1]
                break
        emitted.append(fresh)
        alive += [] if ended else [place]
    check_emitted(to.parents, to.rule, state, proposal, log_p, judged.target, seen, emitted)
    settled = [start + kept for start, kept in zip(starts, seen["accepted"], strict=True)]
    to.parents.take_back(state, settled, alive)
    step = Step(
        plan=plan,
        proposer=proposal.by,
        rows=state.rows,
        starts=starts,
        counts=proposal.counts,
        accepted=seen["accepted"],
        tested=seen["tested"],
        emitted=emitted,
        known=judged.known,
        accept={
            name: [
                value
                for row, fresh in zip(seen[f"accept_{name}"].tolist(), emitted, strict=True)
                for value in row[: len(fresh)]
            ]
            for name in PROPOSING
        },
        weights=proposal.weights,
        forwards=to.parents.forwards(),
        at=at,
    )
    rows = tuple(state.rows[place] for place in alive)
    full = [seen["accepted"][place] == proposal.counts[place] for place in alive]
    pending = None
    if beyond is not None and any(full):
        index = tensor_on(to.parents.device, alive)
        drawn = (judged.verdict.next_token, *beyond)
        first = Draft(*(part.index_select(0, index) for part in drawn))
        gamma = plan.gamma if plan.stay is None else 1  # if another plan goes on with it
        after = [proposal.after[place] if proposal.after else 1.0 for place in alive]
        pending = Begun(other(proposal.by), first, tuple(full), gamma, tuple(after))
    return replace(state, new=tuple(new), rows=rows, pending=pending), step


def fetch(proposal: Proposal, judged: Judged) -> dict[str, Any]:
    """All that the host must know of a round, in one transfer: the only wait for the device."""
    undefined = judged.known["minus_log_partition"].isfinite().logical_not()
    suspect = undefined | judged.known["accept_policy"].isnan()
    suspect |= judged.known["accept_teacher"].isnan()
    if proposal.by == "draft" and proposal.width:
        suspect |= proposal.log_draft.amax(-1).isnan().any(-1, keepdim=True)
    wide = {
        "accepted": judged.verdict.accepted.unsqueeze(-1),
        "tested": judged.verdict.tested.unsqueeze(-1),
        "next": judged.verdict.next_token.unsqueeze(-1),
        "tokens": proposal.tokens,
        "disjoint": judged.known["balance.status"] == STATUSES.index("disjoint"),
        "undefined": undefined,
        "suspect": suspect,
        **{f"accept_{name}": judged.known[f"accept_{name}"] for name in PROPOSING},
    }
    flat = torch.cat([part.to(torch.float64) for part in wide.values()], -1).cpu()
    parts = dict(zip(wide, flat.split([p.shape[-1] for p in wide.values()], -1), strict=True))
    seen: dict[str, Any] = dict(parts)
    seen["tokens"] = parts["tokens"].long().tolist()
    for name in ("accepted", "tested", "next"):
        seen[name] = parts[name].squeeze(-1).long().tolist()
    return seen


def of_rows(chance: Chance, state: State, **counts: Sequence[int]) -> Chance:
    """The source of the running rows' choices, of so many `coins` and `lots` of each row."""
    if isinstance(chance, RowCoins):
        return chance.only(list(state.rows), **{k: list(v) for k, v in counts.items()})
    return chance
