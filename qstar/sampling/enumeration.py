"""Exact distributions of samplers: their code is run once for every sequence of its choices.

A sampler of `qstar.sampling.rules` makes two kinds of choice, to keep a token and to draw one. Here
both are made in every possible way, and the probability of each is multiplied up in float64. So the
distribution that comes out is that of the very code that samples, not of a second copy of its
formula. What one run costs is paid at most `2^coins * vocab^draws` times, for branches without
probability are left out; leading axes are rows and share a run.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

Outcome = TypeVar("Outcome")


class Every:
    """A `chance.Chance` that follows one scripted branch, and weighs it in every row.

    Attributes:
        weight: The probability of the branch so far, per row.
        path: The choices made: (index of the option, that of the next one, None after the last).
            Options that have no probability in any row are passed over.
    """

    def __init__(self, batch: Sequence[int], script: Sequence[int]) -> None:
        self.weight: Tensor = torch.ones(tuple(batch), dtype=torch.float64)
        self.path: list[tuple[int, int | None]] = []
        self._script = list(script)

    def keep(self, log_probability: Tensor) -> Tensor:
        """The next coins of the script, the same in every row."""
        events = log_probability.shape[self.weight.ndim :]
        probability = log_probability.double().exp()

        def coins(bits: int) -> tuple[Tensor, Tensor]:
            kept = torch.tensor([bits >> i & 1 for i in range(events.numel())], dtype=torch.bool)
            kept = kept.reshape(events).expand(log_probability.shape)
            return kept, torch.where(kept, probability, 1 - probability)

        return self._choose(2 ** events.numel(), coins)

    def draw(self, log_p: Tensor) -> Tensor:
        """The next token of the script, the same in every row."""
        *shape, vocab = log_p.shape
        events = torch.Size(shape[self.weight.ndim :])
        probability = log_p.double().exp()

        def tokens(choice: int) -> tuple[Tensor, Tensor]:
            digits = [choice // vocab**i % vocab for i in range(events.numel())]
            token = torch.tensor(digits).reshape(events).expand(shape)
            return token, probability.gather(-1, token[..., None]).squeeze(-1)

        return self._choose(vocab ** events.numel(), tokens)

    def _choose(self, options: int, option: Callable[[int], tuple[Tensor, Tensor]]) -> Tensor:
        done = len(self.path)
        first = self._script[done] if done < len(self._script) else 0
        possible = self._possible(range(first, options), option)
        nothing = torch.zeros_like(self.weight)
        index, outcome, weight = next(possible, None) or (first, option(first)[0], nothing)
        self.path.append((index, next(possible, (None,))[0]))
        self.weight = weight
        return outcome

    def _possible(
        self, indices: Iterable[int], option: Callable[[int], tuple[Tensor, Tensor]]
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The options that have a probability in some row, and the weight of the branch then."""
        for index in indices:
            outcome, probability = option(index)
            weight = self.weight * probability.reshape(*self.weight.shape, -1).prod(-1)
            if weight.any():
                yield index, outcome, weight


def every_outcome(
    program: Callable[[Every], Outcome], batch: Sequence[int] = ()
) -> Iterator[tuple[Outcome, Tensor]]:
    """Each possible outcome of a program of choices, with its probability in each row.

    Args:
        program: Called once per branch, with the `Chance` to pass on as `generator`.
        batch: The shape of the leading axes that are rows; all other axes of what is kept or drawn
            are choices of their own.
    """
    script: list[int] = []
    while True:
        chance = Every(batch, script)
        outcome = program(chance)
        yield outcome, chance.weight
        *before, last = chance.path or [(0, None)]
        while last[1] is None and before:
            last = before.pop()
        if last[1] is None:
            return
        script = [*(index for index, _ in before), last[1]]


def token_distribution(
    program: Callable[[Every], Tensor], vocab: int, batch: Sequence[int] = ()
) -> ndarray:
    """The distribution of one token per row that a program returns; negative ones are left out."""
    probability = torch.zeros((*batch, vocab), dtype=torch.float64)
    for token, weight in every_outcome(program, batch):
        there = (token >= 0)[..., None]
        probability.scatter_add_(-1, token.clamp(min=0)[..., None], (weight[..., None] * there))
    return probability.numpy()


def pick_distribution(
    rule: Callable[..., Any],
    draw_candidates: Callable[..., Tensor],
    log_draft: ndarray,
    log_target: ndarray,
    num_candidates: int,
    *,
    replacement: bool,
    dtype: torch.dtype = torch.float64,
) -> tuple[ndarray, float]:
    """What a rule for a single position emits, and how often it accepts, both exactly.

    Args:
        rule: Such as `picks.accept_or_redraw`, called as rule(candidates, log_draft,
            log_target, generator=...) and returning a `Pick`; anything else it needs is bound.
        draw_candidates: `picks.draw_candidates`, or a drafter that lies about its distribution.
        log_draft: The draft's log-probabilities. Shape (vocab,).
        log_target: The target's.
        num_candidates: How many candidates are drawn.
        replacement: Whether they are drawn with replacement.
        dtype: In which precision the rule computes.

    Returns:
        The distribution of the emitted token, and the probability that it is an accepted candidate.
    """
    draft, target = (torch.tensor(log_p, dtype=dtype) for log_p in (log_draft, log_target))
    drawn = [
        (candidates, float(weight))
        for candidates, weight in every_outcome(
            lambda chance: draw_candidates(
                draft, num_candidates, replacement=replacement, generator=chance
            )
        )
        if weight > 0
    ]
    candidates = torch.stack([tokens for tokens, _ in drawn])
    drawn_weight = torch.tensor([weight for _, weight in drawn], dtype=torch.float64)
    rows = len(drawn)
    probability, accepted = torch.zeros(len(log_draft), dtype=torch.float64), 0.0
    branches = every_outcome(
        lambda chance: rule(
            candidates, draft.expand(rows, -1), target.expand(rows, -1), generator=chance
        ),
        (rows,),
    )
    for pick, weight in branches:
        weight = weight * drawn_weight
        probability.scatter_add_(0, pick.token, weight)
        accepted += float((weight * pick.accepted).sum())
    return probability.numpy(), accepted


