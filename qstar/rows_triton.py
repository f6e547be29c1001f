# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-not-found,import-untyped,misc"
"""alpha* for a batch of vocabularies on an accelerator: `qstar.solve_torch` in fused kernels.

The same statuses, bracket, steps and stopping rule, in float32, and no word to the host. Two sweeps
begin a row: one for its totals and the range of the log-ratio, one for both ends of the path and
its middle. Each later sweep is one evaluation, of everything that is wanted of one alpha at once.

A row of at most `ALONE` outcomes is one program, which keeps it in registers. A longer one is a
chain of kernels of many programs to the row, each of one warp: every program first
combines what the programs of the kernel before it left, and so knows the next alpha. A row that has
stopped costs the kernels after it one read. What is left after `CHAIN` evaluations, one program to
the row finishes.

No sum is a small difference: every tile knows its mass, its mean and the squares about its own
mean, and they are combined with positive terms only.

Needs Triton, which comes with torch's builds for accelerators.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ALONE = 4096
"""Outcomes up to which a row is one program."""
FINE = 2**15
"""Outcomes up to which a program of the chain treats 512 of them, and beyond which 1024."""
CHAIN = 5
"""Evaluations that the chain makes, the middle of the path among them."""

INTERIOR = tl.constexpr(0)
BOUNDARY_0 = tl.constexpr(1)
BOUNDARY_1 = tl.constexpr(2)
DEGENERATE_ALL = tl.constexpr(3)
DISJOINT = tl.constexpr(4)
INVALID = tl.constexpr(5)

EPS = tl.constexpr(2.0**-23)
LARGEST = tl.constexpr(3.4028234663852886e38)
LOWEST = tl.constexpr(-3.4028234663852886e38)
INFINITY = tl.constexpr(float("inf"))
LOG2_E = tl.constexpr(1.4426950216293335)  # as float32 has it
LOG2_E_REST = tl.constexpr(1.9259629911266175e-8)
LN_2 = tl.constexpr(0.6931471805599453)

NORMS = tl.constexpr(9)  # what a tile leaves of the first sweep
ENDS = tl.constexpr(9)  # of the second, before the middle of the path
POINT = tl.constexpr(12)  # of one alpha
SLOTS = tl.constexpr(24)  # what a kernel leaves of a row to the next


# --- Functions that the device has only in part --------------------------------------------------


@triton.jit
def _exp(x):
    """e^x, to about two units in the last place; the device's own loses eps |x|."""
    x = tl.where(x < -200.0, -200.0, x)
    y = x * LOG2_E
    rest = tl.fma(x, LOG2_E, -y) + x * LOG2_E_REST
    return tl.exp2(y) * (1.0 + rest * LN_2)


@triton.jit
def _expm1(x):
    """e^x - 1 for |x| < 1, by its series."""
    y = 1.0 + x * (1.0 / 11)
    y = 1.0 + x * (1.0 / 10) * y
    y = 1.0 + x * (1.0 / 9) * y
    y = 1.0 + x * (1.0 / 8) * y
    y = 1.0 + x * (1.0 / 7) * y
    y = 1.0 + x * (1.0 / 6) * y
    y = 1.0 + x * (1.0 / 5) * y
    y = 1.0 + x * (1.0 / 4) * y
    y = 1.0 + x * (1.0 / 3) * y
    y = 1.0 + x * (1.0 / 2) * y
    return x * y


@triton.jit
def _log1p(x):
    """log(1 + x), near 0 as 2 artanh(x / (2 + x))."""
    s = x / (2.0 + x)
    u = s * s
    y = 1.0 / 15 + u * (1.0 / 17)
    y = 1.0 / 13 + u * y
    y = 1.0 / 11 + u * y
    y = 1.0 / 9 + u * y
    y = 1.0 / 7 + u * y
    y = 1.0 / 5 + u * y
    y = 1.0 / 3 + u * y
    y = 2.0 * s * (1.0 + u * y)
    return tl.where((x > -0.5) & (x < 1.0), y, tl.log(1.0 + x))


@triton.jit
def _finite(x):
    return (x > -INFINITY) & (x < INFINITY)


# --- What one tile leaves ------------------------------------------------------------------------


@triton.jit
def _load(policy, teacher, row, vocab, block, size: tl.constexpr):
    """Both rows over a tile; beyond the vocabulary -inf, as off both supports."""
    place = block * size + tl.arange(0, size)
    on = place < vocab
    start = row * vocab
    p = tl.load(policy + start + place, mask=on, other=-float("inf"))
    t = tl.load(teacher + start + place, mask=on, other=-float("inf"))
    return p, t


