"""The fused kernels: on torch in place of Triton, in its interpreter, and compiled for a device."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton_on_torch

from qstar import rows_torch, solve_kl_symmetry, solve_torch
from qstar.rows import check_pair
from qstar_book.records import stress
from qstar_book.records.solver import language_model_like_rows

FUSED = triton_on_torch.rows_triton()
ROADS = pytest.mark.parametrize("alone", [FUSED.ALONE, 0], ids=["alone", "chain"])
HALF = (torch.bfloat16, torch.float16)


def plan_of(pair, *, tolerance=None, max_passes=rows_torch.MAX_PASSES):
    dtypes = tuple(side.dtype for side in pair)
    if tolerance is None:
        tolerance = max(rows_torch.TOLERANCE[dtype] for dtype in dtypes)
    return solve_torch.Plan(
        tolerance, dtypes, torch.float32, max_passes, 64, early_exit=True, validate=False
    )


def by_block(pair, **options):
    return solve_torch.solve_block(*pair, plan_of(pair, **options))


def fused(pair, *, module=FUSED, alone=FUSED.ALONE, **options):
    plan = plan_of(pair, **options)
    found = module.solve(
        *pair,
        tolerance=plan.tolerance,
        max_passes=plan.max_passes,
        allowed=tuple(rows_torch.NORMALISATION_TOLERANCE[dtype] for dtype in plan.came_as),
        slack=tuple(map(solve_torch.rounding_slack, plan.came_as)),
        most=math.log(pair[0].shape[-1]),
        alone=alone,
    )
    return solve_torch.Fields(*found)


def given(family, *, rows, vocab, dtype=torch.float32, seed=0):
    """Adversarial rows as `stress` hands them to a solver."""
    rng = np.random.default_rng([seed, list(stress.FAMILIES).index(family), vocab])
    pair = stress.FAMILIES[family](rng, (rows, vocab))
    sides = [torch.tensor(side).log_softmax(-1).to(dtype) for side in pair]
    return [side.float().log_softmax(-1).to(dtype) for side in sides] if dtype in HALF else sides


def faults(pair, *, module=FUSED, alone=FUSED.ALONE):
    """How many of these rows `stress` would count, and how many differ from the torch road in
    their status, or by more than two in their passes."""
    found, expected = fused(pair, module=module, alone=alone), by_block(pair)
    count = stress._count(lambda *_: rows_torch.Balance(*found), pair, pair[0].dtype)
    other = (found.status != expected.status) | ((found.passes - expected.passes).abs() > 2)
    return sum(count[1:5]) + int(other.sum())


def assert_same_fields(found, expected, *, rtol=2e-5, atol=2e-6):
    """What both roads must agree on to the last digit, and what to their rounding."""
    for name in ("status", "converged", "passes"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in ("alpha", "chernoff", "kl_to_policy", "kl_to_teacher", "slope", "curvature"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, equal_nan=True, msg=name)


@ROADS
@pytest.mark.parametrize("family", stress.FAMILIES)
def test_adversarial_rows_have_no_fault_and_the_status_of_the_torch_road(family, alone):
    for dtype in (torch.float32, *HALF):
        for vocab in (2, 5, 40):
            assert faults(given(family, rows=6, vocab=vocab, dtype=dtype), alone=alone) == 0


@pytest.mark.parametrize("vocab", [500, 1024, 3000, 5000, 34_000])
def test_rows_like_a_language_model_s_have_the_reference_s_q_star(vocab):
    host = language_model_like_rows(rows=3, vocab=vocab, seed=0)
    pair = [torch.from_numpy(side).float() for side in host]
    host = [side.double().log_softmax(-1).numpy() for side in pair]
    found, exact, checked = fused(pair), solve_kl_symmetry(*host), check_pair(*host)
    alphas = (found.alpha.double().numpy(), exact.alpha)
    q = [np.exp(checked.log_geometric_mean(alpha)) for alpha in alphas]
    assert 0.5 * np.abs(q[0] - q[1]).sum(-1).max() < 2e-6
    np.testing.assert_allclose(found.chernoff, exact.chernoff, rtol=1e-5)
    assert_same_fields(found, by_block(pair))


@ROADS
def test_a_row_of_many_tiles_is_what_it_is_in_one(alone):
    pair = given("masked", rows=2, vocab=1300, seed=1)
    assert_same_fields(fused(pair, alone=alone), by_block(pair), rtol=1e-4)


def edge_rows():
    e = math.e
    return {
        "one outcome": ([[1]], [[1]]),
        "disjoint": ([[0.5, 0.5, 0, 0]], [[0, 0, 0.3, 0.7]]),
        "equal": ([[0.2, 0.3, 0.5]], [[0.2, 0.3, 0.5]]),
        "the same point": ([[0, 1, 0]], [[0, 1, 0]]),
        "points apart": ([[0, 1, 0]], [[0, 0, 1]]),
        "a point, of all": ([[0, 1, 0]], [[0.2, 0.3, 0.5]]),
        "of all, a point": ([[0.2, 0.3, 0.5]], [[0, 1, 0]]),
        "one shared": ([[0.5, 0.5, 0]], [[0, 0.1, 0.9]]),
        "inside": ([[0.5, 0.4, 0.1, 0]], [[0.1, 0.3, 0.5, 0.1]]),
        "neither's": ([[0.5, 0.5, 0]], [[0.1, 0.9, 0]]),
        "nothing": ([[0, 0, 0]], [[0.2, 0.3, 0.5]]),
        "nan": ([[0.2, math.nan, 0.5]], [[0.2, 0.3, 0.5]]),
        "infinite": ([[0.2, math.inf, 0.5]], [[0.2, 0.3, 0.5]]),
        "more than one": ([[0.2, 0.3, 0.5]], [[0.2 * e, 0.3 * e, 0.5 * e]]),
        "a little more than one": ([[0.2, 0.3, 0.5]], [[0.4, 0.3, 0.3 + 9e-5]]),
    }


@ROADS
@pytest.mark.parametrize("name", edge_rows())
def test_edges_have_the_fields_of_the_torch_road(name, alone):
    pair = [torch.tensor(side).log() for side in edge_rows()[name]]
    assert_same_fields(fused(pair, alone=alone), by_block(pair))


@ROADS
@pytest.mark.parametrize("max_passes", [1, 2, 3, 7])
def test_no_row_takes_more_passes_than_it_may(max_passes, alone):
    few = [given(family, rows=2, vocab=5) for family in stress.FAMILIES]
    pair = [torch.cat(x) for x in zip(*few, strict=True)]
    found = fused(pair, alone=alone, max_passes=max_passes)
    expected = by_block(pair, max_passes=max_passes)
    for name in ("status", "converged", "passes"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.passes.max() <= 2 + max_passes


def test_what_the_chain_leaves_one_program_finishes(monkeypatch):
    pair = given("independent", rows=12, vocab=700, seed=2)
    expected = by_block(pair)
    assert expected.passes.max() > 2 + 2
    for chain in (1, 2):
        monkeypatch.setattr(FUSED, "CHAIN", chain)
        assert torch.equal(fused(pair, alone=0).passes, expected.passes)
        assert faults(pair, alone=0) == 0


def planted(*changes):
    def change(source):
        for old, new in changes:
            assert source.count(old) == 1, old
            source = source.replace(old, new)
        return source

    return triton_on_torch.rows_triton(change)


@pytest.mark.parametrize(
    "change",
    [
        ("newton = alpha - log_odds / gain", "newton = alpha + log_odds / gain"),
        ("low = tl.where(falls, alpha, low)", "low = tl.where(rises, alpha, low)"),
        ("floor = EPS / 2 * (", "floor = EPS * 500 * ("),
        (
            "newton = alpha - log_odds / gain\n",
            "newton = alpha - slope / curvature\n"
            "    last, low, high = alpha + INFINITY, -9.0, 9.0\n",
        ),
        ("status = tl.where(differ > 0, status, DEGENERATE_ALL)", "pass"),
        ("(slope_0 >= (1.0 + size_0)", "(slope_0 <= (1.0 + size_0)"),
        ("bound = tl.where(partial > 0, 1.0, tl.minimum(bound + 1e-3, 1.0))", "bound *= 0.6"),
    ],
    ids=["wrong sign", "wrong side", "stops early", "no bracket", "no equal", "boundary", "bound"],
)
def test_a_planted_fault_is_counted(change):
    module = planted(change)
    pairs = [given(family, rows=6, vocab=5) for family in stress.FAMILIES]
    assert sum(faults(pair, module=module) for pair in pairs) > 0


def test_without_the_sums_of_differences_close_parents_are_missed():
    module = planted(("tl.where(log_z > -0.5, _log1p", "tl.where(log_z > 0.5, _log1p"))
    rng = np.random.default_rng(0)
    pair = [
        torch.tensor(side)[None].log_softmax(-1).float() for side in rng.normal(size=(2, 40)) * 1e-3
    ]
    exact = solve_kl_symmetry(*(side.double().log_softmax(-1).numpy() for side in pair)).chernoff
    errors = [
        abs(fused(pair, module=m).chernoff.item() / exact.item() - 1) for m in (FUSED, module)
    ]
    assert errors[0] < 1e-4
    assert errors[1] > 1e-3


# --- Through the public function -----------------------------------------------------------------


@pytest.fixture
def on_fused_kernels(monkeypatch):
    """As if the CPU were a CUDA device with Triton."""

    def takes(*pair):
        return solve_torch.computing_dtype(*(x.dtype for x in pair)) == torch.float32

    monkeypatch.setitem(sys.modules, "qstar.rows_triton", FUSED)
    monkeypatch.setattr(rows_torch, "takes_fused_kernels", takes)


def test_shapes_strides_and_types(on_fused_kernels):
    pair = given("opposed", rows=12, vocab=6)
    flat = fused(pair)
    strided = [side.reshape(2, 6, 6).transpose(0, 1) for side in pair]
    found = rows_torch.solve_kl_symmetry(*strided)
    dtypes = [x.dtype for x in (found.alpha, found.status, found.converged, found.passes)]
    assert dtypes == [torch.float32, torch.int8, torch.bool, torch.int32]
    assert bool((found.status == "interior").all())
    assert torch.equal(found.alpha, flat.alpha.reshape(2, 6).T)
    assert rows_torch.solve_kl_symmetry(pair[0][0], pair[1][0]).alpha.shape == ()
    wide = [side.double().log_softmax(-1) for side in pair]
    assert rows_torch.solve_kl_symmetry(*wide).alpha.dtype == torch.float64


def test_gradients_are_those_of_the_torch_road(on_fused_kernels, monkeypatch):
    grads = []
    for fused_kernels in (True, False):
        if not fused_kernels:
            monkeypatch.setattr(rows_torch, "takes_fused_kernels", lambda *_: False)
        pair = [side.requires_grad_() for side in given("opposed", rows=4, vocab=6)]
        found = rows_torch.solve_kl_symmetry(*pair)
        (found.alpha + found.chernoff + 2 * found.kl_to_policy).sum().backward()
        grads.append(torch.stack([side.grad for side in pair]))
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


def test_a_bad_row_is_named_where_validation_is_asked_for(on_fused_kernels):
    pair = given("opposed", rows=4, vocab=6)
    pair[1][2, 3] = math.nan
    with pytest.raises(ValueError, match=r"log_teacher .* row 2 holds nan at outcome 3"):
        rows_torch.solve_kl_symmetry(*pair, validate=True)


def test_rows_of_the_cpu_take_the_roads_of_the_cpu():
    assert not rows_torch.takes_fused_kernels(*given("opposed", rows=1, vocab=3))


# --- With Triton ---------------------------------------------------------------------------------


def in_a_process(code, **environment):
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, os.path.join(here, "..", "helpers"), *sys.path])
    environment = os.environ | {"PYTHONPATH": path} | environment
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, check=True)


def test_the_interpreter_of_triton_finds_what_the_torch_road_finds():
    pytest.importorskip("triton")
    code = """
