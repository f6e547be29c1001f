"""q*: the geometric mean of two distributions that is equally far, in KL, from both.

`solve_kl_symmetry(policy, teacher)` finds alpha* and the Chernoff information of two parents of any
kind: rows of log-probabilities (arrays or tensors), Gaussians, families, SciPy's distributions.
`generate` draws tokens from q* of two language models. What needs torch or transformers loads on
first use, so that `import qstar` needs neither.
"""

import importlib
import pkgutil
from typing import Any

from .face import (
    acceptance_probability,
    geometric_mean,
    kl,
    log_geometric_mean,
    log_partition,
    solve_kl_symmetry,
    total_variation,
)
from .gaussian import Gaussian
from .result import STATUSES, Balance, Status
from .rows import cumulants, kl_gap

__version__ = "0.1.0"

__all__ = [
    "STATUSES",
    "Balance",
    "Gaussian",
    "OptimalSpeculativeDecoder",
    "Sampling",
    "Status",
    "acceptance_probability",
    "cumulants",
    "generate",
    "geometric_mean",
    "kl",
    "kl_gap",
    "log_geometric_mean",
    "log_partition",
    "solve_kl_symmetry",
    "total_variation",
]


_ON_FIRST_USE = {  # the names of the face that need torch or transformers
    "OptimalSpeculativeDecoder": ".adapters.chat",
    "Sampling": ".decoding.sampling_options",
    "generate": ".decoding.generate",
}


def _submodules() -> set[str]:
    """The package's own modules and folders, as they lie there: no list to keep by hand."""
    return {m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")}


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return getattr(importlib.import_module(_ON_FIRST_USE[name], __name__), name)
    if name in _submodules():
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(__all__) | _submodules())