@triton.jit
def _norms(p, t):
    """Totals of a tile, what they differ by, and the range of its log-ratio."""
    shared = _finite(p) & _finite(t)
    ratio = tl.where(shared, p - t, 0.0)
    close = shared & (tl.abs(ratio) < 1.0)
    p_mass = _exp(p)
    t_mass = _exp(t)
    growth = tl.where(close, t_mass * _expm1(tl.where(close, ratio, 0.0)), p_mass - t_mass)
    return (
        tl.sum(p_mass, 0),
        tl.sum(t_mass, 0),
        tl.sum(growth, 0),
        tl.sum(tl.where(shared, 0.0, t_mass), 0),
        tl.sum(tl.where(p == -INFINITY, 0.0, p_mass * tl.abs(p)), 0),
        tl.sum(tl.where(t == -INFINITY, 0.0, t_mass * tl.abs(t)), 0),
        tl.max(tl.where(shared, ratio, -INFINITY), 0),
        tl.max(tl.where(shared, -ratio, -INFINITY), 0),
        tl.max(tl.where((p == -INFINITY) != (t == -INFINITY), 1.0, 0.0), 0),
    )


@triton.jit
def _normalised(p, t, log_total, shift):
    """(base, ratio, size) as `solve_torch._Path` has them."""
    shared = _finite(p) & _finite(t)
    teacher = t - log_total
    ratio = tl.where(shared, (p - t) - shift, 0.0)
    size = tl.minimum(tl.where(shared, -(2.0 * teacher + ratio), 0.0), LARGEST)
    return tl.where(shared, teacher, -INFINITY), ratio, size


@triton.jit
def _point(base, ratio, size, alpha):
    """A tile at one alpha.

    (top of the path, mass, mean log-ratio, squares about it, size: relative to that top;
    sum of path - teacher; top, first and second moment of what raises the slope; of what lowers it)
    """
    path = base + alpha * ratio
    up = ratio > 0
    down = ratio < 0
    top_up = tl.max(tl.where(up, path, -INFINITY), 0)
    top_down = tl.max(tl.where(down, path, -INFINITY), 0)
    top_level = tl.max(tl.where(up | down, -INFINITY, path), 0)
    top = tl.maximum(tl.maximum(top_up, top_down), top_level)
    floor = tl.maximum(top, LOWEST)
    # One exponential for an outcome, relative to the largest on its side: no side underflows.
    above = tl.where(up, top_up, tl.where(down, top_down, top_level))
    weight = _exp(path - tl.maximum(above, LOWEST))
    side = tl.where(
        up, _exp(top_up - floor), tl.where(down, _exp(top_down - floor), _exp(top_level - floor))
    )
    mass = weight * side
    total = tl.sum(mass, 0)
    mean = tl.sum(mass * ratio, 0) / tl.maximum(total, 0.5)  # a tile holds its top, or nothing
    deviation = ratio - mean
    # One factor at a time: the square of a huge log-ratio overflows, times a weight of 0.
    squares = tl.sum(mass * deviation * deviation, 0)
    close = tl.abs(ratio) < 1.0
    teacher = _exp(base)
    growth = tl.where(
        close, teacher * _expm1(tl.where(close, alpha * ratio, 0.0)), mass * _exp(top) - teacher
    )
    pull = tl.abs(ratio)
    first = weight * pull
    second = first * pull
    return (
        top,
        total,
        mean,
        squares,
        tl.sum(mass * size, 0),
        tl.sum(growth, 0),
        top_up,
        tl.sum(tl.where(up, first, 0.0), 0),
        tl.sum(tl.where(up, second, 0.0), 0),
        top_down,
        tl.sum(tl.where(down, first, 0.0), 0),
        tl.sum(tl.where(down, second, 0.0), 0),
    )


@triton.jit
def _end_point(path, ratio, size):
    """A tile at an end of the path: (top; mass, mean log-ratio, size: relative to that top)."""
    top = tl.max(path, 0)
    mass = _exp(path - tl.maximum(top, LOWEST))
    total = tl.sum(mass, 0)
    return top, total, tl.sum(mass * ratio, 0) / tl.maximum(total, 0.5), tl.sum(mass * size, 0)


@triton.jit
def _ends(base, ratio, size):
    """A tile at both ends, and whether its rows differ at all."""
    top_0, total_0, mean_0, size_0 = _end_point(base, ratio, size)
    top_1, total_1, mean_1, size_1 = _end_point(base + ratio, ratio, size)
    differ = tl.max(tl.where(tl.abs(ratio) <= (1.0 + size) * (2 * EPS), 0.0, 1.0), 0)
    return top_0, total_0, mean_0, size_0, top_1, total_1, mean_1, size_1, differ


# --- What all tiles of a row say together --------------------------------------------------------


