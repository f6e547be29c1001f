"""What a result is: its status can be asked for, and two results can be compared."""

import dataclasses
import importlib
import pkgutil

import numpy as np
import pytest
import torch

import qstar
from qstar import STATUSES, batched, gaussian

ROWS = np.log([[0.7, 0.2, 0.1], [0.2, 0.3, 0.5]])


def balances():
    return {
        "numpy": qstar.solve_kl_symmetry(*ROWS),
        "torch": batched.solve_kl_symmetry(*torch.tensor(ROWS)),
        "plain": gaussian.solve_kl_symmetry(
            gaussian.Gaussian(0.0, 1.0), gaussian.Gaussian(1.0, 2.0)
        ),
    }


@pytest.mark.parametrize("kind", ["numpy", "torch", "plain"])
def test_every_kind_of_balance_knows_its_status_by_name(kind):
    balance = balances()[kind]
    assert [name for name in STATUSES if bool(balance.is_status(name))] == ["interior"]
    with pytest.raises(ValueError, match="must be one of"):
        balance.is_status("inside")


def test_a_batch_of_either_kind_answers_row_by_row():
    rows = np.stack([ROWS[0], ROWS[1]]), np.stack([ROWS[0], ROWS[0]])
    for found in (
        qstar.solve_kl_symmetry(*rows),
        batched.solve_kl_symmetry(*map(torch.tensor, rows)),
    ):
        assert found.is_status("degenerate_all").tolist() == [True, False]
        assert found.is_status("interior").tolist() == [False, True]


@pytest.mark.parametrize("kind", ["numpy", "torch", "plain"])
def test_balances_are_compared_by_value(kind):
    one, other = balances()[kind], balances()[kind]
    assert one == other
    assert one != dataclasses.replace(one, alpha=one.alpha + 1)
    assert one != "interior"
    apart = dataclasses.replace(one, alpha=one.alpha * np.nan)
    assert apart == dataclasses.replace(one, alpha=one.alpha * np.nan)
    assert apart != one


def test_results_of_different_shapes_or_kinds_are_unequal():
    alone = qstar.solve_kl_symmetry(*ROWS)
    assert alone != qstar.solve_kl_symmetry(*ROWS[:, None])
    assert alone != balances()["plain"]


def test_no_record_that_holds_arrays_leaves_its_equality_to_a_truth_value():
    """A dataclass's own == asks an array whether it is true, and raises."""
    for module in pkgutil.walk_packages(qstar.__path__, "qstar."):
        if "figures" in module.name or module.name.endswith("__main__"):
            continue
        for name, kind in vars(importlib.import_module(module.name)).items():
            if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
                continue
            types = [str(field.type) for field in dataclasses.fields(kind)]
            holds = any(
                ("ndarray" in t or "Tensor" in t) and "Callable" not in t and "Balance" not in t
                for t in types
            )
            mutable = not kind.__dataclass_params__.frozen
            if holds and not mutable and kind.__dataclass_params__.eq:
                raise AssertionError(f"{module.name}.{name} holds arrays and compares them")
