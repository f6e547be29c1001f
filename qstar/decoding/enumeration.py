"""The exact distribution of a decoder's tokens: it is run on every sequence of its choices.

    pair = tiny_model(1), tiny_model(2)
    distribution, _ = decoder_distribution(*pair, ids, length=2, scheme="alternating", gamma=2)
    abs(distribution - token_level_distribution(*pair, ids, length=2)).max()      # rounding

Only models of a few tokens can be followed this far. The code that runs is `generate`, the
one that decodes from models of any size.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from scipy.special import log_softmax
from torch import Tensor

from .. import _quiet  # noqa: F401 - before transformers

# isort: split
from transformers import LlamaConfig, LlamaForCausalLM

from ..rows import log_geometric_mean
from ..solve import solve_kl_symmetry
from .generate import Generation, generate

MOST_ROWS = 40_000
"""The most sequences of choices that are followed."""

MOST_RUNS, FIRST_ROWS = 100, 50
"""The most runs in which they are looked for, and the rows of each prompt in the first of these."""


def tiny_model(seed: int, *, vocab: int = 3, forgetful: bool = False) -> Any:
    """A Llama in float64 of two layers, its weights drawn at random; nothing ends its texts.

    Args:
        seed: Of the weights.
        vocab: How many tokens it knows.
        forgetful: Let all tokens look alike to it: the next token's distribution is then always the
            same, and so is every acceptance probability.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                initializer_range=0.5,
                bos_token_id=None,
                eos_token_id=None,
                pad_token_id=None,
            )
        )
    if forgetful:
        with torch.no_grad():
            seen: Any = model.get_input_embeddings().weight
            seen.copy_(seen[:1].clone().expand_as(seen))
    return model.double().eval()


def token_level_distribution(
    policy: Any,
    teacher: Any,
    policy_ids: Tensor,
    teacher_ids: Tensor | None = None,
    *,
    length: int,
    alpha: float | None = None,
) -> ndarray:
    """The distribution that a decoder should have: q_alpha after every prefix, multiplied up.

    By forwards over whole texts, without a cache, and by the NumPy solver. The answer has `length`
    axes, one for each new token. `alpha` None solves for alpha* after every prefix.
    """
    prompts = policy_ids, policy_ids if teacher_ids is None else teacher_ids
    vocab = policy.get_output_embeddings().weight.shape[0]
    joint = np.ones(())
    for depth in range(length):
        prefixes = torch.tensor(list(np.ndindex(*[vocab] * depth)), dtype=torch.long)
        prefixes = prefixes.reshape(vocab**depth, depth)
        rows = []
        for model, prompt in zip((policy, teacher), prompts, strict=True):
            after = prefixes.to(prompt.device)
            texts = torch.cat([prompt.expand(len(prefixes), -1), after], dim=1)
            with torch.no_grad():
                logits = model(texts, use_cache=False).logits[:, -1]
            rows.append(log_softmax(logits.double().cpu().numpy(), axis=-1))
        at = (
            solve_kl_symmetry(rows[0], rows[1]).alpha
            if alpha is None
            else np.full(len(prefixes), alpha)
        )
        next_q = np.exp(log_geometric_mean(rows[0], rows[1], at))
        joint = joint[..., None] * next_q.reshape(*joint.shape, vocab)
    return joint


def decoder_distribution(
    policy: Any,
    teacher: Any,
    policy_ids: Tensor,
    teacher_ids: Tensor | None = None,
    *,
    length: int,
    **options: Any,
) -> tuple[ndarray, int]:
    """The joint distribution of the decoder's tokens, an axis each, and how many choices it made.

    Of `length` new tokens after one prompt for each model, of few tokens; `options` are for
    `generate`. Errors are those of `decoder_distributions`.
    """
    prompts = policy_ids, policy_ids if teacher_ids is None else teacher_ids
    probabilities, result = decoder_distributions((policy, teacher), [prompts], length, **options)
    return probabilities[0], len(result.tokens)


