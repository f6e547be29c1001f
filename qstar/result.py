"""What every solver of alpha* returns, and the names of its statuses.

No framework is imported here: the same type carries NumPy arrays, torch tensors and plain
floats, so that code which reads a result does not care which solver made it.
"""

from dataclasses import dataclass
from typing import Generic, TypeVar

Values = TypeVar("Values")
Statuses = TypeVar("Statuses")
Flags = TypeVar("Flags")

STATUSES = (
    "interior",  # a unique alpha* in (0, 1) equalises the two KL divergences
    "boundary_0",  # q* is the teacher on the shared support; the policy is nearer
    "boundary_1",  # q* is the policy on the shared support; the teacher is nearer
    "degenerate_all",  # the parents agree on the shared support: every alpha gives one q*
    "disjoint",  # the parents share no outcome: q* does not exist
    "invalid",  # the row is not a pair of distributions (only where validation is off)
)
"""Status names; a torch result holds the index into this tuple."""


@dataclass(frozen=True, slots=True)
class Balance(Generic[Values, Statuses, Flags]):
    """The point of the geometric path that is equally far, in KL, from both of its parents.

    It is defined as the minimax centre, q* = argmin_q max(KL(q||policy), KL(q||teacher)), which
    always exists where the supports meet; it equalises the two divergences exactly where the
    status is `interior` or `degenerate_all`. One entry per row: NumPy arrays from
    `qstar.solve_kl_symmetry` (0-d for a single row), tensors from `qstar.batched`, plain Python
    values from `qstar.gaussian`. All divergences are in nats.

    Attributes:
        alpha: The exponent on the policy, in [0, 1]: 1 is the policy, 0 the teacher; 1/2 where
            every exponent serves; nan where the supports are disjoint.
        chernoff: The Chernoff information -min log Z(alpha), which is the larger of the two KL
            divergences below (both of them, in the interior); inf for disjoint supports.
        kl_to_policy: KL(q* || policy).
        kl_to_teacher: KL(q* || teacher).
        status: One of `STATUSES`: names in NumPy and Gaussian results, an integer index into
            `STATUSES` in torch results.
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
