"""Rules that turn draft tokens into tokens of the target, on log-probabilities: no model in sight.

`target` is the law that the output must follow (here q*), `draft` the one that proposed. Neither
is called p or q: the papers disagree on which is which. Every rule but `source_loop` is exact, and
its tests enumerate the very code that samples (see `qstar.sampling.enumeration`).

Batches: leading axes are independent rows, and a rejection in one row costs the others nothing.
Randomness: `generator` is a `torch.Generator` on any device (a CPU generator serves tensors on an
accelerator), or anything that can `keep` and `draw` as `Chance` does. A call uses the same amount
of randomness whatever the outcome, and never waits for the device unless `check` asks it to.
Support: -inf is a value. A token of no mass under the target is never returned.

What judged a draft must be the law that it was drawn from: filter (temperature, top-k, top-p) once,
draw from the filtered log-probabilities and pass the same tensor on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ..arguments import check_count

NO_TOKEN = -1
"""Stands where there is no token: past the end of a round, or when a draft has run out of them."""

NORMALISATION_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""How far a row's probabilities may sum from 1 where laws are checked."""


@runtime_checkable
class Chance(Protocol):
    """A source of the two kinds of choice that the rules make.

    `Coins` makes them at random; `qstar.sampling.enumeration` makes every one of them in turn.
    """

    def keep(self, log_probability: Tensor) -> Tensor:
        """True with the given probability, independently in every entry."""

    def draw(self, log_law: Tensor) -> Tensor:
        """One token from each row of log-probabilities, independently."""


