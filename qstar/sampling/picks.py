"""Rules for one position: a token of the target from candidates that a draft proposed.

Every rule but `source_loop` is exact, and its tests enumerate the very code that samples.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import check_count
from .chance import NO_TOKEN, Chance, chance_of
from .checks import at, check_dtypes, check_mass, check_values
from .rules import log_acceptance, log_residual


@dataclass(frozen=True, slots=True, eq=False)
class Pick:
    """One token per row, made from candidates at a single position.

    Attributes:
        token: The token. `NO_TOKEN` where a rule that may come up empty (`envelope`) did. Shape
            (*batch).
        accepted: Whether it is one of the candidates, rather than drawn afresh. Shape (*batch).
        tested: How many candidates were looked at: the accepted one and those before it. The
            acceptance rate of a single candidate is sum(accepted) / sum(tested). Shape (*batch).
    """

    token: Tensor
    accepted: Tensor
    tested: Tensor


def draw_candidates(
    log_draft: Tensor,
    num_candidates: int,
    *,
    replacement: bool,
    generator: torch.Generator | Chance,
) -> Tensor:
    """Candidates for one position, in the order in which they were drawn.

    Without replacement each is drawn from what the earlier ones left of the draft. Where the draft
    has fewer outcomes than that, the rest is `NO_TOKEN`: `torch.multinomial` returns tokens of no
    mass there, without a word.
    """
    chance = chance_of(generator)
    candidates = []
    left = log_draft
    for _ in range(check_count("num_candidates", num_candidates, least=0)):
        if replacement:
            candidates.append(chance.draw(log_draft))
            continue
        exhausted = (left == -torch.inf).all(-1)
        token = chance.draw(torch.where(exhausted.unsqueeze(-1), log_draft, left))
        candidates.append(token.masked_fill(exhausted, NO_TOKEN))
        left = _without(left, candidates[-1])
    if not candidates:
        return torch.empty((*log_draft.shape[:-1], 0), dtype=torch.int64, device=log_draft.device)
    return torch.stack(candidates, dim=-1)


def accept_or_redraw(
    candidates: Tensor,
    log_draft: Tensor,
    log_target: Tensor,
    *,
    replacement: bool = True,
    generator: torch.Generator | Chance,
    check: bool | None = None,
) -> Pick:
    """Keep a candidate with probability min(1, target / draft), else go on with the residual.

    With one candidate this is the rule of speculative sampling, accepted with probability
    1 - TV(draft, target), the most that an exact rule can reach. With more, each rejected candidate
    turns the target into the residual, against which the next one is tested; when all are rejected
    the last residual is drawn from. Exact by induction, since min(draft, target) + P(rejected) *
    residual = target, whatever the rejected candidate was.

    Args:
        candidates: Drawn by `draw_candidates` from `log_draft`. Shape (*batch, num_candidates).
        log_draft: The draft's log-probabilities. Shape (*batch, vocab).
        log_target: The target's. Shape (*batch, vocab).
        replacement: How the candidates were drawn. Without replacement, the i-th is judged by
            what the earlier ones left of the draft.
        generator: The only source of randomness.
        check: Whether to look at values; see `verify`.

    Raises:
        ValueError: As `verify`.

    Source: Leviathan et al. (2023), arXiv:2211.17192, appendix A.1; several candidates: Miao et al.
        (2023), arXiv:2305.09781; without replacement: Jeon et al. (2024), arXiv:2402.14160.
    """
    _check_single("accept_or_redraw", candidates, log_draft, log_target, check)
    chance = chance_of(generator)
    pick = _nothing_picked(candidates)
    for token in candidates.unbind(-1):
        exists = token != NO_TOKEN
        log_accept = log_acceptance(at(log_draft, token), at(log_target, token))
        kept = chance.keep(log_accept.masked_fill(exists.logical_not(), -torch.inf))
        pick = _consider(pick, token, kept & exists, exists)
        rejected = (exists & kept.logical_not()).unsqueeze(-1)
        log_target = torch.where(rejected, log_residual(log_draft, log_target), log_target)
        if not replacement:
            log_draft = _without(log_draft, token)
    return _settle(pick, chance.draw(log_target))


def von_neumann(
    candidates: Tensor,
    log_draft: Tensor,
    log_target: Tensor,
    *,
    generator: torch.Generator | Chance,
    check: bool | None = None,
) -> Pick:
    """Classical rejection: keep a candidate with probability target / (M draft), else the target.

    M is the largest ratio target / draft of the row. An accepted candidate follows the target, so
    that after any number of rejections a draw from the target itself is right too. Each candidate
    is accepted with probability 1/M; where the draft lacks an outcome of the target, with none.

    Args:
        candidates: Drawn with replacement. Shape (*batch, num_candidates).
        log_draft: As the others, see `accept_or_redraw`, which has the same errors.
        log_target: The target's log-probabilities.
        generator: The only source of randomness.
        check: Whether to look at values.

    Source: von Neumann (1951), "Various techniques used in connection with random digits".
    """
    _check_single("von_neumann", candidates, log_draft, log_target, check)
    chance = chance_of(generator)
    has_mass = log_target > -torch.inf
    log_bound = torch.where(has_mass, log_target - log_draft, -torch.inf).amax(-1)
    pick = _nothing_picked(candidates)
    for token in candidates.unbind(-1):
        log_accept = at(log_target, token) - at(log_draft, token) - log_bound
        impossible = (at(log_target, token) == -torch.inf) | (log_bound == torch.inf)
        kept = chance.keep(log_accept.clamp(max=0).masked_fill(impossible, -torch.inf))
        pick = _consider(pick, token, kept, torch.ones_like(kept))
    return _settle(pick, chance.draw(log_target))


def source_loop(
    candidates: Tensor,
    log_draft: Tensor,
    log_target: Tensor,
    *,
    generator: torch.Generator | Chance,
    check: bool | None = None,
) -> Pick:
    """BIASED, an exhibit: the loop that the source analysis prints. Do not sample with it.

    It keeps a candidate with probability min(1, target / draft), and after the last rejection it
    draws from the target, where `accept_or_redraw` draws from the residual: what target and draft
    share is counted twice. Its distribution is `qstar.theory.acceptance.source_loop_distribution`.

    Args:
        candidates: Drawn from `log_draft`, with replacement or (as the source's code does it)
            without. Shape (*batch, num_candidates).
        log_draft: The draft's log-probabilities. The source divides by these also for the later
            candidates of a draw without replacement, whose distribution they are not. Shape
            (*batch, vocab).
        log_target: The target's. Shape (*batch, vocab).
        generator: The only source of randomness.
        check: Whether to look at values.

    Source: the analysis, problem 1, "关键代码片段".
    """
    _check_single("source_loop", candidates, log_draft, log_target, check)
    chance = chance_of(generator)
    pick = _nothing_picked(candidates)
    for token in candidates.unbind(-1):
        exists = token != NO_TOKEN
        log_accept = log_acceptance(at(log_draft, token), at(log_target, token))
        kept = chance.keep(log_accept.masked_fill(exists.logical_not(), -torch.inf))
        pick = _consider(pick, token, kept & exists, exists)
    return _settle(pick, chance.draw(log_target))


def envelope(
    log_policy: Tensor, log_teacher: Tensor, alpha: Tensor, *, generator: torch.Generator | Chance
) -> Pick:
    """One try at a token of q_alpha that needs neither a bound M nor the log-partition.

    Draw from the mixture alpha policy + (1 - alpha) teacher (that is: choose a parent, draw from
    it), and keep the token with probability policy^alpha teacher^(1-alpha) over the mixture, which
    the inequality of the means holds at or below 1. A kept token follows q_alpha exactly; it is
    kept with probability Z(alpha), which is exp(-C) at alpha*.

    Where nothing was kept the token is `NO_TOKEN`: try again. The rule looks at both parents at the
    drawn token only, and so serves continuous distributions and whole sequences as well
    (`log_envelope_acceptance`).
    """
    chance = chance_of(generator)
    alpha = torch.as_tensor(alpha, dtype=log_policy.dtype, device=log_policy.device)
    alpha = alpha.expand(log_policy.shape[:-1])
    from_policy = chance.keep(alpha.log())
    token = chance.draw(torch.where(from_policy.unsqueeze(-1), log_policy, log_teacher))
    log_accept = log_envelope_acceptance(at(log_policy, token), at(log_teacher, token), alpha)
    kept = chance.keep(log_accept)
    return Pick(token.masked_fill(kept.logical_not(), NO_TOKEN), kept, torch.ones_like(token))


def log_envelope_acceptance(log_policy: Tensor, log_teacher: Tensor, alpha: Tensor) -> Tensor:
    """log of policy^alpha teacher^(1-alpha) / (alpha policy + (1 - alpha) teacher), at one outcome.

    The outcome may be a token or a whole sequence: the log-probabilities are then sums. -inf where
    one of the parents has no mass.
    """
    log_mixture = torch.logaddexp(alpha.log() + log_policy, (-alpha).log1p() + log_teacher)
    shared = (log_policy > -torch.inf) & (log_teacher > -torch.inf)
    log_ratio = alpha * log_policy + (1 - alpha) * log_teacher - log_mixture
    return torch.where(shared, log_ratio.clamp(max=0), -torch.inf)


def _without(log_draft: Tensor, token: Tensor) -> Tensor:
    """The draft given that it is not this token; all -inf when nothing is left."""
    columns = torch.arange(log_draft.shape[-1], device=log_draft.device)
    left = log_draft.masked_fill(columns == token.unsqueeze(-1), -torch.inf)
    log_total = left.logsumexp(-1, keepdim=True)
    return torch.where(log_total > -torch.inf, left - log_total, left)


def _nothing_picked(candidates: Tensor) -> Pick:
    shape = candidates.shape[:-1]
    token = candidates.new_full(shape, NO_TOKEN)
    return Pick(token, torch.zeros_like(token, dtype=torch.bool), torch.zeros_like(token))


def _consider(pick: Pick, token: Tensor, kept: Tensor, exists: Tensor) -> Pick:
    """The pick after one more candidate, which counts only where none was accepted before."""
    return Pick(
        torch.where(pick.accepted | kept.logical_not(), pick.token, token),
        pick.accepted | kept,
        pick.tested + (exists & pick.accepted.logical_not()),
    )


def _settle(pick: Pick, redrawn: Tensor) -> Pick:
    """The pick, with the redrawn token where every candidate was rejected."""
    return Pick(torch.where(pick.accepted, pick.token, redrawn), pick.accepted, pick.tested)


def _check_single(
    rule: str, candidates: Tensor, log_draft: Tensor, log_target: Tensor, check: bool | None
) -> None:
    check_dtypes(rule, log_draft, log_target)
    if log_draft.shape != log_target.shape or candidates.shape[:-1] != log_draft.shape[:-1]:
        raise ValueError(
            f"{rule} needs one row of the draft and one of the target per row of candidates: got "
            f"candidates {tuple(candidates.shape)}, log_draft {tuple(log_draft.shape)}, log_target "
            f"{tuple(log_target.shape)}; expected [*batch, num_candidates], [*batch, vocab] twice."
        )
    if check if check is not None else candidates.device.type == "cpu":
        check_values(log_draft, "log_draft")
        check_values(log_target, "log_target")
        rows = log_draft.unsqueeze(-2).expand(*candidates.shape, log_draft.shape[-1])
        check_mass(candidates, rows, candidates != NO_TOKEN)
