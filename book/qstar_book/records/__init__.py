"""The records of what cannot be measured anew in every build: how each is made, and read."""

import platform
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy import ndarray

from ..files import command_line


def median_with_interval(values: ndarray, *, seed: int = 0, draws: int = 2_000) -> dict[str, float]:
    """The median of all values and the 95% bootstrap interval of it, over the first axis."""
    rounds = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    medians = np.median(values[rounds].reshape(draws, -1), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return {"median": float(np.median(values)), "low": float(low), "high": float(high)}


def mean_with_interval(
    sums: ndarray, sizes: ndarray, *, seed: int = 0, draws: int = 10_000
) -> dict[str, float]:
    """The mean over all members of some groups, and the 95% bootstrap interval over the groups.

    Members of one group, such as the tokens of an answer, are not independent, so whole groups are
    drawn again. With few groups such an interval is too short rather than too long.

    Args:
        sums: Over the members of each group. Shape (groups,).
        sizes: How many members. Shape (groups,).
        seed: Of the bootstrap.
        draws: Of groups.
    """
    drawn = np.random.default_rng(seed).integers(len(sums), size=(draws, len(sums)))
    low, high = np.quantile(sums[drawn].sum(1) / sizes[drawn].sum(1), [0.025, 0.975])
    return {"mean": float(sums.sum() / sizes.sum()), "low": float(low), "high": float(high)}


def made_with(model: Any, *packages: str) -> dict[str, str]:
    """How a record of a model's answers is being made: command, versions and place."""
    versions = {name: version(name) for name in ("torch", "transformers", *packages)}
    where = f"{model.device.type}, {platform.machine()}, {model.dtype}"
    return {"command": command_line(), **versions, "device": where}
