"""What the rules of sampling need their tensors to be."""

import torch
from torch import Tensor

NORMALISATION_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""How far a row's probabilities may sum from 1 where distributions are checked."""


def at(log_p: Tensor, token: Tensor) -> Tensor:
    """The log-probability of each token; `NO_TOKEN` reads entry 0, which the caller discards."""
    return log_p.gather(-1, token.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def positions(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[-1], device=tokens.device)


def check_dtypes(rule: str, log_draft: Tensor, log_target: Tensor) -> None:
    for name, log_p in (("log_draft", log_draft), ("log_target", log_target)):
        if log_p.dtype not in NORMALISATION_TOLERANCE:
            raise ValueError(
                f"{rule} needs {name} in float32 or float64: got {log_p.dtype}. Take the "
                f"log_softmax of the logits in float32, and draw from that: what judges a draft "
                f"must be what it was drawn from."
            )


def check_values(log_p: Tensor, name: str, used: Tensor | None = None) -> None:
    """Every used row is a distribution."""
    total = log_p.double().logsumexp(-1).exp()
    close = (total - 1).abs() <= NORMALISATION_TOLERANCE[log_p.dtype]
    off = close.logical_not()  # nan included
    if used is not None:
        off = off & used
    if off.any():
        index = tuple(off.nonzero()[0].tolist())
        raise ValueError(
            f"{name} must hold normalised log-probabilities: row {index} sums to "
            f"{float(total[index]):.6g}. Pass logits through log_softmax, after the filters."
        )


def check_mass(tokens: Tensor, log_draft: Tensor, real: Tensor) -> None:
    """Every real draft token could have come from the draft."""
    vocab = log_draft.shape[-1]
    outside = real & ((tokens < 0) | (tokens >= vocab))
    if outside.any():
        index = tuple(outside.nonzero()[0].tolist())
        raise ValueError(
            f"a draft token must be an index into the vocabulary of {vocab}: "
            f"entry {index} is {int(tokens[index])}."
        )
    log_mass = at(log_draft, tokens.clamp(max=vocab - 1))
    impossible = real & (log_mass == -torch.inf)
    if impossible.any():
        index = tuple(impossible.nonzero()[0].tolist())
        raise ValueError(
            f"draft token {int(tokens[index])} at {index} has no mass under log_draft, so it was "
            f"not drawn from it. Pass what the draft was drawn from, after its filters "
            f"(log_point_mass for a looked-up token)."
        )
