"""What every solver of alpha* returns, and the names of its statuses.

No framework is imported here: the same type carries NumPy arrays, torch tensors and plain
floats, so that code which reads a result does not care which solver made it.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, Generic, TypeVar, cast

Values = TypeVar("Values")
Statuses = TypeVar("Statuses")
Flags = TypeVar("Flags")


class Status(StrEnum):
    """What a solver found. Equal to its name: `status == "interior"` is right for every kind.

    Attributes:
        interior: A unique alpha* in (0, 1) equalises the two KL divergences.
        boundary_0: q* is the teacher on the shared support; the policy is nearer.
        boundary_1: q* is the policy on the shared support; the teacher is nearer.
        degenerate_all: The parents agree on the shared support: every alpha gives one q*.
        disjoint: The parents share no outcome: q* does not exist.
        invalid: The row is not a pair of distributions (only where validation is off).
    """

    interior = "interior"
    boundary_0 = "boundary_0"
    boundary_1 = "boundary_1"
    degenerate_all = "degenerate_all"
    disjoint = "disjoint"
    invalid = "invalid"


STATUSES: tuple[str, ...] = tuple(Status)
"""In order; a torch result holds the index into this tuple, and compares with the names."""


def status_code(name: str) -> int:
    """The index of a status name.

    Raises:
        ValueError: There is no such status.
    """
    if name not in STATUSES:
        raise ValueError(f"no status named {name!r}: it must be one of {STATUSES}.")
    return STATUSES.index(name)


NAMED: dict[type, Callable[[Any], Any]] = {}
"""By the type of an array of status indices, what makes it equal to names: `qstar.rows_torch`'s."""


class ComparedByValue:
    """Equality of records that hold arrays or tensors: one bool, field by field.

    Arrays are equal where shapes and all entries are, nan equal to nan. The equality that a
    dataclass writes itself would ask for the truth value of an array. Not hashable.
    """

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        return all(_equal(getattr(self, name), getattr(other, name)) for name in names)

    __hash__ = None  # type: ignore[assignment]


class HashedByValue(ComparedByValue):
    """And a hash, for records of arrays that cannot be written to."""

    __slots__ = ()

    def __hash__(self) -> int:  # type: ignore[override]
        values = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        # Zero added: 0.0 and -0.0 are equal.
        return hash(tuple((v + 0.0).tobytes() if hasattr(v, "tobytes") else v for v in values))


def _equal(one: Any, other: Any) -> bool:
    if hasattr(one, "shape") != hasattr(other, "shape"):
        return False
    if not hasattr(one, "shape"):
        return bool(one == other or (one != one and other != other))
    if one.shape != other.shape:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _is_one_name(status: Any) -> bool:
    """Whether a status is a name, alone or in NumPy's array of no dimension."""
    named = getattr(getattr(status, "dtype", None), "kind", None) == "U"
    return isinstance(status, str) or (named and status.ndim == 0)


@dataclass(frozen=True, slots=True, eq=False)
class Balance(ComparedByValue, Generic[Values, Statuses, Flags]):
    """The point of the geometric path that is equally far, in KL, from both of its parents.

    It is defined as the minimax centre, q* = argmin_q max(KL(q||policy), KL(q||teacher)), which
    always exists where the supports meet; it equalises the two divergences exactly where the
    status is `interior` or `degenerate_all`. One entry per row: NumPy arrays from
    `qstar.solve_kl_symmetry` (0-d for a single row), tensors from `qstar.rows_torch`, plain Python
    values from `qstar.gaussian`. All divergences are in nats.

    Attributes:
        alpha: The exponent on the policy, in [0, 1]: 1 is the policy, 0 the teacher; 1/2 where
            every exponent serves; nan where the supports are disjoint.
        chernoff: The Chernoff information -min log Z(alpha), which is the larger of the two KL
            divergences below (both of them, in the interior); inf for disjoint supports.
        kl_to_policy: KL(q* || policy).
        kl_to_teacher: KL(q* || teacher).
        status: A `Status`, of one pair; an array of names in NumPy results of many rows, integer
            indices into `STATUSES` in torch results. `status == "interior"` is right in all of
            them; a name that is none is refused by `is_status`, and by `==` in torch results.
        converged: Whether the solver met its stopping rule; True at a boundary, whose solution is
            exact, and False for `disjoint` and `invalid` rows.
        slope: KL(q* || teacher) - KL(q* || policy), the derivative of log Z at `alpha`: what is
            left of the equation that was solved (not zero at a boundary); nan without a q*.
        curvature: The second derivative of log Z at `alpha`, a variance, in nats squared. The
            error of `alpha` is the error of `slope` over this: where it is tiny alpha is
            ill-determined, and q* and `chernoff` do not depend on it. nan without a q*.
        passes: How often the solver evaluated the slope of log Z.
    """

    alpha: Values
    chernoff: Values
    kl_to_policy: Values
    kl_to_teacher: Values
    status: Statuses
    converged: Flags
    slope: Values
    curvature: Values
    passes: Values

    def __post_init__(self) -> None:
        if type(self.status) in NAMED:
            named = NAMED[type(self.status)](self.status)
            object.__setattr__(self, "status", named)
        elif _is_one_name(self.status):
            object.__setattr__(self, "status", Status(str(self.status)))

    def is_status(self, name: str) -> Any:
        """Whether the status is this one of `STATUSES`, row by row; of the kind of `converged`.

        Raises:
            ValueError: There is no such status.
        """
        code, status = status_code(name), cast(Any, self.status)
        named = isinstance(status, str) or hasattr(status.dtype, "kind")  # NumPy's dtype has one
        return status == (name if named else code)
