"""Parents that share no exponential family: quadrature and summation, to near machine precision.

A quadrature rule with nodes x_i and weights w_i turns two densities into two rows w_i policy(x_i)
and w_i teacher(x_i), whose geometric mean is the rule applied to the geometric mean of the
densities. So the solver for rows (`qstar.solve_kl_symmetry`) solves densities too, with its
statuses for partly shared supports and its precision for close parents; what is left to do here is
to choose nodes, and to say how well they resolve everything that is integrated. Every rule is
checked on what is known: both parents must have mass one.

The nodes are chosen by our own refinement. SciPy's integrators return a number, not the nodes;
they work on values, not on their logarithms; and split at the same landmarks, at the known alpha*,
they lose these of 39 pairs on the line and 11 on the integers (C, to the digits of the tests):

    tanhsinh  11: tails beyond 1e300 (Student of 0.01: no digit), Gaussians 1000 apart (Z
              underflows), 2 digits of close parents (2e-10)
    quad_vec  10: the same, and both ends of Beta(1/2, 1/2) (inf); 65 s for the 39 integrals
    cubature  19: also pairs of Cauchy, logistic and Laplace distributions on the whole line
    nsum       2: Poisson(1e7), NegativeBinomial(1e6, 0.3)
"""

import math
from dataclasses import fields, replace

import numpy as np
from numpy import ndarray

from .. import rows as geometric
from ..result import Balance
from ..solve import solve_kl_symmetry as solve_rows
from ._axes import checked_log_density
from ._nodes import Rows, drop_sunk, log_path, quadrature_rows
from .base import INTEGERS, LABELS, LINE, SPACE, Distribution
from .compounds import Affine, Density, GeometricMean, Mixture
from .discrete import Categorical

MASS_TOLERANCE = 1e-6
"""How far the mass of a parent, found by quadrature, may be from 1 before it is refused."""
CONVERGED_MASS = 1e-10
"""How far it may be from 1 in a result that says `converged`."""
MAX_OUTCOMES = 2**20


def solve_kl_symmetry(policy: Distribution, teacher: Distribution) -> Balance[float, str, bool]:
    """Find alpha* by quadrature or summation; see `qstar.families`."""
    check_comparable(policy, teacher)
    alpha, settled = 0.5, False
    for _ in range(6):
        nodes = rows(policy, teacher, (alpha,))
        found = solve_rows(nodes.log_policy, nodes.log_teacher)
        settled = found.status == "disjoint" or abs(float(found.alpha) - alpha) < 1e-6
        if settled:
            break
        alpha = float(found.alpha)
    plain = {f.name: np.asarray(getattr(found, f.name)).item() for f in fields(found)}
    plain["converged"] = bool(found.converged and nodes.converged and settled)
    return Balance(**plain)


def log_partition(policy: Distribution, teacher: Distribution, alpha: ndarray) -> ndarray:
    """log Z(alpha) by quadrature or summation; see `qstar.families`."""
    return log_partition_and_slope(policy, teacher, np.asarray(alpha))[0]


def log_partition_and_slope(
    policy: Distribution, teacher: Distribution, alpha: ndarray
) -> tuple[ndarray, ndarray]:
    """log Z(alpha) and its derivative, KL(q_alpha || teacher) - KL(q_alpha || policy).

    At an end where that divergence is infinite so is the slope.
    """
    check_comparable(policy, teacher)
    inner = np.unique(alpha[(alpha > 0) & (alpha < 1)])
    if len(inner) > 9:  # the path changes smoothly: what resolves these resolves the rest
        inner = np.quantile(inner, np.linspace(0, 1, 9))
    at_ends = bool(((alpha == 0) | (alpha == 1)).any())
    nodes = _converged(rows(policy, teacher, tuple(inner), divergence=at_ends), "log Z")
    log_rows = nodes.log_policy, nodes.log_teacher
    slope = geometric.kl_gap(*log_rows, alpha)
    if at_ends:
        swapped = replace(nodes, log_policy=nodes.log_teacher, log_teacher=nodes.log_policy)
        for end, side in ((0.0, swapped), (1.0, nodes)):
            if _diverges(side, abs(float(geometric.kl_gap(*log_rows, end)))):
                slope = np.where(alpha == end, math.inf if end else -math.inf, slope)
    return geometric.log_partition(*log_rows, alpha), slope


def kl_to_parents(
    policy: Distribution, teacher: Distribution, alpha: ndarray
) -> tuple[ndarray, ndarray]:
    """KL(q_alpha || policy) and KL(q_alpha || teacher); see `qstar.families`."""
    log_z, slope = log_partition_and_slope(policy, teacher, alpha)
    if np.isneginf(log_z).any():
        raise _disjoint(policy, teacher)
    with np.errstate(invalid="ignore"):  # 0 * inf, at the end that needs no slope
        from_policy = np.where(alpha == 1, 0.0, (1 - alpha) * slope)
        from_teacher = np.where(alpha == 0, 0.0, alpha * slope)
    return np.maximum(-log_z - from_policy, 0.0), np.maximum(-log_z + from_teacher, 0.0)


