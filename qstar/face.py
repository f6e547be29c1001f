"""One name for one thing: each function here asks what kind its parents are, and calls theirs.

Rows of log-probabilities are arrays (NumPy float64: `qstar.rows`) or tensors (`qstar.rows_torch`);
densities are Gaussians (`qstar.gaussian`), the distributions of `qstar.families`, or frozen SciPy
distributions. Two of different kinds are solved by `qstar.families`, if it knows both.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

from . import gaussian, rows, solve
from .gaussian import Gaussian
from .result import Balance


def solve_kl_symmetry(policy: Any, teacher: Any, **options: Any) -> Balance[Any, Any, Any]:
    """alpha*, the Chernoff information and both divergences: the balanced point of two parents.

    Args:
        policy: Log-probabilities as an array or a tensor of shape (*batch, vocab), a
            `qstar.Gaussian`, a distribution of `qstar.families`, or a frozen SciPy distribution.
        teacher: The other parent, of the same kind (densities may be mixed).
        **options: Of the tensors' solver (`qstar.rows_torch.solve_kl_symmetry`).

    Raises:
        ValueError: A parent is not what its kind asks for; the message says where.
        TypeError: The parents are of two kinds, or an option is unknown.

    Derived in: the chapter "KL symmetry". Source: the analysis, problem 1.
    """
    home = _home(policy, teacher)
    home = solve if home is rows else home
    balance: Balance[Any, Any, Any] = home.solve_kl_symmetry(policy, teacher, **options)
    return balance


def geometric_mean(policy: Any, teacher: Any, alpha: float) -> Any:
    """q_alpha of two densities, as one of their kind.

    Args:
        policy: A `qstar.Gaussian`, a distribution of `qstar.families`, or a frozen SciPy one.
        teacher: The other parent.
        alpha: The exponent on the policy, in [0, 1].

    Raises:
        TypeError: The parents are rows, for which `log_geometric_mean` is.
    """
    home = _home(policy, teacher)
    if not hasattr(home, "geometric_mean"):
        raise TypeError(
            "geometric_mean is of densities; for rows of log-probabilities call "
            "qstar.log_geometric_mean(log_policy, log_teacher, alpha)."
        )
    return home.geometric_mean(policy, teacher, alpha)


def log_geometric_mean(log_policy: Any, log_teacher: Any, alpha: Any) -> Any:
    """log q_alpha of rows of log-probabilities, normalised; alpha may be outside [0, 1].

    Args:
        log_policy: An array or a tensor. Shape (*batch, vocab).
        log_teacher: The same.
        alpha: Shape (*batch), or one number.

    Raises:
        TypeError: The parents are densities, for which `geometric_mean` is.
    """
    home = _home(log_policy, log_teacher)
    if not hasattr(home, "log_geometric_mean"):
        raise TypeError(
            "log_geometric_mean is of rows of log-probabilities; for densities call "
            "qstar.geometric_mean(policy, teacher, alpha)."
        )
    return home.log_geometric_mean(log_policy, log_teacher, _like(home, alpha, log_policy))


def log_partition(policy: Any, teacher: Any, alpha: Any) -> Any:
    """log Z(alpha) = log sum policy^alpha teacher^(1-alpha), in nats.

    Args:
        policy: As `solve_kl_symmetry` takes it.
        teacher: The other parent.
        alpha: For rows of shape (*batch), outside [0, 1] too; for densities any shape, in [0, 1].
    """
    home = _home(policy, teacher)
    return home.log_partition(policy, teacher, _like(home, alpha, policy))


def kl(p: Any, q: Any) -> Any:
    """KL(p || q) of what `solve_kl_symmetry` takes, in nats; inf where p has mass that q lacks."""
    return _home(p, q).kl(p, q)


def total_variation(p: Any, q: Any) -> Any:
    """TV(p, q) of rows of log-probabilities, arrays or tensors of shape (*batch, vocab)."""
    return _of_rows(p, q).total_variation(p, q)


def acceptance_probability(log_draft: Any, log_target: Any) -> Any:
    """The probability 1 - TV that speculative sampling keeps a draft token: of rows, as above."""
    return _of_rows(log_draft, log_target).acceptance_probability(log_draft, log_target)


def _of_rows(one: Any, other: Any) -> ModuleType:
    home = _home(one, other)
    if not hasattr(home, "total_variation"):
        raise TypeError(
            f"this is known of rows of log-probabilities, arrays or tensors: got "
            f"{type(one).__name__} and {type(other).__name__}."
        )
    return home


def _home(policy: Any, teacher: Any) -> ModuleType:
    """The module that knows both parents."""
    kinds = {_kind(policy), _kind(teacher)}
    if kinds == {"array"}:
        return rows
    if kinds == {"tensor"}:
        from . import rows_torch

        return rows_torch
    if kinds == {"Gaussian"}:
        return gaussian
    if kinds & {"array", "tensor"}:
        raise TypeError(
            f"policy and teacher must be of one kind, two arrays, two tensors or two densities: "
            f"got {type(policy).__name__} and {type(teacher).__name__}."
        )
    # By name, for not whoever asks this module imports the families (`qstar_book.closure`).
    return importlib.import_module(f"{__package__}.families")


def _kind(parent: Any) -> str:
    """What a parent is; anything that is no tensor and no density is taken for an array."""
    if isinstance(parent, Gaussian):
        return "Gaussian"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(parent, torch.Tensor):
        return "tensor"
    if hasattr(parent, "dist") or type(parent).__module__.startswith(f"{__package__}.families"):
        return "density"
    return "array"


def _like(home: ModuleType, alpha: Any, parent: Any) -> Any:
    """Exponents as a tensor, one for every row, where the parents are tensors."""
    if home.__name__ != f"{__package__}.rows_torch":
        return alpha
    exponents = parent.new_tensor(alpha) if _kind(alpha) == "array" else alpha
    return exponents.expand(parent.shape[:-1])