@triton.jit
def _totals(
    p_total, t_total, growth, outside, p_size, t_size, highest, lowest, partial,
    p_allowed, t_allowed, p_slack, t_slack, most,
):  # fmt: skip
    """(log of the teacher's total, the shift of the log-ratio, the teacher's mass off the shared
    support, the highest alpha, partial, whether anything is shared, valid), the last three 0 or 1.
    """
    p_total, t_total = tl.sum(p_total, 0), tl.sum(t_total, 0)
    p_allowed += p_slack * tl.minimum(tl.sum(p_size, 0), most)
    t_allowed += t_slack * tl.minimum(tl.sum(t_size, 0), most)
    valid = (tl.abs(p_total - 1.0) <= p_allowed) & (tl.abs(t_total - 1.0) <= t_allowed)
    highest, lowest = tl.max(highest, 0), tl.max(lowest, 0)
    partial = tl.max(partial, 0)
    # The bracket of agreeing supports: B(R), R the range of the log-ratio.
    extent = tl.minimum(highest / 2 + lowest / 2, LARGEST / 4) * 2
    near = -_expm1(tl.where(extent < 1.0, -extent, 0.0)) / extent
    far = (1.0 - _exp(-extent)) / extent
    bound = 1.0 + tl.where(extent < 1.0, _log1p(near - 1.0), tl.log(far)) / extent
    bound = tl.where(extent < 0.01, 0.5 + extent / 24, bound)
    bound = tl.where(partial > 0, 1.0, tl.minimum(bound + 1e-3, 1.0))
    return (
        _log1p(t_total - 1.0),
        _log1p(tl.sum(growth, 0) / t_total),
        tl.sum(outside, 0) / t_total,
        bound,
        partial,
        tl.where(highest > -INFINITY, 1.0, 0.0),
        tl.where(valid, 1.0, 0.0),
    )


@triton.jit
def _moments(top, total, mean, size):
    """(top, the masses relative to it and their sum, slope, size) of a row from its tiles."""
    peak = tl.max(top, 0)
    scale = _exp(top - tl.maximum(peak, LOWEST))
    mass = scale * total
    whole = tl.sum(mass, 0)
    slope = tl.sum(tl.where(mass > 0, mass * mean, 0.0), 0) / whole
    return peak, scale, mass, whole, slope, tl.sum(tl.where(mass > 0, scale * size, 0.0), 0) / whole


@triton.jit
def _end(top, total, mean, size):
    """(log Z, slope, size) of a row at an end of the path."""
    peak, _, _, whole, slope, size = _moments(top, total, mean, size)
    return peak + tl.log(whole), slope, size


@triton.jit
def _side(top, first, second):
    """(top, first, second moment) of what raises the slope, or lowers it."""
    peak = tl.max(top, 0)
    scale = _exp(top - tl.maximum(peak, LOWEST))
    first = tl.sum(tl.where(scale > 0, scale * first, 0.0), 0)
    return peak, first, tl.sum(tl.where(scale > 0, scale * second, 0.0), 0)


@triton.jit
def _evaluation(
    top, total, mean, squares, size, growth, top_up, up, up_2, top_down, down, down_2
):  # fmt: skip
    """(log Z, growth, slope, curvature, size, log-odds, their derivative) at one alpha."""
    peak, scale, mass, whole, slope, size = _moments(top, total, mean, size)
    off = tl.where(mass > 0, mean - slope, 0.0)
    inside = tl.where(mass > 0, scale * squares, 0.0)
    curvature = (tl.sum(inside, 0) + tl.sum(mass * off * off, 0)) / whole
    top_up, up, up_2 = _side(top_up, up, up_2)
    top_down, down, down_2 = _side(top_down, down, down_2)
    lead = top_up - top_down
    odds = up / down * _exp(lead)
    near = (tl.abs(lead) < 80.0) & (odds > 0.6) & (odds < 1.8)
    log_odds = tl.where(near, _log1p(odds - 1.0), lead + (tl.log(up) - tl.log(down)))
    gain = up_2 / up + down_2 / down
    return peak + tl.log(whole), tl.sum(growth, 0), slope, curvature, size, log_odds, gain


# --- The search ----------------------------------------------------------------------------------


@triton.jit
def _judge(
    alpha, log_z, slope, curvature, size, log_odds, gain,
    low, high, left, left_slope, right, right_slope, last, count, tolerance,
):  # fmt: skip
    """After an evaluation: (next alpha, bracket, tangents, log-odds, whether the row is done)."""
    deviation = tl.sqrt(curvature)
    off = tl.abs(slope)
    floor = EPS / 2 * (deviation * (1.0 + size) + curvature)
    width = high - low
    done = (off <= 2.0 * tolerance * deviation) | (off <= floor)
    done = done | (off * width <= 4.0 * tolerance * tolerance) | (width <= 4 * EPS)
    falls = slope < 0
    rises = slope > 0
    low = tl.where(falls, alpha, low)
    high = tl.where(rises, alpha, high)
    left = tl.where(falls, log_z - alpha * slope, left)
    left_slope = tl.where(falls, slope, left_slope)
    right = tl.where(rises, log_z - alpha * slope, right)
    right_slope = tl.where(rises, slope, right_slope)
    newton = alpha - log_odds / gain
    corner = (left - right) / (right_slope - left_slope)
    new = (low + high) / 2
    meet = (count % 3 != 0) & (low < corner) & (corner < high)
    new = tl.where(meet, corner, new)
    better = (tl.abs(log_odds) * 2.0 <= tl.abs(last)) | ((count % 3 != 0) & (log_odds * last < 0))
    new = tl.where((low < newton) & (newton < high) & better, newton, new)
    return (
        new, low, high, left, left_slope, right, right_slope,
        log_odds, tl.where(done, 1, 0).to(tl.int32),
    )  # fmt: skip


