"""What law a decoder's tokens have: the decoder run on every sequence of choices it can make.

    pair = tiny_model(1), tiny_model(2)
    law, _ = decoder_law(*pair, ids, length=2, scheme="alternating", gamma=2)
    abs(law - token_level_law(*pair, ids, length=2)).max()      # rounding

Only models of a few tokens can be followed this far. The code that runs is `decode.generate`, the
one that decodes from models of any size.
"""

from typing import Any

import numpy as np
import torch
from numpy import ndarray
from scipy.special import log_softmax
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ..rows import log_geometric_mean
from ..solve import solve_kl_symmetry
from .generate import generate

MOST_ROWS = 40_000
"""The most sequences of choices that are followed."""


def tiny_model(seed: int, *, vocab: int = 3, forgetful: bool = False) -> Any:
    """A Llama in float64 of two layers, its weights drawn at random; nothing ends its texts.

    Args:
        seed: Of the weights.
        vocab: How many tokens it knows.
        forgetful: Let all tokens look alike to it: the next token's law is then always the same,
            and so is every acceptance probability.
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


def token_level_law(
    policy: Any,
    teacher: Any,
    policy_ids: Tensor,
    teacher_ids: Tensor | None = None,
    *,
    length: int,
    alpha: float | None = None,
) -> ndarray:
    """The law that a decoder should have: q_alpha after every prefix, multiplied up.

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
        next_law = np.exp(log_geometric_mean(rows[0], rows[1], at))
        joint = joint[..., None] * next_law.reshape(*joint.shape, vocab)
    return joint


def decoder_law(
    policy: Any,
    teacher: Any,
    policy_ids: Tensor,
    teacher_ids: Tensor | None = None,
    *,
    length: int,
    **options: Any,
) -> tuple[ndarray, int]:
    """The joint law of the decoder's tokens, one axis for each, and how many choices were followed.

    `decode.generate` runs once, on a batch that has a row for every sequence of choices it can
    make; so that rows accept and reject differently is part of what is looked at.

    Args:
        policy: A model of few tokens.
        teacher: Another.
        policy_ids: The policy's prompt. Shape (length,).
        teacher_ids: The teacher's; None for the policy's. Shape (teacher_length,).
        length: How many new tokens.
        **options: For `generate`.

    Raises:
        ValueError: There are more than `MOST_ROWS` sequences of choices.
    """
    prompts = policy_ids, policy_ids if teacher_ids is None else teacher_ids
    rows = 1
    while True:
        if rows > MOST_ROWS:
            raise ValueError(f"{rows} sequences of choices are too many: take fewer tokens.")
        scripts = _Scripts(rows, length)
        result = generate(
            policy,
            teacher,
            *([ids] * rows for ids in prompts),
            max_new_tokens=length,
            generator=scripts,
            eos_token_id=None,
            on_tokens=scripts.listen,
            **options,
        )
        if scripts.options <= rows:
            break
        rows = scripts.options  # only now is it known how many choices there are
    vocab = policy.get_output_embeddings().weight.shape[0]
    law = np.zeros((vocab,) * length)
    # A row that ended early stands for all ways to go on: they share its weight.
    weights = scripts.weight * scripts.seen / rows
    np.add.at(law, tuple(result.tokens.T.cpu().numpy()), weights.numpy())
    return law, rows


class _Scripts:
    """A `chance.Chance` for a batch: row i makes the choices that the digits of i spell.

    A call with n options takes the next digit in base n, and multiplies the choice's probability
    into the row's weight.
    """

    def __init__(self, rows: int, length: int) -> None:
        self.number = torch.arange(rows)
        self.weight = torch.ones(rows, dtype=torch.float64)
        self.seen = torch.ones(rows, dtype=torch.long)  # options that each row's digits cover
        self.options = 1
        self._length, self._emitted = length, torch.zeros(rows, dtype=torch.long)

    def listen(self, block: Tensor) -> None:
        """Told of each round's tokens: finished rows make no choices."""
        self._emitted += (block >= 0).sum(-1)

    def keep(self, log_probability: Tensor) -> Tensor:
        """Each of two ways."""
        kept = self._digits(log_probability.shape, 2).bool()
        probability = log_probability.double().exp().cpu()
        self._weigh(torch.where(kept, probability, 1 - probability))
        return kept.to(log_probability.device)

    def draw(self, log_law: Tensor) -> Tensor:
        """Each of the tokens."""
        token = self._digits(log_law.shape[:-1], log_law.shape[-1])
        self._weigh(log_law.double().cpu().exp().gather(-1, token[..., None]).squeeze(-1))
        return token.to(log_law.device)

    @property
    def _running(self) -> Tensor:
        return (self._emitted < self._length).nonzero().squeeze(-1)

    def _digits(self, shape: torch.Size, base: int) -> Tensor:
        rows, events = self._running, shape[1:].numel()
        digits = torch.zeros(len(rows), events, dtype=torch.long)
        for event in range(events):
            digits[:, event] = self.number[rows] // self.options % base
            self.options *= base
        self.seen[rows] = self.options
        return digits.reshape(shape)

    def _weigh(self, probability: Tensor) -> None:
        rows = self._running
        self.weight[rows] *= probability.reshape(len(rows), -1).prod(-1)
