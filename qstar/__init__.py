"""q*: the geometric mean of two distributions that is equally far, in KL, from both.

`solve_kl_symmetry(log_policy, log_teacher)` finds alpha* and the Chernoff information in NumPy
float64. The same function for torch tensors is `qstar.batched.solve_kl_symmetry`, for Gaussians
`qstar.gaussian.solve_kl_symmetry`; `qstar.decode` draws tokens from q* of two language models.
Those submodules load on first use, so that `import qstar` needs neither torch nor transformers.
"""

import importlib
import pkgutil
from types import ModuleType

from .geometric import (
    acceptance_probability,
    cumulants,
    kl,
    kl_gap,
    log_geometric_mean,
    log_partition,
    total_variation,
)
from .result import STATUSES, Balance
from .solve import solve_kl_symmetry

__version__ = "0.1.0"

__all__ = [
    "STATUSES",
    "Balance",
    "acceptance_probability",
    "cumulants",
    "kl",
    "kl_gap",
    "log_geometric_mean",
    "log_partition",
    "solve_kl_symmetry",
    "total_variation",
]


def _submodules() -> set[str]:
    """The package's own modules, as they lie there: no list to keep by hand."""
    return {module.name for module in pkgutil.iter_modules(__path__)}


def __getattr__(name: str) -> ModuleType:
    if name in _submodules():
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(__all__) | _submodules())