@triton.jit
def _begin(
    bound, partial, shares, valid, differ,
    log_z_0, slope_0, size_0, log_z_1, slope_1, size_1,
    log_z, slope, curvature, size, log_odds, gain, tolerance, max_passes,
):  # fmt: skip
    """The statuses, and the search after its first evaluation, in the middle of the path.

    `stop` is 1 where that was the last one; alpha is then where it was. A boundary is still to be
    evaluated.
    """
    some = partial > 0
    status = tl.where(some & (slope_1 <= (1.0 + size_1) * (2 * EPS)), BOUNDARY_1, INTERIOR)
    status = tl.where(some & (slope_0 >= (1.0 + size_0) * (-2 * EPS)), BOUNDARY_0, status)
    status = tl.where(differ > 0, status, DEGENERATE_ALL)
    status = tl.where(shares > 0, status, DISJOINT)
    status = tl.where(valid > 0, status, INVALID).to(tl.int32)
    half = bound * 0.0 + 0.5
    alpha, low, high, left, left_slope, right, right_slope, last, done = _judge(
        half, log_z, slope, curvature, size, log_odds, gain, 1.0 - bound, bound,
        log_z_0, slope_0, log_z_1 - slope_1, slope_1, half + INFINITY, 1, tolerance,
    )  # fmt: skip
    done = tl.where(status == INTERIOR, done, tl.where(status > DEGENERATE_ALL, 0, 1))
    over = (done > 0) | (max_passes <= 1) | (status > DEGENERATE_ALL)
    alpha = tl.where(over, half, alpha)
    alpha = tl.where(status == BOUNDARY_0, 0.0, tl.where(status == BOUNDARY_1, 1.0, alpha))
    over = over & (status != BOUNDARY_0) & (status != BOUNDARY_1)
    stop = tl.where(over, 1, 0).to(tl.int32)
    return alpha, low, high, left, left_slope, right, right_slope, last, status, stop, done


@triton.jit
def _go_on(
    alpha, log_z, slope, curvature, size, log_odds, gain,
    low, high, left, left_slope, right, right_slope, last,
    status, count, tolerance, max_passes,
):  # fmt: skip
    """The search after a later evaluation."""
    new, low, high, left, left_slope, right, right_slope, last, done = _judge(
        alpha, log_z, slope, curvature, size, log_odds, gain,
        low, high, left, left_slope, right, right_slope, last, count, tolerance,
    )  # fmt: skip
    done = tl.where(status == INTERIOR, done, 1)
    stop = tl.where((done > 0) | (count >= max_passes), 1, 0).to(tl.int32)
    alpha = tl.where(stop > 0, alpha, new)
    return alpha, low, high, left, left_slope, right, right_slope, last, stop, done


@triton.jit
def _not_negative(x):
    return tl.where(x < 0, 0.0, x) + 0.0  # nan stays, and -0.0 does not


@triton.jit
def _write(
    out, codes, passes, row, rows,
    alpha, log_z, growth, slope, curvature, outside, status, count, done,
):  # fmt: skip
    """The fields of a `Balance`."""
    # Between close parents Z is 1 - a little: what each outcome lacks was summed, not what it has.
    log_z = tl.where(log_z > -0.5, _log1p(growth - outside), log_z)
    chernoff = _not_negative(-log_z)
    to_policy = _not_negative(chernoff + (alpha - 1.0) * slope)
    to_teacher = _not_negative(chernoff + alpha * slope)
    none = status > DEGENERATE_ALL
    nothing = tl.where(status == DISJOINT, INFINITY, float("nan"))
    tl.store(out + row, tl.where(none, float("nan"), alpha))
    tl.store(out + rows + row, tl.where(none, nothing, chernoff))
    tl.store(out + 2 * rows + row, tl.where(none, nothing, to_policy))
    tl.store(out + 3 * rows + row, tl.where(none, nothing, to_teacher))
    tl.store(out + 4 * rows + row, tl.where(none, float("nan"), slope))
    tl.store(out + 5 * rows + row, tl.where(none, float("nan"), curvature))
    tl.store(codes + row, status.to(tl.int8))
    tl.store(codes + rows + row, done.to(tl.int8))
    tl.store(passes + row, tl.where(status == INTERIOR, count + 2, 2).to(tl.int32))


# --- One program to a row ------------------------------------------------------------------------


@triton.jit
def _sweep_norms(policy, teacher, row, vocab, size: tl.constexpr, wide: tl.constexpr):
    """`_norms` of every tile of a row, as vectors of `wide` entries."""
    place = tl.arange(0, wide)
    a = tl.full([wide], 0.0, tl.float32)
    b, c, d, e, f, i = a, a, a, a, a, a
    g = tl.full([wide], float("-inf"), tl.float32)
    h = g
    block = tl.full([], 0, tl.int32)
    while block * size < vocab:
        p, t = _load(policy, teacher, row, vocab, block, size)
        a_, b_, c_, d_, e_, f_, g_, h_, i_ = _norms(p, t)
        here = place == block
        a, b, c = tl.where(here, a_, a), tl.where(here, b_, b), tl.where(here, c_, c)
        d, e, f = tl.where(here, d_, d), tl.where(here, e_, e), tl.where(here, f_, f)
        g, h, i = tl.where(here, g_, g), tl.where(here, h_, h), tl.where(here, i_, i)
        block += 1
    return a, b, c, d, e, f, g, h, i