def kl(p: Distribution, q: Distribution) -> float:
    """KL(p || q) by quadrature or summation; see `qstar.families`."""
    check_comparable(p, q)
    if p.outcomes != SPACE and (p.support[0] < q.support[0] or p.support[1] > q.support[1]):
        return math.inf  # however little of p is out there
    nodes = _converged(rows(p, q, (0.5,), divergence=True), "KL")
    value = float(geometric.kl(nodes.log_policy, nodes.log_teacher))
    return math.inf if _diverges(nodes, value) else value


def geometric_mean(policy: Distribution, teacher: Distribution, alpha: float) -> Distribution:
    """q_alpha by its density (for labels, by its probabilities); see `qstar.families`."""
    log_z = float(log_partition(policy, teacher, np.asarray(alpha)))
    if log_z == -math.inf:
        raise _disjoint(policy, teacher)
    if isinstance(policy, Categorical) and isinstance(teacher, Categorical):
        logs = policy.log_probabilities, teacher.log_probabilities
        return Categorical(np.exp(geometric.log_geometric_mean(*logs, alpha)))
    return GeometricMean(policy, teacher, alpha, log_z)


def _disjoint(policy: Distribution, teacher: Distribution) -> ValueError:
    return ValueError(
        f"policy and teacher must share an outcome to have a geometric mean: the supports of "
        f"{policy!r} and {teacher!r} do not meet. Mix a little of each into the other first, if "
        f"that is meant."
    )


def check_comparable(policy: Distribution, teacher: Distribution) -> None:
    """Raise a ValueError unless the two are distributions of the same kind of outcome, of one or
    two dimensions."""
    if policy.outcomes != teacher.outcomes:
        raise ValueError(
            f"policy and teacher must be distributions of the same kind of outcome: got "
            f"{policy.outcomes} and {teacher.outcomes}. Integers have no density on the line; a "
            f"mixture of the two kinds is not supported."
        )
    dimensions = [getattr(parent, "dimension", 2) for parent in (policy, teacher)]
    if policy.outcomes == SPACE and dimensions != [2, 2]:
        raise ValueError(
            f"quadrature serves parents on the line and in the plane: got dimensions {dimensions}. "
            f"Use qstar.families.montecarlo beyond two dimensions; one must match the other."
        )
    if policy.outcomes not in (LINE, INTEGERS, SPACE, LABELS):
        raise ValueError(
            f"policy and teacher must be members of one family where outcomes are "
            f"{policy.outcomes}: got {policy!r} and {teacher!r}."
        )


def rows(
    policy: Distribution,
    teacher: Distribution,
    alphas: tuple[float, ...],
    *,
    divergence: bool = False,
) -> Rows:
    """Nodes that resolve both parents, the paths at `alphas`, and their log-ratio.

    Args:
        policy: The parent with exponent alpha.
        teacher: The other; of the same kind of outcome.
        alphas: Exponents strictly between 0 and 1.
        divergence: Resolve policy log(policy / teacher) too.

    Raises:
        ValueError: The mass of a parent that the caller made is further than `MASS_TOLERANCE`
            from 1.
        ArithmeticError: That of a parent which has mass 1 by construction is.
    """
    if isinstance(policy, Categorical) and isinstance(teacher, Categorical):
        log_rows = policy.log_probabilities, teacher.log_probabilities
        return Rows(*log_rows, 0.0, True, np.zeros((len(policy.probabilities), 3)))
    if policy.outcomes == INTEGERS:
        found = _summation(policy, teacher, alphas)
    else:
        found = quadrature_rows(policy, teacher, alphas, divergence)
    masses = [float(np.exp(row).sum()) for row in (found.log_policy, found.log_teacher)]
    for name, parent, mass in zip(("policy", "teacher"), (policy, teacher), masses, strict=True):
        if not abs(mass - 1) <= MASS_TOLERANCE:
            raise _unresolved(name, parent, mass)
    close = max(abs(mass - 1) for mass in masses) <= CONVERGED_MASS
    return replace(found, converged=bool(found.converged and close))


def _unresolved(name: str, parent: Distribution, mass: float) -> Exception:
    """What to raise where the mass of a parent came out wrong; whose fault it is only the caller
    of an unknown density can tell."""
    work, remedy = "quadrature", "use qstar.families.montecarlo.solve_kl_symmetry"
    if parent.outcomes == INTEGERS:
        work = f"summation of at most {MAX_OUTCOMES} outcomes"
    else:
        remedy = f"change x in both parents so that tails are lighter and peaks wider, or {remedy}"
    if _has_mass_one(parent):
        return ArithmeticError(
            f"the {work} could not resolve the {name} {parent!r}: its mass came out as "
            f"{mass:.9g}, where it is 1. The distribution is not at fault; to go on, {remedy}."
        )
    return ValueError(
        f"either the {name} is not normalised or the {work} did not resolve it: its mass came out "
        f"as {mass:.9g}, for {parent!r}. Normalise it; if it is, name its peaks, kinks and scales "
        f"(`Density.places`), or {remedy}."
    )


