"""A decoded text with what both models thought at each token: for the explorer of a real decode.

qstar-book record spoken --out data/results/spoken_cpu.json
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray
from torch import Tensor
from tqdm import tqdm

from qstar.adapters import checkpoints
from qstar.decoding.generate import PROPOSERS, generate
from qstar.rows import log_geometric_mean

from .. import shipped_model
from ..files import provenance, write_json

TOP = 4
"""How many tokens of each distribution are written down."""
END = "⏹"
"""What stands for a token that has no text."""


def record(
    models: tuple[Any, Any],
    tokenizer: Any,
    prompts: tuple[Tensor, Tensor],
    *,
    max_new_tokens: int,
    seed: int,
) -> list[dict[str, Any]]:
    """The tokens of one text, decoded by alternating drafts of one token.

    Returns:
        Of each token its `text`, who proposed it (`by`: "policy", "teacher" or "none"), whether it
        was `kept`, `alpha`, `chernoff` in nats, the chance `accept` that the proposal is kept, and
        `top`: of the policy, q* and the teacher, the likeliest tokens with their probabilities,
        and last the token itself.
    """
    options: dict[str, Any] = {"scheme": "alternating", "gamma": 1, "generator": seed}
    drawn = generate(*models, *prompts, max_new_tokens=max_new_tokens, **options)
    length, trace = int(drawn.lengths), drawn.trace
    tokens = drawn.tokens[:length]
    log_policy, log_teacher = (
        checkpoints.log_distributions(model, prompt, tokens).double().cpu().numpy()
        for model, prompt in zip(models, prompts, strict=True)
    )
    log_q = log_geometric_mean(log_policy, log_teacher, trace.alpha[:length].double().numpy())
    shown = log_policy, log_q, log_teacher
    found = []
    for at, token in enumerate(tokens.tolist()):
        by = PROPOSERS[int(trace.proposer[at])]
        accept = {"policy": trace.accept_policy, "teacher": trace.accept_teacher}.get(by)
        found.append(
            {
                "text": _text(tokenizer, token),
                "by": by,
                "kept": bool(trace.accepted[at]),
                "alpha": round(float(trace.alpha[at]), 4),
                "chernoff": round(float(trace.balance.chernoff[at]), 5),
                "accept": None if accept is None else round(float(accept[at]), 4),
                "top": [_top(p[at], token, tokenizer) for p in shown],
            }
        )
    return found


def _top(log_p: ndarray, token: int, tokenizer: Any) -> list[list[Any]]:
    likeliest = np.argsort(-log_p)[:TOP].tolist()
    p = np.exp(log_p)
    return [[_text(tokenizer, x), round(float(p[x]), 4)] for x in (*likeliest, token)]


def _text(tokenizer: Any, token: int) -> str:
    return END if token in tokenizer.all_special_ids else str(tokenizer.decode([token]))


def command(
    *, out: Path, model: str | None, seed: int, prompts: Sequence[int], max_new_tokens: int
) -> None:
    """`qstar-book record spoken`."""
    from . import corpus  # only the command needs it

    name = model or shipped_model.DEFAULT
    both, tokenizer = shipped_model.load(name, device="cpu")
    asked = corpus.read_prompts(corpus.data_file("prompts.json"))
    texts = []
    for at in tqdm(prompts):
        prompt = asked[at]
        systems = prompt.policy_system, prompt.teacher_system
        policy_ids, teacher_ids = (
            checkpoints.chat_ids(tokenizer, prompt.user, system=system) for system in systems
        )
        tokens = record(
            (both, both),
            tokenizer,
            (policy_ids, teacher_ids),
            max_new_tokens=max_new_tokens,
            seed=seed,
        )
        texts.append(asdict(prompt) | {"tokens": tokens})
    made_by = provenance("numpy", "torch", "transformers", device="cpu")
    write_json(out, made_by | {"model": name, "seed": seed, "texts": texts})
    print(out)