@triton.jit
def _sweep_ends(
    policy, teacher, row, vocab, log_total, shift, size: tl.constexpr, wide: tl.constexpr
):  # fmt: skip
    """`_ends` of every tile of a row."""
    place = tl.arange(0, wide)
    a = tl.full([wide], float("-inf"), tl.float32)
    e = a
    b = tl.full([wide], 0.0, tl.float32)
    c, d, f, g, h, i = b, b, b, b, b, b
    block = tl.full([], 0, tl.int32)
    while block * size < vocab:
        p, t = _load(policy, teacher, row, vocab, block, size)
        base, ratio, length = _normalised(p, t, log_total, shift)
        a_, b_, c_, d_, e_, f_, g_, h_, i_ = _ends(base, ratio, length)
        here = place == block
        a, b, c = tl.where(here, a_, a), tl.where(here, b_, b), tl.where(here, c_, c)
        d, e, f = tl.where(here, d_, d), tl.where(here, e_, e), tl.where(here, f_, f)
        g, h, i = tl.where(here, g_, g), tl.where(here, h_, h), tl.where(here, i_, i)
        block += 1
    return a, b, c, d, e, f, g, h, i


@triton.jit
def _sweep(
    policy, teacher, row, vocab, log_total, shift, alpha, size: tl.constexpr, wide: tl.constexpr
):  # fmt: skip
    """`_evaluation` of a row at one alpha."""
    place = tl.arange(0, wide)
    a = tl.full([wide], float("-inf"), tl.float32)
    g, j = a, a
    b = tl.full([wide], 0.0, tl.float32)
    c, d, e, f, h, i, k, m = b, b, b, b, b, b, b, b
    block = tl.full([], 0, tl.int32)
    while block * size < vocab:
        p, t = _load(policy, teacher, row, vocab, block, size)
        base, ratio, length = _normalised(p, t, log_total, shift)
        a_, b_, c_, d_, e_, f_, g_, h_, i_, j_, k_, m_ = _point(base, ratio, length, alpha)
        here = place == block
        a, b, c = tl.where(here, a_, a), tl.where(here, b_, b), tl.where(here, c_, c)
        d, e, f = tl.where(here, d_, d), tl.where(here, e_, e), tl.where(here, f_, f)
        g, h, i = tl.where(here, g_, g), tl.where(here, h_, h), tl.where(here, i_, i)
        j, k, m = tl.where(here, j_, j), tl.where(here, k_, k), tl.where(here, m_, m)
        block += 1
    return _evaluation(a, b, c, d, e, f, g, h, i, j, k, m)


