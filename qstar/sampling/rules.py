"""Rules that turn draft tokens into tokens of the target, on log-probabilities: no model in sight.

`target` is the distribution that the output must follow (here q*), `draft` the one that proposed.
Neither is called p or q: the papers disagree on which is which. Every rule is exact (the source's
loop, which is not, is in `qstar.sampling.picks`), and its tests enumerate the very code that
samples (see `qstar.sampling.enumeration`).

Batches: leading axes are independent rows, and a rejection in one row costs the others nothing.
Randomness: a `generator` as in `qstar.sampling.chance`. A call uses the same amount of it whatever
the outcome, and never waits for the device unless `check` asks it to. Support: -inf is a value. A
token of no mass under the target is never returned.

What judged a draft must be the distribution that it was drawn from: filter (temperature, top-k,
top-p) once, draw from the filtered log-probabilities and pass the same tensor on.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .chance import NO_TOKEN, Chance, chance_of
from .checks import at, check_dtypes, check_mass, check_values, positions


@dataclass(frozen=True, slots=True, eq=False)
class Round:
    """What one round of drafting gained, per row.

    Attributes:
        tokens: The accepted draft tokens, then the next token, then `NO_TOKEN`. The row emits
            `accepted + 1` tokens. Shape (*batch, gamma+1).
        accepted: How many draft tokens were kept, from none to all. Shape (*batch).
        tested: How many were looked at. Token by token (`verify`) that is `accepted`, and one more
            if the round ended in a rejection; the acceptance rate is then sum(accepted) /
            sum(tested), an estimate of the acceptance probability. A block (`verify_block`) is
            looked at whole. Shape (*batch).
        next_token: The token after the accepted ones, drawn by the rule. Shape (*batch).
    """

    tokens: Tensor
    accepted: Tensor
    tested: Tensor
    next_token: Tensor


def log_acceptance(log_draft: Tensor, log_target: Tensor) -> Tensor:
    """log min(1, target / draft): the chance of keeping a drafted token, in nats.

    -inf where the target has no mass, whatever the draft says.
    """
    ratio = (log_target - log_draft).clamp(max=0)
    return ratio.masked_fill(log_target == -torch.inf, -torch.inf)


def log_residual(log_draft: Tensor, log_target: Tensor) -> Tensor:
    """What a rejected position is redrawn from: max(0, target - draft), normalised, in logs.

    A row of -inf as the draft stands for no draft at all: the residual is the target. So it is
    where draft and target are equal, which are never rejected save by rounding.
    """
    log_excess = _log_excess(log_draft, log_target)
    some = log_excess.amax(-1, keepdim=True) > -torch.inf
    return torch.where(some, log_excess.log_softmax(-1), log_target)


def draw(log_p: Tensor, *, generator: torch.Generator | Chance) -> Tensor:
    """One token from each row of log-probabilities; `NO_TOKEN` from a row of no mass, or of nan."""
    return chance_of(generator).draw(log_p)


def verify(
    draft_tokens: Tensor,
    log_draft: Tensor,
    log_target: Tensor,
    *,
    generator: torch.Generator | Chance,
    drafted: Tensor | None = None,
    check: bool | None = None,
) -> Round:
    """Keep the longest draft prefix that the target allows, and add one token of the target's own.

    Args:
        draft_tokens: The proposal, each drawn from its row of `log_draft`. Shape (*batch, gamma).
        log_draft: The draft's log-probabilities at each proposed position, after every filter that
            was in force when it was drawn; float32 or float64. Shape (*batch, gamma, vocab).
        log_target: The target's, at the same positions and one beyond. Shape (*batch, gamma+1,
            vocab).
        generator: The only source of randomness.
        drafted: How many of a row's draft tokens are real, from 0 to gamma; all of them if not
            given. The others are ignored, so that rows may draft more and less. Shape (*batch).
        check: Whether to look at values, which waits for the device: by default only on the CPU.

    Returns:
        The `Round`; the tokens that it emits follow the target's distribution exactly.

    Raises:
        ValueError: Shapes or dtypes do not fit, gamma+1 rows of the target included; and, with
            `check`, a distribution is not normalised or a draft token has no mass under its draft.

    Source: Leviathan et al. (2023), arXiv:2211.17192, algorithm 1; Chen et al. (2023),
        arXiv:2302.01318, theorem 1.
    """
    drafted = _check_round("verify", draft_tokens, log_draft, log_target, drafted, check)
    chance = chance_of(generator)
    gamma = draft_tokens.shape[-1]
    accepted = torch.zeros_like(drafted)
    if gamma > 0:
        real = positions(draft_tokens) < drafted.unsqueeze(-1)
        log_accept = log_acceptance(
            at(log_draft, draft_tokens), at(log_target.narrow(-2, 0, gamma), draft_tokens)
        )
        kept = chance.keep(log_accept.masked_fill(real.logical_not(), -torch.inf))
        accepted = kept.long().cumprod(-1).sum(-1)  # the leading run of kept tokens
    tested = torch.minimum(accepted + 1, drafted)
    zero = log_target.new_zeros(accepted.shape)
    return _close_round(
        draft_tokens, log_draft, log_target, drafted, accepted, tested, zero, chance
    )


def verify_block(
    draft_tokens: Tensor,
    log_draft: Tensor,
    log_target: Tensor,
    *,
    generator: torch.Generator | Chance,
    drafted: Tensor | None = None,
    check: bool | None = None,
) -> Round:
    """As `verify`, judging the block as a whole: exact too, and accepts at least as many.

    Let w_0 = 1 and w_i = min(1, w_(i-1) target / draft) at the i-th draft token. A prefix of i
    tokens is a candidate to be kept with probability h_i = S_i / (S_i + 1 - w_i), where S_i is the
    total of max(0, w_i target - draft) at the position after it; the whole block with w_gamma. The
    longest candidate wins; the next token comes from max(0, w_i target - draft), normalised, or
    from the target after the whole block. Then P(at least i tokens kept | the first i) = w_i, by
    induction from the end, because the mean of w_(i+1) is w_i - S_i, and S_i + 1 - w_i is the
    chance that no longer prefix is kept. Token by token, that probability is the product of the
    min(1, ratio), which is never larger.

    Here a high ratio early in the block makes up for a low one later; with one draft token the two
    rules are the same. `tested` is all of the drafted tokens: `accepted / tested` is no estimate of
    an acceptance probability.

    Args, errors: as `verify`.

    Source: Sun et al. (2025), arXiv:2403.10444, "Block verification".
    """
    drafted = _check_round("verify_block", draft_tokens, log_draft, log_target, drafted, check)
    chance = chance_of(generator)
    gamma = draft_tokens.shape[-1]
    log_ratio = _log_ratio(
        at(log_draft, draft_tokens), at(log_target.narrow(-2, 0, gamma), draft_tokens)
    )
    log_weight = log_target.new_zeros(drafted.shape)
    log_weights = [log_weight]
    log_keep = []
    for position in range(1, gamma + 1):
        log_weight = (log_weight + log_ratio.select(-1, position - 1)).clamp(max=0)
        log_weights.append(log_weight)
        log_keep.append(
            log_weight
            if position == gamma
            else torch.where(
                drafted == position,
                log_weight,
                _log_block_keep(
                    log_draft.select(-2, position), log_target.select(-2, position), log_weight
                ),
            )
        )
    accepted = torch.zeros_like(drafted)
    if gamma > 0:
        real = positions(draft_tokens) < drafted.unsqueeze(-1)
        kept = chance.keep(torch.stack(log_keep, -1).masked_fill(real.logical_not(), -torch.inf))
        accepted = (kept * (positions(draft_tokens) + 1)).amax(-1)  # the last one kept
    log_scale = torch.stack(log_weights, -1).gather(-1, accepted.unsqueeze(-1)).squeeze(-1)
    return _close_round(
        draft_tokens, log_draft, log_target, drafted, accepted, drafted, log_scale, chance
    )


def log_point_mass(tokens: Tensor, vocab: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The distribution of a draft that was not drawn but looked up: all mass on the given token.

    With it, `verify` keeps a looked-up token (an n-gram match, a greedy draft) with the target's
    own probability of it.
    """
    log_p = torch.full((*tokens.shape, vocab), -torch.inf, dtype=dtype, device=tokens.device)
    return log_p.scatter(-1, tokens.unsqueeze(-1), 0.0)


