"""What several folders ask of an argument: whole numbers, exponents."""

import operator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def check_count(name: str, count: Any, *, least: int = 1) -> int:
    """A whole number of any integer type as an int; ValueError for all else, and below `least`."""
    try:
        number = None if isinstance(count, bool) else operator.index(count)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"{name} must be a whole number, {least} or more: got {count!r}.")
    return number


def check_alphas(alpha: ArrayLike, *, allow_nan: bool = True) -> np.ndarray:
    """Exponents as float64; ValueError outside [0, 1].

    Args:
        alpha: The exponents on the policy. Any shape.
        allow_nan: Whether nan passes, as a solver gives it for rows without a q*.
    """
    values = np.asarray(alpha, dtype=np.float64)
    outside = (values < 0) | (values > 1) | (np.isnan(values) & (not allow_nan))
    if outside.any():
        raise ValueError(
            f"alpha is the exponent on the policy and must lie in [0, 1]: got {values[outside][0]}."
        )
    return values


def check_exponents(alpha: ArrayLike) -> np.ndarray:
    """Exponents as float64, inside [0, 1] or not; ValueError for infinite ones, while nan passes.

    Args:
        alpha: The exponents on the policy. Any shape.
    """
    values = np.asarray(alpha, dtype=np.float64)
    infinite = np.isinf(values)
    if infinite.any():
        raise ValueError(
            f"alpha is the exponent on the policy and must be finite: got {values[infinite][0]}."
        )
    return values


def check_fixed_alpha(alpha: float | None) -> float | None:
    """The fixed exponent, None to solve for it; ValueError unless single precision can hold it."""
    if alpha is None:
        return None
    if not abs(float(alpha)) <= float(np.finfo(np.float32).max):
        raise ValueError(
            f"alpha is the exponent on the policy and must be a finite number: got {alpha}. None "
            f"solves for alpha* at each position."
        )
    return float(alpha)
