r"""alpha* in any dimension from draws of both parents, with error bars, and exact draws from q*.

Draws x come from a mixture m = beta policy + (1 - beta) teacher and are weighted by
w = policy^alpha teacher^(1 - alpha) / m, so that E w = Z(alpha) for every alpha: one sample serves
the whole path. The arithmetic mean is at least the geometric one, so w <= 1 at alpha = beta, hence
E w^2 <= E w and the effective share of the sample is

    (E w)^2 / E w^2 >= Z(alpha) >= exp(-C)            (at alpha = beta),

whatever the dimension; at other alpha it is at least exp(-C) / max(alpha / beta,
(1 - alpha) / (1 - beta)). A pilot sample puts beta near alpha*. The same inequality makes
rejection exact: draw from the mixture with beta = alpha, keep x with probability w; what is kept
follows q_alpha, and a share Z(alpha) of the proposals is kept.

Both parents have mass one, so c = (policy - teacher) / m has mean zero: a control variate, which
leaves close parents with errors in proportion to C, not to sqrt(C).
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy import ndarray
from numpy.random import Generator
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import logsumexp

from ..arguments import check_alphas
from .samples import ROUNDED, Parent, Sample, log_density_of
from .samples import Sampled as Sampled

ENOUGH = 100
"""Effective draws below which a result does not say `converged`: its error bars mean little."""


@dataclass(frozen=True, slots=True, eq=False)
class Estimate:
    """Numbers with their standard errors.

    Attributes:
        value: The estimates, one for each alpha.
        error: One standard error each, in the same unit.
    """

    value: ndarray
    error: ndarray


@dataclass(frozen=True, slots=True)
class MonteCarloBalance:
    """alpha* and its divergences, estimated from a sample. Every `_error` is one standard error.

    Attributes:
        alpha: The exponent on the policy that balances the sample, in [0, 1]; nan where disjoint.
        alpha_error: Large where the parents nearly agree, and q* does not depend on alpha.
        chernoff: -log Z at `alpha`, in nats.
        chernoff_error: In nats, as the others.
        kl_to_policy: KL(q* || policy), in nats.
        kl_to_policy_error: Its error.
        kl_to_teacher: KL(q* || teacher), in nats.
        kl_to_teacher_error: Its error.
        status: One of `qstar.STATUSES`, as the sample shows it: `disjoint` says that no draw was
            possible to both parents, a boundary that some were not and that the slope kept its
            sign.
        converged: Whether `effective_floor` is at least `ENOUGH` and the root was found.
        slope: The slope of log Z at `alpha`, in nats: zero in the interior.
        curvature: The second derivative of log Z, in nats squared.
        num_samples: How many draws the estimate rests on (the pilot's not counted).
        effective_samples: (sum w)^2 / sum w^2 at `alpha`.
        effective_floor: What theory guarantees of its expected counterpart, from the estimated C.
        proposal_weight: beta, the share of the policy in the proposal.
    """

    alpha: float
    alpha_error: float
    chernoff: float
    chernoff_error: float
    kl_to_policy: float
    kl_to_policy_error: float
    kl_to_teacher: float
    kl_to_teacher_error: float
    status: str
    converged: bool
    slope: float
    curvature: float
    num_samples: int
    effective_samples: float
    effective_floor: float
    proposal_weight: float


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """Exact draws from q_alpha by rejection.

    Attributes:
        points: The draws, one an entry of the first axis.
        num_proposals: How many proposals were judged for them.
        num_accepted: How many of these were kept; those beyond the count asked for are dropped.
    """

    points: ndarray
    num_proposals: int
    num_accepted: int

    @property
    def partition(self) -> Estimate:
        """Z(alpha), estimated by the share of proposals that were kept."""
        share = self.num_accepted / self.num_proposals
        error = np.sqrt(share * (1 - share) / self.num_proposals)
        return Estimate(np.asarray(share), np.asarray(error))


def solve_kl_symmetry(
    policy: Parent,
    teacher: Parent,
    *,
    num_samples: int,
    generator: Generator,
    num_pilot: int | None = None,
) -> MonteCarloBalance:
    """Estimate alpha* and the Chernoff information from draws, with standard errors.

    A pilot from the even mixture finds a rough alpha*, which becomes the weight of the proposal
    (kept within [0.05, 0.95]) of the sample that is solved.

    Args:
        policy: One parent.
        teacher: The other, over the same space.
        num_samples: Draws for the estimate. The error of C is about
            sqrt((exp(C) - 1) / num_samples), at most.
        generator: The only source of randomness.
        num_pilot: Draws for the pilot; a tenth of `num_samples` and at least 1000 by default.

    Raises:
        ValueError: Too few draws, or a log-density that is nan or of another shape, or that is
            -inf at a parent's own draw.
        ArithmeticError: A draw was rounded to a place without a finite density.
    """
    pilot_size = max(1000, num_samples // 10) if num_pilot is None else num_pilot
    pilot = solve_sample(draw_sample(policy, teacher, pilot_size, generator=generator))
    guess = 0.5 if np.isnan(pilot.alpha) else pilot.alpha
    weight = min(max(guess, 0.05), 0.95)
    sample = draw_sample(policy, teacher, num_samples, weight=weight, generator=generator)
    return solve_sample(sample)


def draw_sample(
    policy: Parent, teacher: Parent, num_samples: int, *, generator: Generator, weight: float = 0.5
) -> Sample:
    """Draw from weight policy + (1 - weight) teacher, in exact proportion (stratified).

    Raises:
        ValueError: See `solve_kl_symmetry`; or weight is not strictly between 0 and 1.
    """
    if num_samples < 10 or not 0 < weight < 1:
        raise ValueError(
            f"a sample takes at least 10 draws and a weight strictly between 0 and 1: got "
            f"{num_samples} and {weight}."
        )
    ours = min(max(round(weight * num_samples), 2), num_samples - 2)
    points = [
        policy.sample(ours, generator=generator),
        teacher.sample(num_samples - ours, generator=generator),
    ]
    rows = []
    for own, (name, parent) in enumerate((("policy", policy), ("teacher", teacher))):
        parts = [log_density_of(parent, x, name) for x in points]
        if np.isneginf(parts[own]).any():
            drawn = np.asarray(points[own], dtype=float)
            if not np.isfinite(drawn).all():
                raise ArithmeticError(ROUNDED.format(name=name, x=drawn[~np.isfinite(drawn)][0]))
            raise ValueError(
                f"the {name} must give a positive density to its own draws: it was -inf at one. "
                f"Its sampler and its log-density are of different distributions."
            )
        rows.append(np.concatenate(parts))
    sample = Sample(rows[0], rows[1], ours, 0.0)
    return replace(sample, control=_control(sample))


def log_partition(sample: Sample, alpha: ArrayLike) -> Estimate:
    """log Z(alpha) of one sample at every alpha, in nats, with standard errors.

    The draws are common to all alpha, and exp of the values is convex in alpha.

    Raises:
        ValueError: alpha leaves [0, 1].
    """
    at = check_alphas(alpha, allow_nan=False)
    found = [_log_partition(sample, float(a)) for a in at.flat]
    value, error = np.array(found).reshape(-1, 2).T
    return Estimate(value.reshape(at.shape), error.reshape(at.shape))


def solve_sample(sample: Sample) -> MonteCarloBalance:
    """The balance of one sample; `solve_kl_symmetry` without the drawing."""
    count = len(sample.log_policy)
    if not sample.shared.any():
        nan, inf = float("nan"), float("inf")
        return MonteCarloBalance(
            *(nan, nan, inf, nan, inf, nan, inf, nan, "disjoint", False),
            *(nan, nan, count, 0.0, 0.0, sample.weight),
        )
    status, alpha, solved = _root(sample)
    log_z, chernoff_error = _log_partition(sample, alpha)
    w, ratio = np.exp(sample.log_weights(alpha) - log_z), sample.log_ratio  # w in units of Z
    c = sample.control * sample.control_variate * np.exp(-log_z)
    slope_terms = w * ratio - c
    slope = 0.0 if status == "interior" else float(slope_terms.mean())
    curvature = float((w * (ratio - slope) ** 2).mean())
    path = w - (alpha - sample.weight) * c
    slope_influence = slope_terms - slope * path
    if status == "interior":
        alpha_error = sample.standard_error(slope_influence) / curvature
        errors = (chernoff_error, chernoff_error)
    else:
        alpha_error = 0.0 if status.startswith("boundary") else float("nan")
        errors = (
            sample.standard_error(-path - (1 - alpha) * slope_influence),
            sample.standard_error(-path + alpha * slope_influence),
        )
    chernoff = max(-log_z, 0.0)
    worst = max(alpha / sample.weight, (1 - alpha) / (1 - sample.weight))
    floor = count * float(np.exp(-chernoff)) / worst
    return MonteCarloBalance(
        alpha=alpha,
        alpha_error=alpha_error,
        chernoff=chernoff,
        chernoff_error=chernoff_error,
        kl_to_policy=max(chernoff - (1 - alpha) * slope, 0.0),
        kl_to_policy_error=errors[0],
        kl_to_teacher=max(chernoff + alpha * slope, 0.0),
        kl_to_teacher_error=errors[1],
        status=status,
        converged=bool(solved and floor >= ENOUGH),
        slope=slope,
        curvature=curvature,
        num_samples=count,
        effective_samples=effective_samples(sample, alpha),
        effective_floor=floor,
        proposal_weight=sample.weight,
    )


def effective_samples(sample: Sample, alpha: float) -> float:
    """(sum w)^2 / sum w^2: how many draws from q_alpha the weighted sample is worth (Kish)."""
    log_w = sample.log_weights(alpha)
    return float(np.exp(2 * logsumexp(log_w) - logsumexp(2 * log_w)))


def sample_geometric_mean(
    policy: Parent,
    teacher: Parent,
    alpha: float,
    count: int,
    *,
    generator: Generator,
    max_proposals: int = 10_000_000,
) -> Draws:
    """Draw exactly from q_alpha, needing neither Z nor a bound on the ratio of the parents.

    Propose from alpha policy + (1 - alpha) teacher and keep x with probability
    policy^alpha teacher^(1 - alpha) / (alpha policy + (1 - alpha) teacher) <= 1.

    Args:
        policy: One parent.
        teacher: The other.
        alpha: In [0, 1]. At alpha* a share exp(-C) of the proposals is kept.
        count: How many draws to return.
        generator: The only source of randomness.
        max_proposals: Where to give up.

    Raises:
        ArithmeticError: `max_proposals` were not enough: C is too large for rejection.
        ValueError: alpha leaves [0, 1], or a log-density is nan or +inf.
    """
    check_alphas(alpha, allow_nan=False)
    kept: list[ndarray] = []
    proposals = accepted = 0
    size = max(2 * count, 64)
    while accepted < count:
        if proposals + size > max_proposals:
            size = max_proposals - proposals
        if size <= 0:
            raise ArithmeticError(
                f"{proposals} proposals gave {accepted} of {count} draws: the parents are too far "
                f"apart for rejection (it keeps a share Z(alpha), at least exp(-C)). Raise "
                f"max_proposals, or weight a sample instead (`draw_sample`)."
            )
        ours = int(generator.binomial(size, alpha))
        x = np.concatenate(
            [
                policy.sample(ours, generator=generator),
                teacher.sample(size - ours, generator=generator),
            ]
        )[generator.permutation(size)]
        rows = Sample(
            log_density_of(policy, x, "policy"), log_density_of(teacher, x, "teacher"), 0, 0.0
        )
        log_accept = rows.log_weights(alpha, alpha)
        kept.append(x[np.log1p(-generator.random(size)) < log_accept])
        accepted += len(kept[-1])
        proposals += size
        rate = max(accepted, 1) / proposals
        size = min(int(1.2 * (count - accepted) / rate) + 64, 1_000_000)
    return Draws(np.concatenate(kept)[:count], proposals, accepted)


def _control(sample: Sample) -> float:
    """The share of the control variate that leaves the slope of Z least noisy, within [0, 1]."""
    if not sample.shared.any():
        return 0.0
    alpha = _root(sample)[1]
    slope = np.exp(sample.log_weights(alpha)) * sample.log_ratio
    c = sample.control_variate
    for part in (slice(None, sample.num_policy), slice(sample.num_policy, None)):
        slope[part] -= slope[part].mean()
        c[part] -= c[part].mean()
    noise = float(c @ c)
    return min(max(float(slope @ c) / noise, 0.0), 1.0) if noise > 0 else 0.0


def _root(sample: Sample) -> tuple[str, float, bool]:
    """(status, alpha, whether solved) from the slope of the sample's Z, which rises in alpha."""
    ratio, shared = sample.log_ratio, sample.shared
    if (ratio[shared] == 0).all():
        return "degenerate_all", 0.5, True
    c_mean = float(sample.control_variate.mean())

    def slope(alpha: float) -> float:
        log_w = sample.log_weights(alpha)
        top = log_w.max()
        scaled = float((np.exp(log_w - top) * ratio).mean())
        return scaled - sample.control * c_mean * float(np.exp(-top))

    if slope(0.0) >= 0:
        return "boundary_0", 0.0, not shared.all()
    if slope(1.0) <= 0:
        return "boundary_1", 1.0, not shared.all()
    alpha, root = brentq(slope, 0.0, 1.0, xtol=1e-14, full_output=True, disp=False)
    return "interior", float(alpha), bool(root.converged)


def _log_partition(sample: Sample, alpha: float) -> tuple[float, float]:
    """log of the estimated Z and its standard error."""
    log_w = sample.log_weights(alpha)
    top = float(log_w.max())
    if top == -np.inf:
        return top, float("nan")
    plain = np.exp(log_w - top)
    share = sample.control * (alpha - sample.weight)
    terms = plain - share * (sample.control_variate * np.exp(-top))
    if terms.mean() <= 0:  # the control overshot: fall back on the weights alone
        terms = plain
    mean = float(terms.mean())
    return top + float(np.log(mean)), sample.standard_error(terms / mean)