def _log_ratio(log_draft: Tensor, log_target: Tensor) -> Tensor:
    """log target / draft at drafted tokens, never +inf; -inf where the target has no mass."""
    ratio = (log_target - log_draft).clamp(max=torch.finfo(log_target.dtype).max)
    return ratio.masked_fill(log_target == -torch.inf, -torch.inf)


def _log_excess(log_draft: Tensor, log_target: Tensor) -> Tensor:
    """log max(0, target - draft), without leaving logs: no cancellation, no underflow."""
    # No -inf under the draft: where the target has no mass there is no excess, not -inf - -inf.
    held = log_draft.clamp(min=torch.finfo(log_draft.dtype).min)
    below = (held - log_target).clamp_(max=0)
    share = below.expm1().neg_().clamp_(min=torch.finfo(below.dtype).tiny)  # log(0) takes long
    return share.log_().add_(log_target).masked_fill_(below == 0, -torch.inf)


def _row_at(log_rows: Tensor, index: Tensor) -> Tensor:
    """One of each batch's rows. Shapes (*batch, rows, vocab), (*batch) -> (*batch, vocab)."""
    rows, vocab = log_rows.shape[-2:]
    first = torch.arange(index.numel(), device=index.device) * rows
    flat = log_rows.reshape(index.numel() * rows, vocab)
    return flat.index_select(0, first + index.flatten()).reshape(*index.shape, vocab)