def block_distribution(
    rule: Callable[..., Any],
    draft: Sequence[ndarray],
    target: Sequence[ndarray],
    *,
    drafted: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[ndarray, ndarray, float]:
    """The exact distribution of what a round emits, completed by the target, and its counts.

    A round emits between 1 and gamma + 1 tokens. Completing it with draws from the target, as the
    rounds after it would, gives gamma + 1 tokens, whose joint distribution must be the target's.

    Args:
        rule: `rules.verify` or `verify_block`, called with the tensors of all vocab^gamma
            draft blocks at once and returning a `Round`.
        draft: Conditional log-probabilities of the draft: entry i has shape [vocab] * (i + 1), the
            last axis being the token that follows the i tokens of the others; gamma entries. Any
            shape.
        target: The same for the target; gamma + 1 entries. Any shape.
        drafted: How many of the gamma draft tokens are real; all if not given.
        dtype: In which precision the rule computes.

    Returns:
        The joint distribution, of shape [vocab] * (gamma + 1); that of the number of accepted
        tokens, of shape (gamma+1,); and the mean number of tested ones.
    """
    gamma, vocab = len(draft), len(target[0])
    real = gamma if drafted is None else drafted
    blocks = np.array(list(itertools.product(range(vocab), repeat=gamma)), dtype=np.int64)
    log_draft = _rows_of(draft, blocks, vocab)
    log_target = _rows_of(target, blocks, vocab)
    chosen = np.take_along_axis(log_draft, blocks[..., None], axis=-1).squeeze(-1)
    drawn = np.exp(chosen.sum(axis=-1))
    tokens = torch.tensor(blocks)
    pair = [torch.tensor(log_p, dtype=dtype) for log_p in (log_draft, log_target)]
    counts = tokens.new_full((len(blocks),), real)
    joint = np.zeros((vocab,) * (gamma + 1))
    num_accepted, mean_tested = np.zeros(gamma + 1), 0.0
    branches = every_outcome(
        lambda chance: rule(tokens, *pair, generator=chance, drafted=counts, check=False),
        (len(blocks),),
    )
    for round_, weight in branches:
        mass = weight.numpy() * drawn
        accepted, emitted = round_.accepted.numpy(), round_.tokens.numpy()
        np.add.at(num_accepted, accepted, mass)
        mean_tested += float((mass * round_.tested.numpy()).sum())
        for row in np.flatnonzero(mass):
            prefix = tuple(emitted[row, : accepted[row] + 1])
            joint[prefix] += mass[row] * _completion(target, prefix)
    return joint, num_accepted, mean_tested


def _rows_of(conditionals: Sequence[ndarray], blocks: ndarray, vocab: int) -> ndarray:
    """The distribution at each position, given each block of draft tokens."""
    rows = np.empty((len(blocks), len(conditionals), vocab))
    for position, table in enumerate(conditionals):
        rows[:, position] = table[tuple(blocks[:, :position].T)]
    return rows


def joint_distribution(conditionals: Sequence[ndarray]) -> ndarray:
    """The joint distribution of a sequence, from conditional ones (as in `block_distribution`)."""
    return _completion(conditionals, ())


def _completion(conditionals: Sequence[ndarray], prefix: tuple[int, ...]) -> ndarray:
    """The distribution of what follows a prefix, up to the last of the conditional ones."""
    log_joint = np.zeros(())
    for table in conditionals[len(prefix) :]:
        log_joint = log_joint[..., None] + table[prefix]
    return np.exp(log_joint)


# --- The source's loop, mended -------------------------------------------------------------------


def patched_loop(candidates: Tensor, policy: Tensor, q_star: Tensor, chance: Every) -> Tensor:
    """BIASED, an exhibit: the source's loop with its last line mended, and nothing else.

    One candidate and this is exact. With k independent ones it has the distribution of the source's
    own loop with k - 1 (`acceptance.source_loop_distribution`): where q* is not above the policy, k
    tests against q* alone hand out more than q* has, so that no last line could help.

    Args:
        candidates: Drawn independently from the policy. Shape (num_candidates,).
        policy: Probabilities, not logarithms. Shape (vocab,).
        q_star: The same of the target. Shape (vocab,).
        chance: What decides.
    """
    for candidate in candidates:
        accept_prob = (q_star[candidate] / policy[candidate]).clamp(max=1.0)
        if chance.keep(accept_prob.log()):
            return candidate
    residual = (q_star - policy).clamp(min=0)
    return chance.draw((residual / residual.sum()).log())


def mended_loop(
    candidates: Tensor,
    policy: Tensor,
    q_star: Tensor,
    chance: Every,
) -> Tensor:
    """The source's loop, exact for any number of independent candidates."""
    target = q_star
    for candidate in candidates:
        accept_prob = (target[candidate] / policy[candidate]).clamp(max=1.0)
        if chance.keep(accept_prob.log()):
            return candidate
        target = (target - policy).clamp(min=0)  # new: what is missing yet
        target = target / target.sum()  # new
    return chance.draw(target.log())  # new: not q_star