@triton.jit(do_not_specialize=["rows", "vocab", "max_passes"])
def _alone(
    policy, teacher, out, codes, passes, rows, vocab,
    p_allowed, t_allowed, p_slack, t_slack, most, tolerance, max_passes,
    size: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """A whole row."""
    row = tl.program_id(0).to(tl.int64)
    a, b, c, d, e, f, g, h, i = _sweep_norms(policy, teacher, row, vocab, size, wide)
    log_total, shift, outside, bound, partial, shares, valid = _totals(
        a, b, c, d, e, f, g, h, i, p_allowed, t_allowed, p_slack, t_slack, most
    )
    a, b, c, d, e, f, g, h, i = _sweep_ends(
        policy, teacher, row, vocab, log_total, shift, size, wide
    )
    log_z_0, slope_0, size_0 = _end(a, b, c, d)
    log_z_1, slope_1, size_1 = _end(e, f, g, h)
    log_z, growth, slope, curvature, length, log_odds, gain = _sweep(
        policy, teacher, row, vocab, log_total, shift, bound * 0.0 + 0.5, size, wide
    )
    alpha, low, high, left, left_slope, right, right_slope, last, status, stop, done = _begin(
        bound, partial, shares, valid, tl.max(i, 0),
        log_z_0, slope_0, size_0, log_z_1, slope_1, size_1,
        log_z, slope, curvature, length, log_odds, gain, tolerance, max_passes,
    )  # fmt: skip
    count = tl.full([], 1, tl.int32)
    while stop == 0:
        count += 1
        log_z, growth, slope, curvature, length, log_odds, gain = _sweep(
            policy, teacher, row, vocab, log_total, shift, alpha, size, wide
        )
        alpha, low, high, left, left_slope, right, right_slope, last, stop, done = _go_on(
            alpha, log_z, slope, curvature, length, log_odds, gain,
            low, high, left, left_slope, right, right_slope, last,
            status, count, tolerance, max_passes,
        )  # fmt: skip
    _write(
        out, codes, passes, row, rows,
        alpha, log_z, growth, slope, curvature, outside, status, count, done,
    )  # fmt: skip


# --- Many programs to a row ----------------------------------------------------------------------


@triton.jit
def _read(part, row, at: tl.constexpr, fields: tl.constexpr, there, place, wide: tl.constexpr):
    """One field of every tile of a row; what may be a top is -inf beyond them."""
    return tl.load(part + (row * fields + at) * wide + place, mask=there, other=0.0)


@triton.jit
def _read_top(part, row, at: tl.constexpr, fields: tl.constexpr, there, place, wide: tl.constexpr):
    base = part + (row * fields + at) * wide
    return tl.load(base + place, mask=there, other=-float("inf"))


@triton.jit
def _read_point(part, row, at: tl.constexpr, fields: tl.constexpr, blocks, wide: tl.constexpr):
    """`_evaluation` of a row from what its tiles left."""
    place = tl.arange(0, wide)
    there = place < blocks
    return _evaluation(
        _read_top(part, row, at, fields, there, place, wide),
        _read(part, row, at + 1, fields, there, place, wide),
        _read(part, row, at + 2, fields, there, place, wide),
        _read(part, row, at + 3, fields, there, place, wide),
        _read(part, row, at + 4, fields, there, place, wide),
        _read(part, row, at + 5, fields, there, place, wide),
        _read_top(part, row, at + 6, fields, there, place, wide),
        _read(part, row, at + 7, fields, there, place, wide),
        _read(part, row, at + 8, fields, there, place, wide),
        _read_top(part, row, at + 9, fields, there, place, wide),
        _read(part, row, at + 10, fields, there, place, wide),
        _read(part, row, at + 11, fields, there, place, wide),
    )


@triton.jit
def _leave_9(part, wide: tl.constexpr, a, b, c, d, e, f, g, h, i):
    tl.store(part, a)
    tl.store(part + wide, b)
    tl.store(part + 2 * wide, c)
    tl.store(part + 3 * wide, d)
    tl.store(part + 4 * wide, e)
    tl.store(part + 5 * wide, f)
    tl.store(part + 6 * wide, g)
    tl.store(part + 7 * wide, h)
    tl.store(part + 8 * wide, i)


@triton.jit
def _leave_12(part, wide: tl.constexpr, a, b, c, d, e, f, g, h, i, j, k, m):
    _leave_9(part, wide, a, b, c, d, e, f, g, h, i)
    tl.store(part + 9 * wide, j)
    tl.store(part + 10 * wide, k)
    tl.store(part + 11 * wide, m)


@triton.jit
def _chain_norms(policy, teacher, norms, vocab, size: tl.constexpr, wide: tl.constexpr):
    """The first sweep."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p, t = _load(policy, teacher, row, vocab, block, size)
    a, b, c, d, e, f, g, h, i = _norms(p, t)
    _leave_9(norms + row * NORMS * wide + block, wide, a, b, c, d, e, f, g, h, i)


@triton.jit
def _chain_ends(
    policy, teacher, norms, ends, state, vocab,
    p_allowed, t_allowed, p_slack, t_slack, most, size: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """The second sweep: both ends, and the middle."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p, t = _load(policy, teacher, row, vocab, block, size)
    place = tl.arange(0, wide)
    there = place < tl.cdiv(vocab, size)
    log_total, shift, outside, bound, partial, shares, valid = _totals(
        _read(norms, row, 0, NORMS, there, place, wide),
        _read(norms, row, 1, NORMS, there, place, wide),
        _read(norms, row, 2, NORMS, there, place, wide),
        _read(norms, row, 3, NORMS, there, place, wide),
        _read(norms, row, 4, NORMS, there, place, wide),
        _read(norms, row, 5, NORMS, there, place, wide),
        _read_top(norms, row, 6, NORMS, there, place, wide),
        _read_top(norms, row, 7, NORMS, there, place, wide),
        _read(norms, row, 8, NORMS, there, place, wide),
        p_allowed, t_allowed, p_slack, t_slack, most,
    )  # fmt: skip
    if block == 0:
        slot = state + row * SLOTS
        tl.store(slot, log_total)
        tl.store(slot + 1, shift)
        tl.store(slot + 2, outside)
        tl.store(slot + 3, bound)
        tl.store(slot + 4, partial)
        tl.store(slot + 5, shares)
        tl.store(slot + 6, valid)
        tl.store(slot + 16, 0.0)
    base, ratio, length = _normalised(p, t, log_total, shift)
    part = ends + row * (ENDS + POINT) * wide + block
    a, b, c, d, e, f, g, h, i = _ends(base, ratio, length)
    _leave_9(part, wide, a, b, c, d, e, f, g, h, i)
    a, b, c, d, e, f, g, h, i, j, k, m = _point(base, ratio, length, 0.5)
    _leave_12(part + ENDS * wide, wide, a, b, c, d, e, f, g, h, i, j, k, m)


@triton.jit
def _first_step(state, part, row, blocks, tolerance, max_passes, wide: tl.constexpr):
    """`_begin` from what the second sweep left."""
    place = tl.arange(0, wide)
    there = place < blocks
    fields: tl.constexpr = ENDS + POINT
    log_z_0, slope_0, size_0 = _end(
        _read_top(part, row, 0, fields, there, place, wide),
        _read(part, row, 1, fields, there, place, wide),
        _read(part, row, 2, fields, there, place, wide),
        _read(part, row, 3, fields, there, place, wide),
    )
    log_z_1, slope_1, size_1 = _end(
        _read_top(part, row, 4, fields, there, place, wide),
        _read(part, row, 5, fields, there, place, wide),
        _read(part, row, 6, fields, there, place, wide),
        _read(part, row, 7, fields, there, place, wide),
    )
    differ = tl.max(_read(part, row, 8, fields, there, place, wide), 0)
    log_z, growth, slope, curvature, length, log_odds, gain = _read_point(
        part, row, ENDS, fields, blocks, wide
    )
    slot = state + row * SLOTS
    alpha, low, high, left, left_slope, right, right_slope, last, status, stop, done = _begin(
        tl.load(slot + 3), tl.load(slot + 4), tl.load(slot + 5), tl.load(slot + 6), differ,
        log_z_0, slope_0, size_0, log_z_1, slope_1, size_1,
        log_z, slope, curvature, length, log_odds, gain, tolerance, max_passes,
    )  # fmt: skip
    return (
        alpha, low, high, left, left_slope, right, right_slope, last, status, stop, done,
        log_z, growth, slope, curvature,
    )  # fmt: skip


@triton.jit
def _later_step(state, part, row, blocks, count, tolerance, max_passes, wide: tl.constexpr):
    """`_go_on` from what the sweep before left."""
    slot = state + row * SLOTS
    log_z, growth, slope, curvature, length, log_odds, gain = _read_point(
        part, row, 0, POINT, blocks, wide
    )
    status = tl.load(slot + 15).to(tl.int32)
    alpha, low, high, left, left_slope, right, right_slope, last, stop, done = _go_on(
        tl.load(slot + 7), log_z, slope, curvature, length, log_odds, gain,
        tl.load(slot + 8), tl.load(slot + 9), tl.load(slot + 10), tl.load(slot + 11),
        tl.load(slot + 12), tl.load(slot + 13), tl.load(slot + 14),
        status, count, tolerance, max_passes,
    )  # fmt: skip
    return (
        alpha, low, high, left, left_slope, right, right_slope, last, status, stop, done,
        log_z, growth, slope, curvature,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "count", "max_passes"])