class _Numbers:
    """Choices made by uniform numbers in double precision, one for each."""

    __slots__ = ()

    def keep(self, log_probability: Tensor) -> Tensor:
        """True with the given probability: never at -inf (or nan), always at 0."""
        return self._coins(log_probability) < log_probability.double().exp()

    def draw(self, log_law: Tensor) -> Tensor:
        """The inverse distribution function at a uniform number; never a token of no mass.

        `NO_TOKEN` where a row has no token to give: all -inf, or nan. In double precision whatever
        the dtype of the row: with single precision, tokens rarer than 2^-24 would come too often or
        not at all.
        """
        law = log_law.double().exp()
        # Only tokens with mass can be hit, also where a parallel sum is not quite monotone.
        cumulative = law.cumsum(-1).masked_fill(law == 0, -torch.inf)
        total = cumulative.amax(-1)
        threshold = (self._lots(total) * total).unsqueeze(-1)
        above = cumulative > threshold
        token = above.to(torch.uint8).argmax(-1)
        return torch.where(above.any(-1), token, NO_TOKEN)

    def _coins(self, like: Tensor) -> Tensor:
        """Uniform numbers in [0, 1) to keep tokens by, in the shape of `like`."""
        raise NotImplementedError

    def _lots(self, like: Tensor) -> Tensor:
        """The same to draw tokens by."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Coins(_Numbers):
    """Choices made at random, one uniform number in double precision for each.

    Attributes:
        generator: The only source of randomness; on the CPU or on the tensors' own device.
    """

    generator: torch.Generator

    def _coins(self, like: Tensor) -> Tensor:
        uniform = torch.rand(
            like.shape,
            generator=self.generator,
            dtype=torch.float64,
            device=self.generator.device,
        )
        return uniform.to(like.device, non_blocking=True)

    _lots = _coins


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

    def _coins(self, like: Tensor) -> Tensor:
        return self._numbers(like, self.coins)

    def _lots(self, like: Tensor) -> Tensor:
        return self._numbers(like, self.lots)

    def _numbers(self, like: Tensor, counts: Sequence[int] | None) -> Tensor:
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


def log_residual(
    log_draft: Tensor,
    log_target: Tensor,
) -> Tensor:
    """What a rejected position is redrawn from: max(0, target - draft), normalised, in logs.

    A row of -inf as the draft stands for no draft at all: the residual is the target. So it is
    where draft and target are equal, which are never rejected save by rounding.
    """
    log_excess = _log_excess(log_draft, log_target)
    log_total = log_excess.logsumexp(-1, keepdim=True)
    return torch.where(log_total > -torch.inf, log_excess - log_total, log_target)


def draw(log_law: Tensor, *, generator: torch.Generator | Chance) -> Tensor:
    """One token from each row of log-probabilities; `NO_TOKEN` from a row of no mass, or of nan."""
    return _chance(generator).draw(log_law)


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
    chance = _chance(generator)
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
    chance = _chance(generator)
    pick = _nothing_picked(candidates)
    for token in candidates.unbind(-1):
        exists = token != NO_TOKEN
        log_accept = log_acceptance(_at(log_draft, token), _at(log_target, token))
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
        candidates: Drawn independently (with replacement) from `log_draft`. Shape (*batch,
            num_candidates).
        log_draft: The draft's log-probabilities. Shape (*batch, vocab).
        log_target: The target's. Shape (*batch, vocab).
        generator: The only source of randomness.
        check: Whether to look at values; see `verify`.

    Raises:
        ValueError: As `verify`.

    Source: von Neumann (1951), "Various techniques used in connection with random digits".
    """
    _check_single("von_neumann", candidates, log_draft, log_target, check)
    chance = _chance(generator)
    has_mass = log_target > -torch.inf
    log_bound = torch.where(has_mass, log_target - log_draft, -torch.inf).amax(-1)
    pick = _nothing_picked(candidates)
    for token in candidates.unbind(-1):
        log_accept = _at(log_target, token) - _at(log_draft, token) - log_bound
        impossible = (_at(log_target, token) == -torch.inf) | (log_bound == torch.inf)
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
    share is counted twice. Its law is `qstar.theory.acceptance.source_loop_law`.

    Args:
        candidates: Drawn from `log_draft`, with replacement or (as the source's code does it)
            without. Shape (*batch, num_candidates).
        log_draft: The draft's log-probabilities. The source divides by these also for the later
            candidates of a draw without replacement, whose law they are not. Shape (*batch, vocab).
        log_target: The target's. Shape (*batch, vocab).
        generator: The only source of randomness.
        check: Whether to look at values; see `verify`.

    Raises:
        ValueError: As `verify`.

    Source: the analysis, problem 1, "关键代码片段".
    """
    _check_single("source_loop", candidates, log_draft, log_target, check)
    chance = _chance(generator)
    pick = _nothing_picked(candidates)
    for token in candidates.unbind(-1):
        exists = token != NO_TOKEN
        log_accept = log_acceptance(_at(log_draft, token), _at(log_target, token))
        kept = chance.keep(log_accept.masked_fill(exists.logical_not(), -torch.inf))
        pick = _consider(pick, token, kept & exists, exists)
    return _settle(pick, chance.draw(log_target))


def envelope(
    log_policy: Tensor,
    log_teacher: Tensor,
    alpha: Tensor,
    *,
    generator: torch.Generator | Chance,
) -> Pick:
    """One try at a token of q_alpha that needs neither a bound M nor the log-partition.

    Draw from the mixture alpha policy + (1 - alpha) teacher (that is: choose a parent, draw from
    it), and keep the token with probability policy^alpha teacher^(1-alpha) over the mixture, which
    the inequality of the means holds at or below 1. A kept token follows q_alpha exactly; it is
    kept with probability Z(alpha), which is exp(-C) at alpha*.

    Where nothing was kept the token is `NO_TOKEN`: try again. The rule looks at both parents at the
    drawn token only, and so serves continuous laws and whole sequences as well
    (`log_envelope_acceptance`).
    """
    chance = _chance(generator)
    alpha = torch.as_tensor(alpha, dtype=log_policy.dtype, device=log_policy.device)
    alpha = alpha.expand(log_policy.shape[:-1])
    from_policy = chance.keep(alpha.log())
    token = chance.draw(torch.where(from_policy.unsqueeze(-1), log_policy, log_teacher))
    log_accept = log_envelope_acceptance(_at(log_policy, token), _at(log_teacher, token), alpha)
    kept = chance.keep(log_accept)
    return Pick(token.masked_fill(kept.logical_not(), NO_TOKEN), kept, torch.ones_like(token))


def log_envelope_acceptance(
    log_policy: Tensor,
    log_teacher: Tensor,
    alpha: Tensor,
) -> Tensor:
    """log of policy^alpha teacher^(1-alpha) / (alpha policy + (1 - alpha) teacher), at one outcome.

    The outcome may be a token or a whole sequence: the log-probabilities are then sums. -inf where
    one of the parents has no mass.
    """
    log_mixture = torch.logaddexp(alpha.log() + log_policy, (-alpha).log1p() + log_teacher)
    shared = (log_policy > -torch.inf) & (log_teacher > -torch.inf)
    log_ratio = alpha * log_policy + (1 - alpha) * log_teacher - log_mixture
    return torch.where(shared, log_ratio.clamp(max=0), -torch.inf)


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
        The `Round`; the tokens that it emits follow the target's law exactly.

    Raises:
        ValueError: Shapes or dtypes do not fit, gamma+1 rows of the target included; and, with
            `check`, a law is not normalised or a draft token has no mass under its draft.

    Source: Leviathan et al. (2023), arXiv:2211.17192, algorithm 1; Chen et al. (2023),
        arXiv:2302.01318, theorem 1.
    """
    drafted = _check_round("verify", draft_tokens, log_draft, log_target, drafted, check)
    chance = _chance(generator)
    gamma = draft_tokens.shape[-1]
    real = _positions(draft_tokens) < drafted.unsqueeze(-1)
    log_accept = log_acceptance(
        _at(log_draft, draft_tokens), _at(log_target.narrow(-2, 0, gamma), draft_tokens)
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
    chance = _chance(generator)
    gamma = draft_tokens.shape[-1]
    log_ratio = _log_ratio(
        _at(log_draft, draft_tokens), _at(log_target.narrow(-2, 0, gamma), draft_tokens)
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
        real = _positions(draft_tokens) < drafted.unsqueeze(-1)
        kept = chance.keep(torch.stack(log_keep, -1).masked_fill(real.logical_not(), -torch.inf))
        accepted = (kept * (_positions(draft_tokens) + 1)).amax(-1)  # the last one kept
    log_scale = torch.stack(log_weights, -1).gather(-1, accepted.unsqueeze(-1)).squeeze(-1)
    return _close_round(
        draft_tokens, log_draft, log_target, drafted, accepted, drafted, log_scale, chance
    )


def log_point_mass(tokens: Tensor, vocab: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The law of a draft that was not drawn but looked up: all mass on the given token.

    With it, `verify` keeps a looked-up token (an n-gram match, a greedy draft) with the target's
    own probability of it.
    """
    law = torch.full((*tokens.shape, vocab), -torch.inf, dtype=dtype, device=tokens.device)
    return law.scatter(-1, tokens.unsqueeze(-1), 0.0)


def _chance(generator: torch.Generator | Chance) -> Chance:
    return Coins(generator) if isinstance(generator, torch.Generator) else generator


def _at(log_law: Tensor, token: Tensor) -> Tensor:
    """The log-probability of each token; `NO_TOKEN` reads entry 0, which the caller discards."""
    return log_law.gather(-1, token.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def _positions(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[-1], device=tokens.device)


def _log_ratio(log_draft: Tensor, log_target: Tensor) -> Tensor:
    """log target / draft at drafted tokens, never +inf; -inf where the target has no mass."""
    ratio = (log_target - log_draft).clamp(max=torch.finfo(log_target.dtype).max)
    return ratio.masked_fill(log_target == -torch.inf, -torch.inf)


def _log_excess(log_draft: Tensor, log_target: Tensor) -> Tensor:
    """log max(0, target - draft), without leaving logs: no cancellation, no underflow."""
    below = (log_draft - log_target).clamp(max=0)
    below = below.masked_fill(log_target == -torch.inf, 0)  # -inf - -inf: no excess there
    return log_target + (-below.expm1()).log()


def _log_block_keep(
    log_draft: Tensor,
    log_target: Tensor,
    log_weight: Tensor,
) -> Tensor:
    """log h of `verify_block`; where 0/0 (the rest is surely kept) never asked for: -inf."""
    log_total = _log_excess(log_draft, log_target + log_weight.unsqueeze(-1)).logsumexp(-1)
    log_missing = (-log_weight.expm1()).log()
    log_keep = log_total - torch.logaddexp(log_total, log_missing)
    return log_keep.masked_fill(log_total == -torch.inf, -torch.inf)


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
    gamma, vocab = draft_tokens.shape[-1], log_target.shape[-1]
    row = accepted.reshape(*accepted.shape, 1, 1).expand(*accepted.shape, 1, vocab)
    target_here = log_target.gather(-2, row).squeeze(-2)
    law = target_here
    if gamma > 0:
        draft_here = log_draft.gather(-2, row.clamp(max=gamma - 1)).squeeze(-2)
        # After a fully accepted draft there is none to subtract: the target itself.
        draft_here = draft_here.masked_fill((accepted == drafted).unsqueeze(-1), -torch.inf)
        log_excess = _log_excess(draft_here, target_here + log_scale.unsqueeze(-1))
        log_total = log_excess.logsumexp(-1, keepdim=True)
        law = torch.where(log_total > -torch.inf, log_excess - log_total, target_here)
    next_token = chance.draw(law)
    padded = torch.cat([draft_tokens, torch.full_like(next_token.unsqueeze(-1), NO_TOKEN)], -1)
    beyond = _positions(padded) >= accepted.unsqueeze(-1)
    tokens = padded.masked_fill(beyond, NO_TOKEN)
    tokens = tokens.scatter(-1, accepted.unsqueeze(-1), next_token.unsqueeze(-1))
    return Round(tokens, accepted, tested, next_token)


def _check_single(
    rule: str, candidates: Tensor, log_draft: Tensor, log_target: Tensor, check: bool | None
) -> None:
    _check_laws(rule, log_draft, log_target)
    if log_draft.shape != log_target.shape or candidates.shape[:-1] != log_draft.shape[:-1]:
        raise ValueError(
            f"{rule} needs one draft law and one target law per row of candidates: got candidates "
            f"{tuple(candidates.shape)}, log_draft {tuple(log_draft.shape)}, log_target "
            f"{tuple(log_target.shape)}; expected [*batch, num_candidates], [*batch, vocab] twice."
        )
    if check if check is not None else candidates.device.type == "cpu":
        _check_values(log_draft, "log_draft")
        _check_values(log_target, "log_target")
        rows = log_draft.unsqueeze(-2).expand(*candidates.shape, log_draft.shape[-1])
        _check_mass(candidates, rows, candidates != NO_TOKEN)


def _check_round(
    rule: str,
    draft_tokens: Tensor,
    log_draft: Tensor,
    log_target: Tensor,
    drafted: Tensor | None,
    check: bool | None,
) -> Tensor:
    """The number of real draft tokens per row, once the arguments fit together."""
    _check_laws(rule, log_draft, log_target)
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
        real = _positions(draft_tokens) < drafted.unsqueeze(-1)
        _check_values(log_draft, "log_draft", real)
        beyond = torch.arange(gamma + 1, device=drafted.device) <= drafted.unsqueeze(-1)
        _check_values(log_target, "log_target", beyond)
        _check_mass(draft_tokens, log_draft, real)
    return drafted


def _check_laws(rule: str, log_draft: Tensor, log_target: Tensor) -> None:
    for name, law in (("log_draft", log_draft), ("log_target", log_target)):
        if law.dtype not in NORMALISATION_TOLERANCE:
            raise ValueError(
                f"{rule} needs {name} in float32 or float64: got {law.dtype}. Take the log_softmax "
                f"of the logits in float32, and draw from that: the law that judges a draft must "
                f"be the one it was drawn from."
            )


def _check_values(log_law: Tensor, name: str, used: Tensor | None = None) -> None:
    """Every used row is a distribution."""
    total = log_law.double().logsumexp(-1).exp()
    close = (total - 1).abs() <= NORMALISATION_TOLERANCE[log_law.dtype]
    off = close.logical_not()  # nan included
    if used is not None:
        off = off & used
    if off.any():
        index = tuple(off.nonzero()[0].tolist())
        raise ValueError(
            f"{name} must hold normalised log-probabilities: row {index} sums to "
            f"{float(total[index]):.6g}. Pass logits through log_softmax, after the filters."
        )


def _check_mass(tokens: Tensor, log_draft: Tensor, real: Tensor) -> None:
    """Every real draft token could have come from the draft."""
    vocab = log_draft.shape[-1]
    outside = real & ((tokens < 0) | (tokens >= vocab))
    if outside.any():
        index = tuple(outside.nonzero()[0].tolist())
        raise ValueError(
            f"a draft token must be an index into the vocabulary of {vocab}: "
            f"entry {index} is {int(tokens[index])}."
        )
    log_mass = _at(log_draft, tokens.clamp(max=vocab - 1))
    impossible = real & (log_mass == -torch.inf)
    if impossible.any():
        index = tuple(impossible.nonzero()[0].tolist())
        raise ValueError(
            f"draft token {int(tokens[index])} at {index} has no mass under log_draft, so it was "
            f"not drawn from it. Pass the law that the draft was drawn from, after its filters "
            f"(log_point_mass for a looked-up token)."
        )
