"""Adversarial rows through both solvers: `qstar-book record stress 1000000`.

Every row is solved by `qstar.solve_kl_symmetry` (float64, the reference), by `qstar.rows_torch` in
float64, float32, bfloat16 and float16, and by the fixed passes of an accelerator without fused
kernels (the record of the accelerator has those) on the CPU. Each
is given what it is given: the reference is solved again for the rows as rounded to each dtype. A
row is a fault where the solver raises ("crash"), returns nan where there is a q* ("nan"), says
that it did not converge ("unconverged"), or says that it did while its q* is farther from the
reference's, in total variation, than the dtype explains ("unflagged"): `allowed`. The table counts
them; the exit status is 1 if there is any.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray
from numpy.random import Generator

from qstar import rows_torch
from qstar.rows import check_pair
from qstar.solve import solve_kl_symmetry

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FAULTS = ("crash", "nan", "unconverged", "unflagged")
LARGE = (4096, 16_384, 50_000)
CHUNK = 4096

Rows = tuple[ndarray, ndarray]


def _scaled(rng: Generator, shape: tuple[int, int], low: float, high: float) -> ndarray:
    return 10 ** rng.uniform(low, high, size=(shape[0], 1)) * rng.normal(size=shape)


def _independent(rng: Generator, shape: tuple[int, int]) -> Rows:
    return _scaled(rng, shape, -3, 5), _scaled(rng, shape, -3, 5)


def _near(rng: Generator, shape: tuple[int, int]) -> Rows:
    base = _scaled(rng, shape, -1, 2)
    return base, base + _scaled(rng, shape, -14, -1)


def _masked(rng: Generator, shape: tuple[int, int]) -> Rows:
    rows = _independent(rng, shape)
    for row in rows:
        off = rng.random(shape) < 0.4
        off[:, 0] = False
        row[off] = -np.inf
    return rows


def _nested(rng: Generator, shape: tuple[int, int]) -> Rows:
    first = _scaled(rng, shape, -2, 2)
    second = first + _scaled(rng, shape, -6, 1)
    second[:, 1:][rng.random((shape[0], shape[1] - 1)) < 0.5] = -np.inf
    return first, second


def _one_hot(rng: Generator, shape: tuple[int, int]) -> Rows:
    first = np.full(shape, -np.inf)
    first[np.arange(shape[0]), rng.integers(shape[1], size=shape[0])] = 0
    return first, _scaled(rng, shape, -2, 3)


def _denormal(rng: Generator, shape: tuple[int, int]) -> Rows:
    rows = [_scaled(rng, shape, -1, 1) for _ in range(2)]
    for row in rows:
        row[:, -1] = rng.uniform(-745, -80, size=shape[0])
    return rows[0], rows[1]


def _ties(rng: Generator, shape: tuple[int, int]) -> Rows:
    first = 10 ** rng.uniform(-2, 3, size=(shape[0], 1)) * rng.integers(3, size=shape)
    return first, rng.permuted(first, axis=1)


def _rare_coin(rng: Generator, shape: tuple[int, int]) -> Rows:
    rows = [np.zeros(shape) for _ in range(2)]
    for row in rows:
        row[:, 0] = rng.uniform(-700, 0, size=shape[0])
    return rows[0], rows[1]


def _one_shared(rng: Generator, shape: tuple[int, int]) -> Rows:
    rows = [_scaled(rng, shape, -2, 2) for _ in range(2)]
    other = rng.random(shape) < 0.5
    other[:, 0] = False
    rows[0][other] = -np.inf
    rows[1][:, 1:][~other[:, 1:]] = -np.inf
    return rows[0], rows[1]


def _flat_end(rng: Generator, shape: tuple[int, int]) -> Rows:
    """The slope at alpha = 0 is zero but for rounding: on the edge between two statuses."""
    mass = rng.uniform(0.05, 0.95, size=shape[0])
    a = (1 + np.sqrt(1 - mass**2)) / 2
    first, second = np.full((2, *shape), -np.inf)
    first[:, 0], first[:, 1] = np.log(a), np.log1p(-a)
    second[:, 0] = second[:, 1] = np.log(mass / 2)
    second[:, -1] = np.logaddexp(second[:, -1], np.log1p(-mass))
    return first, second


def _opposed(rng: Generator, shape: tuple[int, int]) -> Rows:
    rows = [rng.normal(size=shape) for _ in range(2)]
    temperature = 10 ** rng.uniform(-1.3, 0.3, size=(shape[0], 1))
    for place, row in enumerate(rows):
        row[:, place] = row.max(axis=1) + rng.uniform(1, 9, size=shape[0])
        row /= temperature
    return rows[0], rows[1]


FAMILIES: dict[str, Callable[[Generator, tuple[int, int]], Rows]] = {
    "independent": _independent,
    "near-identical": _near,
    "masked": _masked,
    "nested": _nested,
    "one-hot": _one_hot,
    "denormal": _denormal,
    "ties": _ties,
    "rare coin": _rare_coin,
    "one shared token": _one_shared,
    "flat end": _flat_end,
    "opposed": _opposed,
}


class Count(NamedTuple):
    """What became of the rows of one family in one solver."""

    rows: int
    crash: int
    nan: int
    unconverged: int
    unflagged: int
    worst_tv: float

    def plus(self, other: "Count") -> "Count":
        """Of both together."""
        *sums, _ = (a + b for a, b in zip(self, other, strict=True))
        rows, crash, nan, unconverged, unflagged = map(int, sums)
        worst = max(self.worst_tv, other.worst_tv)
        return Count(rows, crash, nan, unconverged, unflagged, worst)


Solver = Callable[[torch.Tensor, torch.Tensor], "rows_torch.TorchBalance"]


def run(
    rows: int, *, seed: int = 0, large: int | None = None, solve: Solver | None = None
) -> dict[tuple[str, str], Count]:
    """Counts by (family, solver): `rows` small rows over all families, and `large` large ones.

    Args:
        rows: How many rows of 2 to 7 outcomes.
        seed: Of the rows.
        large: How many rows of a large vocabulary; by default a two-thousandth of `rows`.
        solve: In place of `qstar.rows_torch.solve_kl_symmetry`: for a planted fault.
    """
    counts: dict[tuple[str, str], Count] = {}
    for family, pair in _pairs(rows, rows // 2000 if large is None else large, seed):
        for dtype in DTYPES:
            sides = [torch.tensor(side).log_softmax(-1).to(dtype) for side in pair]
            if dtype == torch.bfloat16 or dtype == torch.float16:
                sides = [side.float().log_softmax(-1).to(dtype) for side in sides]
            name = str(dtype).removeprefix("torch.")
            for label, way in (
                (name, solve or rows_torch.solve_kl_symmetry),
                (f"{name}, fixed passes", rows_torch.solve_as_on_an_accelerator),
            ):
                key = family, label
                found = _count(way, sides, dtype)
                old = counts.get(key, Count(0, 0, 0, 0, 0, 0.0))
                counts[key] = old.plus(found)
    return counts


def _pairs(rows: int, large: int, seed: int) -> Iterator[tuple[str, Rows]]:
    rng = np.random.default_rng(seed)
    each = -(-rows // len(FAMILIES))
    for family, draw in FAMILIES.items():
        left = each
        while left > 0:
            size = min(left, CHUNK)
            yield family, draw(rng, (size, int(rng.integers(2, 8))))
            left -= size
        for _ in range(-(-large // len(FAMILIES))):
            yield family, draw(rng, (1, int(rng.choice(LARGE))))


def allowed(pair_size: ndarray, curvature: ndarray, dtype: torch.dtype) -> ndarray:
    """How far, in total variation, q* may be from the reference's.

    Twice the tolerance, and what rounding leaves of log-ratios whose range is `pair_size` and
    variance `curvature`: where supports differ a slope is known to about eps, and an error of it
    counts in units of the deviation.
    """
    computing = torch.float64 if dtype == torch.float64 else torch.float32
    eps = torch.finfo(computing).eps
    return (
        2 * rows_torch.TOLERANCE[dtype]
        + 4 * eps * (1 + pair_size)
        + 4 * eps / np.sqrt(np.maximum(curvature, eps))
    )


def _count(solve: Solver, sides: list[torch.Tensor], dtype: torch.dtype) -> Count:
    size = len(sides[0])
    given = [side.double().log_softmax(-1).numpy() for side in sides]
    exact = solve_kl_symmetry(*given)
    try:
        found = solve(*sides)
    except (ValueError, ArithmeticError, RuntimeError):
        return Count(size, size, 0, 0, 0, 0.0)
    exists = ~exact.is_status("disjoint")
    alpha = found.alpha.double().numpy()
    nan = np.isnan(alpha) & exists
    unconverged = ~found.converged.numpy() & exists & ~nan
    reference_lost = ~exact.converged & exists
    pair = check_pair(*given)
    usable = exists & ~nan
    with np.errstate(all="ignore"):
        q = [
            np.exp(pair.log_geometric_mean(np.where(usable, a, 0.5))) for a in (alpha, exact.alpha)
        ]
        tv = np.where(usable, 0.5 * np.abs(q[0] - q[1]).sum(axis=-1), 0.0)
    extent = pair.log_ratio.max(axis=-1) - pair.log_ratio.min(axis=-1)
    wrong = usable & ~unconverged & ~(tv <= allowed(extent, exact.curvature, dtype))
    return Count(
        size,
        0,
        int(nan.sum()),
        int((unconverged | reference_lost).sum()),
        int(wrong.sum()),
        float(np.where(usable & ~unconverged, tv, 0.0).max()),
    )


def faults(counts: dict[tuple[str, str], Count]) -> int:
    return sum(sum(count[1:5]) for count in counts.values())


def table(counts: dict[tuple[str, str], Count]) -> str:
    lines = [f"{'family':<17} {'solver':<22} {'rows':>8}" + "".join(f"{x:>12}" for x in FAULTS)]
    lines[0] += f"{'worst TV':>11}"
    for (family, solver), count in counts.items():
        numbers = "".join(f"{value:>12}" for value in count[1:5])
        lines.append(f"{family:<17} {solver:<22} {count.rows:>8}{numbers}{count.worst_tv:>11.1e}")
    return "\n".join(lines)


def command(*, rows: int, seed: int) -> int:
    """`qstar-book record stress`."""
    counts = run(rows, seed=seed)
    print(table(counts))
    found = faults(counts)
    print(f"{found} faults")
    return 1 if found else 0
