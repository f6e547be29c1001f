"""What a result is: its status can be asked for, and two results can be compared."""

import copy
import dataclasses
import importlib
import pickle
import pkgutil

import numpy as np
import pytest
import scipy.stats
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import qstar
from qstar import STATUSES, families, gaussian, rows_torch

ROWS = np.log([[0.7, 0.2, 0.1], [0.2, 0.3, 0.5]])


def balances():
    return {
        "numpy": qstar.solve_kl_symmetry(*ROWS),
        "torch": rows_torch.solve_kl_symmetry(*torch.tensor(ROWS)),
        "plain": gaussian.solve_kl_symmetry(
            gaussian.Gaussian(0.0, 1.0), gaussian.Gaussian(1.0, 2.0)
        ),
        "family": families.solve_kl_symmetry(scipy.stats.norm(0, 1), scipy.stats.norm(1, 2)),
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
        rows_torch.solve_kl_symmetry(*map(torch.tensor, rows)),
    ):
        assert found.is_status("degenerate_all").tolist() == [True, False]
        assert found.is_status("interior").tolist() == [False, True]


@pytest.mark.parametrize("kind", ["numpy", "torch", "plain", "family"])
def test_a_status_equals_its_name_and_no_other(kind):
    status = balances()[kind].status
    assert [name for name in STATUSES if bool(status == name)] == ["interior"]
    assert [name for name in STATUSES if not bool(status != name)] == ["interior"]
    assert "interior" in [status]


def mixed_statuses():
    """A torch batch with four statuses, and the names that NumPy gives them."""
    with np.errstate(divide="ignore"):
        policy, teacher = np.log(
            [
                [[0.7, 0.2, 0.1], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.6, 0.4, 0.0]],
                [[0.2, 0.3, 0.5], [0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.1, 0.1, 0.8]],
            ]
        )
    expected = qstar.solve_kl_symmetry(policy, teacher).status
    return rows_torch.solve_kl_symmetry(torch.tensor(policy), torch.tensor(teacher)), expected


MOVED = {
    "as it is": lambda status: status,
    "reshaped": lambda status: status.reshape(2, 2).flatten(),
    "on the host": lambda status: status.cpu().detach().to("cpu"),
    "indexed": lambda status: torch.stack([status[i] for i in range(len(status))]),
    "taken apart": lambda status: torch.cat([part.reshape(1) for part in status.unbind()]),
    "selected": lambda status: torch.where(status >= 0, status, status)[torch.arange(4)],
    "copied": copy.deepcopy,
    "pickled": lambda status: pickle.loads(pickle.dumps(status)),
}


@pytest.mark.parametrize("move", MOVED)
def test_a_torch_status_equals_its_name_wherever_it_goes(move):
    balance, expected = mixed_statuses()
    assert len(set(expected)) == 4
    status = MOVED[move](balance.status)
    for name in STATUSES:
        assert (status == name).tolist() == (expected == name).tolist()
        assert (status != name).tolist() == (expected != name).tolist()
    assert type(status == "interior") is torch.Tensor
    assert (status == balance.status).all()


def test_records_made_of_a_plain_status_compare_with_names_too():
    balance, expected = mixed_statuses()
    plain = torch.tensor(balance.status.tolist(), dtype=torch.int8)
    assert not isinstance(plain == "interior", torch.Tensor), "else nothing is tested"
    for made in (
        dataclasses.replace(balance, status=plain),
        qstar.Balance(*(plain if x is balance.status else x for x in fields_of(balance))),
        pickle.loads(pickle.dumps(balance)),
        copy.deepcopy(balance),
    ):
        assert (made.status == "interior").tolist() == (expected == "interior").tolist()
        assert made == balance


def fields_of(balance):
    return [getattr(balance, field.name) for field in dataclasses.fields(balance)]


def test_a_torch_status_is_otherwise_a_tensor_of_indices():
    balance, expected = mixed_statuses()
    status = balance.status
    assert [STATUSES[i] for i in status] == [STATUSES[i] for i in status.tolist()]
    assert np.array(STATUSES)[status.numpy()].tolist() == expected.tolist()
    for plain in (status == 0, status.long(), status.float(), status < 3):
        assert type(plain) is torch.Tensor
    status[0] = STATUSES.index("invalid")
    assert bool(balance.is_status("invalid")[0])
    with FakeTensorMode():  # no values, no names: a decoder's code is traced all the same
        fake = rows_torch.solve_as_on_an_accelerator(torch.empty(2, 5), torch.empty(2, 5)).status
        assert (fake == 0).shape == (2,)


def test_a_solve_is_compiled_whole_names_included():
    def interior(*rows):
        return rows_torch.solve_as_on_an_accelerator(*rows).status == "interior"

    compiled = torch.compile(interior, backend="eager", fullgraph=True)
    assert compiled(*torch.tensor(ROWS)[:, None]).tolist() == [True]


@pytest.mark.parametrize("wrong", ["inside", "Interior", ""])
def test_a_name_that_is_no_status_is_refused(wrong):
    for balance in (mixed_statuses()[0], balances()["torch"]):
        for ask in (balance.status.__eq__, balance.status.__ne__, balance.is_status):
            with pytest.raises(
                ValueError, match=f"no status named '{wrong}': .* one of .*interior"
            ):
                ask(wrong)
    for balance in balances().values():
        with pytest.raises(ValueError, match="no status named"):
            balance.is_status(wrong)


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
        try:
            names = vars(importlib.import_module(module.name))
        except ModuleNotFoundError as missing:
            if missing.name != "triton":  # comes with torch's builds for accelerators only
                raise
            continue
        for name, kind in names.items():
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