def _chain_step(
    policy, teacher, before, after, state, left_state, out, codes, passes, rows, vocab,
    count, tolerance, max_passes, first: tl.constexpr, size: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Judge evaluation `count`, and make the next one or write what was found."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    blocks = tl.cdiv(vocab, size)
    slot = state + row * SLOTS
    kept = left_state + row * SLOTS
    if tl.load(slot + 16) > 0:
        if block == 0:
            tl.store(kept + 16, 1.0)
    else:
        p, t = _load(policy, teacher, row, vocab, block, size)
        log_total, shift, outside = tl.load(slot), tl.load(slot + 1), tl.load(slot + 2)
        if first:
            (
                alpha, low, high, left, left_slope, right, right_slope, last, status, stop, done,
                log_z, growth, slope, curvature,
            ) = _first_step(state, before, row, blocks, tolerance, max_passes, wide)  # fmt: skip
        else:
            (
                alpha, low, high, left, left_slope, right, right_slope, last, status, stop, done,
                log_z, growth, slope, curvature,
            ) = _later_step(
                state, before, row, blocks, count, tolerance, max_passes, wide
            )  # fmt: skip
        if block == 0:
            tl.store(kept, log_total)
            tl.store(kept + 1, shift)
            tl.store(kept + 2, outside)
            tl.store(kept + 7, alpha)
            tl.store(kept + 8, low)
            tl.store(kept + 9, high)
            tl.store(kept + 10, left)
            tl.store(kept + 11, left_slope)
            tl.store(kept + 12, right)
            tl.store(kept + 13, right_slope)
            tl.store(kept + 14, last)
            tl.store(kept + 15, status.to(tl.float32))
            tl.store(kept + 16, stop.to(tl.float32))
        if stop > 0:
            if block == 0:
                _write(
                    out, codes, passes, row, rows,
                    alpha, log_z, growth, slope, curvature, outside, status, count, done,
                )  # fmt: skip
        else:
            base, ratio, length = _normalised(p, t, log_total, shift)
            a, b, c, d, e, f, g, h, i, j, k, m = _point(base, ratio, length, alpha)
            part = after + row * POINT * wide + block
            _leave_12(part, wide, a, b, c, d, e, f, g, h, i, j, k, m)


@triton.jit(do_not_specialize=["rows", "count", "max_passes"])
def _chain_rest(
    policy, teacher, before, state, out, codes, passes, rows, vocab,
    count, tolerance, max_passes,
    tile: tl.constexpr, tiles: tl.constexpr, size: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Whatever the chain left of a row, by one program."""
    row = tl.program_id(0).to(tl.int64)
    slot = state + row * SLOTS
    if tl.load(slot + 16) == 0:
        log_total, shift, outside = tl.load(slot), tl.load(slot + 1), tl.load(slot + 2)
        (
            alpha, low, high, left, left_slope, right, right_slope, last, status, stop, done,
            log_z, growth, slope, curvature,
        ) = _later_step(
            state, before, row, tl.cdiv(vocab, tile), count, tolerance, max_passes, tiles
        )  # fmt: skip
        count += tl.full([], 0, tl.int32)
        while stop == 0:
            count += 1
            log_z, growth, slope, curvature, length, log_odds, gain = _sweep(
                policy, teacher, row, vocab, log_total, shift, alpha, size, wide
            )
            alpha, low, high, left, left_slope, right, right_slope, last, stop, done = _go_on(
                alpha, log_z, slope, curvature, length, log_odds, gain,
                low, high, left, left_slope, right, right_slope, last,
                status, count, tolerance, max_passes,
            )  # fmt: skip
        _write(
            out, codes, passes, row, rows,
            alpha, log_z, growth, slope, curvature, outside, status, count, done,
        )  # fmt: skip


# --- The call ------------------------------------------------------------------------------------


def runs() -> bool:
    """Whether Triton can compile for this machine's device, and launch."""
    try:
        target = triton.runtime.driver.active.get_current_target()  # builds with the C compiler
    except Exception:  # no driver, or no compiler
        return False
    return bool(target.backend == "cuda" and target.arch >= 80)


def solve(
    log_policy: Tensor,
    log_teacher: Tensor,
    *,
    tolerance: float,
    max_passes: int,
    allowed: tuple[float, float],
    slack: tuple[float, float],
    most: float,
    alone: int = ALONE,
) -> tuple[Tensor, ...]:
    """alpha* of rows of log-probabilities, float32 or a half type.

    Args:
        log_policy: Shape (rows, vocab).
        log_teacher: The same.
        tolerance: As for `rows_torch.solve_kl_symmetry`.
        max_passes: The same, at most so many for each row.
        allowed: How far each parent's rows may sum from 1.
        slack: What that grows by with -sum p log p.
        most: The most that -sum p log p counts for.
        alone: In place of `ALONE`: for tests.

    Returns:
        The fields of a `Balance`, in its order. Shape (rows,).
    """
    rows, vocab = log_policy.shape
    # Half types are widened here: the kernels are compiled once.
    policy, teacher = (x.to(torch.float32).contiguous() for x in (log_policy, log_teacher))
    device = policy.device
    out = torch.empty(6, rows, dtype=torch.float32, device=device)
    codes = torch.empty(2, rows, dtype=torch.int8, device=device)
    passes = torch.empty(rows, dtype=torch.int32, device=device)
    results = (out, codes, passes, rows, vocab)
    limits = (*allowed, *slack, most)
    with torch.cuda.device_of(policy):
        if vocab <= alone:
            size, warps = next(way for way in ((128, 1), (1024, 4), (4096, 8)) if vocab <= way[0])
            _alone[(rows,)](
                policy, teacher, *results, *limits, tolerance, max_passes, size, 16,
                num_warps=warps,
            )  # fmt: skip
        else:
            _in_a_chain(policy, teacher, results, limits, tolerance, max_passes)
    alpha, chernoff, to_policy, to_teacher, slope, curvature = out.unbind()
    status, converged = codes.unbind()
    return (
        alpha, chernoff, to_policy, to_teacher,
        status, converged.view(torch.bool), slope, curvature, passes,
    )  # fmt: skip


def _in_a_chain(
    policy: Tensor,
    teacher: Tensor,
    results: tuple[Any, ...],
    limits: tuple[float, ...],
    tolerance: float,
    max_passes: int,
) -> None:
    rows, vocab = policy.shape
    count, tile = max(1, min(CHAIN, max_passes)), 512 if vocab <= FINE else 1024
    blocks = triton.cdiv(vocab, tile)
    wide, tiles = _roomy(blocks), _roomy(triton.cdiv(vocab, ALONE))
    new: dict[str, Any] = {"dtype": torch.float32, "device": policy.device}
    fields = [NORMS.value, ENDS.value + POINT.value, POINT.value, POINT.value]
    norms, *parts = torch.empty(sum(fields), rows, wide, **new).split(fields)
    states = torch.empty(2, rows, SLOTS.value, **new).unbind()
    grid = (rows, blocks)
    _chain_norms[grid](policy, teacher, norms, vocab, tile, wide, num_warps=1)
    _chain_ends[grid](
        policy, teacher, norms, parts[0], states[0], vocab, *limits, tile, wide, num_warps=1
    )
    for turn in range(count):
        before, after = parts[(turn - 1) % 2 + 1 if turn else 0], parts[turn % 2 + 1]
        _chain_step[grid](
            policy, teacher, before, after, states[turn % 2], states[(turn + 1) % 2],
            *results, turn + 1, tolerance, max_passes, turn == 0, tile, wide, num_warps=1,
        )  # fmt: skip
    _chain_rest[(rows,)](
        policy, teacher, parts[(count - 1) % 2 + 1], states[count % 2],
        *results, count + 1, tolerance, max_passes, tile, wide, ALONE, tiles, num_warps=8,
    )  # fmt: skip


def _roomy(count: int) -> int:
    """The next power of 4, of few sizes: each is compiled for itself."""
    size = 64
    while size < count:
        size *= 4
    return size