def decoder_distributions(
    models: Sequence[Any],
    prompts: Sequence[Sequence[Tensor]],
    length: int,
    *,
    vocab: int | None = None,
    eos_token_id: int | None = None,
    run: Callable[..., Generation] = generate,
    **options: Any,
) -> tuple[ndarray, Generation]:
    """The joint distributions of a decoder's tokens after each of several prompts.

    `generate` runs on a batch that has a row for every sequence of choices it can make; so
    that rows accept and reject differently is part of what is looked at. What they are is found out
    by running it: beyond what a row is told it takes any option that has a probability, and those
    that no row takes are rows of the next batch. The last batch has each of them once.

    Args:
        models: The parents, of few tokens.
        prompts: A pair for each distribution, the policy's and the teacher's.
        length: How many new tokens.
        vocab: As in `Sampling`, which has what `options` may be.
        eos_token_id: The token that ends a row, if one does.
        run: `generate`, or one that is mistaken.
        **options: For `run`.

    Returns:
        The distributions, an axis for each token; and what the last batch gave. Shape (prompts,
        *tokens).

    Raises:
        ValueError: There are more than `MOST_ROWS` sequences of choices, or those of a row never
            cease to change with what other rows choose.
    """
    told: Sequence[tuple[int, ...]] = [(prompt,) for prompt in range(len(prompts))] * FIRST_ROWS
    for _ in range(MOST_RUNS):
        if len(told) > MOST_ROWS:
            raise ValueError(f"{len(told)} sequences of choices are too many: take fewer tokens.")
        scripts = _Scripts(told, length, eos_token_id)
        result = run(
            *models,
            *([prompts[prompt][side] for prompt in scripts.prompts] for side in range(2)),
            max_new_tokens=length,
            generator=scripts,
            vocab=vocab,
            eos_token_id=eos_token_id,
            on_tokens=scripts.listen,
            **options,
        )
        found = scripts.found()
        if found == told:
            break
        told = found
    else:
        raise ValueError(f"new choices are still found in run {MOST_RUNS}: take fewer tokens.")
    size = models[0].get_output_embeddings().weight.shape[0] if vocab is None else vocab
    probabilities = np.zeros((len(prompts),) + (size,) * length)
    outcomes = (scripts.prompts, *result.tokens.T.cpu().numpy())
    np.add.at(probabilities, outcomes, scripts.weight.numpy())
    return probabilities, result


class _Scripts:
    """A `chance.Chance` for a batch: each row makes the choices of its own script.

    A script is the index of a prompt, and then the option of each choice that the row makes. All
    rows that are not finished have made the same number of choices.
    """

    def __init__(
        self, told: Sequence[tuple[int, ...]], length: int, eos_token_id: int | None
    ) -> None:
        depth = max(map(len, told))
        self._told = torch.tensor([script + (-1,) * (depth - len(script)) for script in told])
        self._made = [self._told[:, 0]]  # option by option, -1 where a row was finished
        self._open: list[tuple[Tensor, Tensor]] = []  # rows, and the options there that none took
        self._alike = self._made[0].clone()  # a number for all that have chosen alike so far
        self._any = torch.Generator().manual_seed(0)
        self.prompts: list[int] = self._made[0].tolist()
        self.weight = torch.ones(len(told), dtype=torch.float64)
        self._left = torch.full((len(told),), length)
        self._end = eos_token_id

    def listen(self, block: Tensor) -> None:
        """Told of each round's tokens: finished rows make no choices."""
        self._left -= (block >= 0).sum(-1)
        if self._end is not None:
            self._left[(block == self._end).any(-1)] = 0

    def keep(self, log_probability: Tensor) -> Tensor:
        """No or yes, as the script has it."""
        kept = log_probability.double().exp().cpu()
        return self._choose(torch.stack([1 - kept, kept], -1)).bool().to(log_probability.device)

    def draw(self, log_p: Tensor) -> Tensor:
        """The script's token."""
        return self._choose(log_p.double().exp().cpu()).to(log_p.device)

    def found(self) -> list[tuple[int, ...]]:
        """The scripts that were followed, and the first part of those that were not."""
        made = torch.stack(self._made, 1).tolist()
        followed = {tuple(option for option in script if option >= 0) for script in made}
        others = {
            (*made[rows[place]][:depth], option)
            for depth, (rows, options) in enumerate(self._open, 1)
            for place, option in options.nonzero().tolist()
        }
        return sorted(followed | others)

    def _choose(self, probabilities: Tensor) -> Tensor:
        """An option for each distribution. Shape (running rows, *events, options)."""
        rows = (self._left > 0).nonzero().squeeze(-1)
        *events, options = probabilities.shape[1:]
        chosen = torch.zeros(len(rows), math.prod(events), dtype=torch.long)
        for event in range(chosen.shape[1]):
            p, depth = probabilities.reshape(*chosen.shape, options)[:, event], len(self._made)
            possible = (p != 0) & (self.weight[rows] != 0).unsqueeze(-1)
            option = (possible + torch.rand(possible.shape, generator=self._any)).argmax(-1)
            if depth < self._told.shape[1]:
                told = self._told[rows, depth]
                known = told.clamp(0, options - 1)
                fits = (told == known) & possible.gather(-1, known.unsqueeze(-1)).squeeze(-1)
                option = torch.where(fits, told, option)
            self.weight[rows] *= p.gather(-1, option.unsqueeze(-1)).squeeze(-1)
            self._made.append(torch.full_like(self._left, -1).index_copy(0, rows, option))
            paths = self._alike[rows].unsqueeze(-1) * options + torch.arange(options)
            taken = paths.gather(-1, option.unsqueeze(-1)).squeeze(-1)
            self._open.append((rows, possible & ~torch.isin(paths, taken)))
            self._alike[rows] = taken.unique(return_inverse=True)[1]
            chosen[:, event] = option
        return chosen.reshape(len(rows), *events)