def _has_mass_one(parent: Distribution) -> bool:
    """Whether it is normalised by construction, so that no caller can have got its mass wrong."""
    if isinstance(parent, Mixture):
        return all(_has_mass_one(part) for part in parent.components)
    if isinstance(parent, Affine):
        return _has_mass_one(parent.base)
    ours = type(parent).__module__.startswith(f"{__package__}.")
    return ours and not isinstance(parent, (Density, GeometricMean))


def _converged(nodes: Rows, what: str) -> Rows:
    if not nodes.converged:
        masses = [float(np.exp(row).sum()) for row in (nodes.log_policy, nodes.log_teacher)]
        raise ArithmeticError(
            f"{what} did not converge: {len(nodes.log_policy)} nodes leave a relative error of "
            f"about {nodes.error:.1e}, and masses of {masses} where 1 was expected. Name the "
            f"peaks, kinks and scales of the parents (`Density.places`)."
        )
    return nodes


def _diverges(nodes: Rows, value: float) -> bool:
    """Whether KL(policy || teacher) is infinite, judged by how its integrand leaves for a tail.

    Raises:
        ArithmeticError: The integrand decays, but too slowly to be integrated.
    """
    if not math.isfinite(value):
        return True
    shared = np.isfinite(nodes.log_policy) & np.isfinite(nodes.log_teacher)
    log_ratio = np.where(shared, nodes.log_policy, 0.0) - np.where(shared, nodes.log_teacher, 0.0)
    terms = np.exp(nodes.log_policy) * np.abs(log_ratio)
    for tail in np.unique(nodes.reach[nodes.reach[:, 0] > 0, 0]):
        here = nodes.reach[:, 0] == tail
        along, log_step, left = nodes.reach[here, 1], nodes.reach[here, 2], terms[here]
        last = along.max()
        if np.isnan(log_step).any():  # in the plane: sums over the last two tenths of the tail
            missing = left[along > 0.9 * last].sum()
            flat = missing > 0.7 * left[(along > 0.8 * last) & (along <= 0.9 * last)].sum()
        else:  # how the integrand decays over the outer half, and what an exponential leaves
            height = left / np.exp(log_step)
            at_last, at_half = (height[np.argmin(np.abs(along - at))] for at in (last, last / 2))
            with np.errstate(divide="ignore", invalid="ignore"):
                decay = float(np.log(at_half) - np.log(at_last))
            flat = decay < 0.05
            missing = at_last * last / 2 / max(decay, 0.05) if at_last else 0.0
        if missing <= 1e-10 * value:
            continue
        if flat:
            return True
        raise ArithmeticError(
            f"KL did not converge: a tail beyond the reach of float64 still holds about "
            f"{missing / value:.1e} of it. Compare the parents after a transformation of x that "
            f"makes their tails lighter."
        )
    return False


def _summation(policy: Distribution, teacher: Distribution, alphas: tuple[float, ...]) -> Rows:
    """All outcomes from where both parents vanish to where they do, `MAX_OUTCOMES` at most."""
    parents = (policy, teacher)
    lows, highs = zip(policy.support, teacher.support, strict=True)
    low, high = min(lows), max(highs)
    places = [*policy.landmarks, *teacher.landmarks]
    first = max(low, math.floor(min(place - 12 * scale for place, scale in places)))
    last = min(high, math.ceil(max(place + 12 * scale for place, scale in places)))
    last = max(first, last)
    while True:
        full = last - first >= MAX_OUTCOMES
        last = first + MAX_OUTCOMES if full else last
        x = np.arange(first, last + 1)
        log_policy, log_teacher = (
            np.where(
                (x >= parent.support[0]) & (x <= parent.support[1]),
                checked_log_density(parent, x),
                -np.inf,
            )
            for parent in parents
        )
        heights = [row[[0, -1]] - row.max() for row in (log_policy, log_teacher)]
        low_open, high_open = np.max(heights, axis=0) > -50
        low_open, high_open = low_open and first > low, high_open and last < high
        if full or not (low_open or high_open):
            break
        width = last - first + 1
        first = max(low, first - width) if low_open else first
        last = min(high, last + width) if high_open else last
    # Where a tail had to be cut, what is beyond the last outcome is about that outcome's share
    # times its distance.
    centre = places[0][0]
    beyond = 0.0
    for alpha in (0.0, *alphas, 1.0):
        path = log_path(log_policy, log_teacher, alpha)
        if (top := path.max()) > -np.inf:
            share = np.exp(path[[0, -1]] - top) * np.abs(x[[0, -1]] - centre)
            beyond += float((share * (low_open, high_open)).sum() / np.exp(path - top).sum())
    cut = np.where(x > centre, high_open, low_open)
    along = np.log1p(np.abs(x - centre))
    reach = np.stack([np.where(cut, 1.0 + (x > centre), 0.0), along, -along], axis=1)
    return drop_sunk(log_policy, log_teacher, beyond, beyond < 1e-10, reach)