def _log_block_keep(log_draft: Tensor, log_target: Tensor, log_weight: Tensor) -> Tensor:
    """log h of `verify_block`; where 0/0 (the rest is surely kept) never asked for: -inf."""
    log_total = _log_excess(log_draft, log_target + log_weight.unsqueeze(-1)).logsumexp(-1)
    log_missing = (-log_weight.expm1()).log()
    log_keep = log_total - torch.logaddexp(log_total, log_missing)
    return log_keep.masked_fill(log_total == -torch.inf, -torch.inf)


def _close_round(
    draft_tokens: Tensor,
    log_draft: Tensor,
    log_target: Tensor,
    drafted: Tensor,
    accepted: Tensor,
    tested: Tensor,
    log_scale: Tensor,
    chance: Chance,
) -> Round:
    """Draw the next token at each row's own position, and line the round's tokens up."""
    gamma = draft_tokens.shape[-1]
    if gamma == 0:
        next_token = chance.draw(log_target.squeeze(-2))
        return Round(next_token.unsqueeze(-1), accepted, tested, next_token)
    log_next = target_here = _row_at(log_target, accepted)
    some = accepted < drafted
    if not some.is_cpu or bool(some.any()):
        draft_here = _row_at(log_draft, accepted.clamp(max=gamma - 1))
        log_excess = _log_excess(draft_here, target_here + log_scale.unsqueeze(-1))
        # After a fully accepted draft there is none to subtract: the target itself.
        rejected = some & (log_excess.amax(-1) > -torch.inf)
        log_next = torch.where(rejected.unsqueeze(-1), log_excess.log_softmax(-1), target_here)
    next_token = chance.draw(log_next)
    padded = torch.cat([draft_tokens, torch.full_like(next_token.unsqueeze(-1), NO_TOKEN)], -1)
    beyond = positions(padded) >= accepted.unsqueeze(-1)
    tokens = padded.masked_fill(beyond, NO_TOKEN)
    tokens = tokens.scatter(-1, accepted.unsqueeze(-1), next_token.unsqueeze(-1))
    return Round(tokens, accepted, tested, next_token)


def _check_round(
    rule: str,
    draft_tokens: Tensor,
    log_draft: Tensor,
    log_target: Tensor,
    drafted: Tensor | None,
    check: bool | None,
) -> Tensor:
    """The number of real draft tokens per row, once the arguments fit together."""
    check_dtypes(rule, log_draft, log_target)
    *batch, gamma = draft_tokens.shape
    vocab = log_target.shape[-1]
    expected = (*batch, gamma, vocab), (*batch, gamma + 1, vocab)
    if (tuple(log_draft.shape), tuple(log_target.shape)) != expected:
        raise ValueError(
            f"{rule} needs a draft row per draft token, and a target row more: for draft_tokens "
            f"{tuple(draft_tokens.shape)} expected log_draft {expected[0]} and log_target "
            f"{expected[1]}, got {tuple(log_draft.shape)} and {tuple(log_target.shape)}."
        )
    if drafted is None:
        drafted = draft_tokens.new_full(batch, gamma)
    elif tuple(drafted.shape) != tuple(batch):
        raise ValueError(
            f"drafted counts the real draft tokens of each row: expected shape {tuple(batch)}, "
            f"got {tuple(drafted.shape)}."
        )
    if check if check is not None else draft_tokens.device.type == "cpu":
        if ((drafted < 0) | (drafted > gamma)).any():
            raise ValueError(
                f"drafted must lie between 0 and gamma = {gamma}: got {drafted.tolist()}."
            )
        real = positions(draft_tokens) < drafted.unsqueeze(-1)
        check_values(log_draft, "log_draft", real)
        beyond = torch.arange(gamma + 1, device=drafted.device) <= drafted.unsqueeze(-1)
        check_values(log_target, "log_target", beyond)
        check_mass(draft_tokens, log_draft, real)
    return drafted