import torch
import test_rows_triton as here
from qstar import rows_triton
from qstar_book.records import solver, stress
host = solver.language_model_like_rows(rows=2, vocab=1100, seed=0)
plain = [[torch.from_numpy(x).float() for x in host]]
plain += [[torch.tensor(x).log() for x in rows] for rows in here.edge_rows().values()]
few = [here.given(family, rows=1, vocab=5) for family in stress.FAMILIES]
hard = [torch.cat(sides) for sides in zip(*few, strict=True)]
for alone in (4096, 0):
    for pair in plain:
        found = here.fused(pair, module=rows_triton, alone=alone)
        here.assert_same_fields(found, here.by_block(pair))
    assert here.faults(hard, module=rows_triton, alone=alone) == 0
"""
    in_a_process(code, TRITON_INTERPRET="1")


def test_the_kernels_compile_for_a_device_that_is_not_there():
    pytest.importorskip("triton")
    code = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qstar import rows_triton as kernels
floats = ("p_allowed", "t_allowed", "p_slack", "t_slack", "most", "tolerance")
pointers = {"codes": "*i8", "passes": "*i32"}
whole = ("rows", "vocab", "count", "max_passes")
chain = {"size": 512, "wide": 64}
for kernel, constants, warps in (
    (kernels._alone, {"size": 128, "wide": 16}, 1),
    (kernels._chain_norms, chain, 1),
    (kernels._chain_ends, chain, 1),
    (kernels._chain_step, chain | {"first": True}, 1),
    (kernels._chain_step, chain | {"first": False}, 1),
    (kernels._chain_rest, {"tile": 512, "tiles": 64, "size": 4096, "wide": 64}, 8),
):
    signature = {
        name: "constexpr" if name in constants
        else "fp32" if name in floats
        else "i32" if name in whole
        else pointers.get(name, "*fp32")
        for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert ".f64" not in made.asm["ptx"]
"""
    in_a_process(code)
