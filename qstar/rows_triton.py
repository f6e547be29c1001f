# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-not-found,import-untyped,misc"
"""alpha* and log q* of rows of logits by a fixed chain of fused kernels: a candidate, for scale.

The record of the accelerator has it beside the solver of the package. It is not what decodes: it
knows no boundary, no excluded outcome and no status. One kernel makes one pass over both rows, many
programs to a row; each program first adds up what the pass before left, and so knows the next alpha
without a word to the host. Two passes find the normalisers and a first mean, `steps` are Newton's,
and one more writes log q*: steps + 3 kernels, whatever the rows hold.

Needs Triton, which comes with torch's builds for accelerators.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Outcomes that one program treats."""


@triton.jit
def _reduce(partial, row, blocks: tl.constexpr, wide: tl.constexpr):
    """(top, sum, mean sum, square sum) of a row from its blocks: sums of e^(s - top) (l - c)^k."""
    place = tl.arange(0, wide)
    there = place < blocks
    base = partial + row * blocks * 4 + place * 4
    top = tl.load(base, mask=there, other=-float("inf"))
    peak = tl.max(top, 0)
    scale = tl.exp(top - peak)
    total = tl.sum(scale * tl.load(base + 1, mask=there, other=0.0), 0)
    first = tl.sum(scale * tl.load(base + 2, mask=there, other=0.0), 0)
    second = tl.sum(scale * tl.load(base + 3, mask=there, other=0.0), 0)
    return peak, total, first, second


@triton.jit
def _normalise(policy, teacher, partial, vocab, blocks: tl.constexpr, size: tl.constexpr):
    """Per block: the top and the sum of e^(x - top), for either row."""
    row, block = tl.program_id(0), tl.program_id(1)
    place = block * size + tl.arange(0, size)
    on = place < vocab
    out = partial + (row * blocks + block) * 4
    x = tl.load(policy + row * vocab + place, mask=on, other=-float("inf")).to(tl.float32)
    top = tl.max(x, 0)
    tl.store(out, top)
    tl.store(out + 1, tl.sum(tl.exp(x - top), 0))
    x = tl.load(teacher + row * vocab + place, mask=on, other=-float("inf")).to(tl.float32)
    top = tl.max(x, 0)
    tl.store(out + 2, top)
    tl.store(out + 3, tl.sum(tl.exp(x - top), 0))


@triton.jit
def _log_total(partial, row, at, blocks: tl.constexpr, wide: tl.constexpr):
    """log sum e^x of a row, from the tops and sums of its blocks."""
    place = tl.arange(0, wide)
    there = place < blocks
    base = partial + row * blocks * 4 + place * 4 + at
    top = tl.load(base, mask=there, other=-float("inf"))
    peak = tl.max(top, 0)
    sums = tl.load(base + 1, mask=there, other=0.0)
    return peak + tl.log(tl.sum(tl.exp(top - peak) * sums, 0))


@triton.jit
def _step(
    policy,
    teacher,
    norms,
    before,
    after,
    state_in,
    state_out,
    vocab,
    first: tl.constexpr,
    blocks: tl.constexpr,
    wide: tl.constexpr,
    size: tl.constexpr,
):
    """The sums of a pass at the alpha that the pass before points to."""
    row, block = tl.program_id(0), tl.program_id(1)
    shift = _log_total(norms, row, 0, blocks, wide) - _log_total(norms, row, 2, blocks, wide)
    if first:
        alpha, low, high, centre = 0.5, 0.0, 1.0, 0.0
    else:
        alpha = tl.load(state_in + row * 4)
        low = tl.load(state_in + row * 4 + 1)
        high = tl.load(state_in + row * 4 + 2)
        centre = tl.load(state_in + row * 4 + 3)
        _, total, one, two = _reduce(before, row, blocks, wide)
        off = one / total
        mean = centre + off
        variance = tl.maximum(two / total - off * off, 1e-37)
        low = tl.where(mean < 0, alpha, low)
        high = tl.where(mean > 0, alpha, high)
        step = alpha - mean / variance
        alpha = tl.where((step >= low) & (step <= high), step, 0.5 * (low + high))
        centre = mean
    if block == 0:
        tl.store(state_out + row * 4, alpha)
        tl.store(state_out + row * 4 + 1, low)
        tl.store(state_out + row * 4 + 2, high)
        tl.store(state_out + row * 4 + 3, centre)
    place = block * size + tl.arange(0, size)
    on = place < vocab
    p = tl.load(policy + row * vocab + place, mask=on, other=0.0).to(tl.float32)
    t = tl.load(teacher + row * vocab + place, mask=on, other=0.0).to(tl.float32)
    ratio = p - t - shift
    path = tl.where(on, t + alpha * ratio, -float("inf"))
    top = tl.max(path, 0)
    weight = tl.exp(path - top)
    off = tl.where(on, ratio - centre, 0.0)
    out = after + (row * blocks + block) * 4
    tl.store(out, top)
    tl.store(out + 1, tl.sum(weight, 0))
    tl.store(out + 2, tl.sum(weight * off, 0))
    tl.store(out + 3, tl.sum(weight * off * off, 0))


@triton.jit
def _write(
    policy,
    teacher,
    norms,
    last,
    state,
    log_q,
    vocab,
    blocks: tl.constexpr,
    wide: tl.constexpr,
    size: tl.constexpr,
):
    """log q at the last alpha."""
    row, block = tl.program_id(0), tl.program_id(1)
    shift = _log_total(norms, row, 0, blocks, wide) - _log_total(norms, row, 2, blocks, wide)
    peak, total, _, _ = _reduce(last, row, blocks, wide)
    alpha = tl.load(state + row * 4)
    place = block * size + tl.arange(0, size)
    on = place < vocab
    p = tl.load(policy + row * vocab + place, mask=on, other=0.0).to(tl.float32)
    t = tl.load(teacher + row * vocab + place, mask=on, other=0.0).to(tl.float32)
    path = t + alpha * (p - t - shift)
    tl.store(log_q + row * vocab + place, path - peak - tl.log(total), mask=on)


def solve(policy: Tensor, teacher: Tensor, *, steps: int = 6) -> tuple[Tensor, Tensor]:
    """alpha* and log q* after so many Newton steps.

    Args:
        policy: Logits, float32 or a half type, contiguous. Shape (rows, vocab).
        teacher: The same. Shape (rows, vocab).
        steps: Passes after the first.

    Returns:
        alpha of shape (rows,) and log q of shape (rows, vocab), in float32.
    """
    rows, vocab = policy.shape
    blocks = triton.cdiv(vocab, BLOCK)
    wide = triton.next_power_of_2(blocks)
    grid = (rows, blocks)
    new: dict[str, Any] = {"dtype": torch.float32, "device": policy.device}
    norms, left, right = (torch.empty(rows, blocks, 4, **new) for _ in range(3))
    state, other = (torch.empty(rows, 4, **new) for _ in range(2))
    log_q = torch.empty(rows, vocab, **new)
    _normalise[grid](policy, teacher, norms, vocab, blocks, BLOCK)
    for step in range(steps + 1):
        _step[grid](
            policy,
            teacher,
            norms,
            left,
            right,
            state,
            other,
            vocab,
            step == 0,
            blocks,
            wide,
            BLOCK,
        )
        left, right, state, other = right, left, other, state
    _write[grid](policy, teacher, norms, left, state, log_q, vocab, blocks, wide, BLOCK)
    return state[:, 0], log_q
