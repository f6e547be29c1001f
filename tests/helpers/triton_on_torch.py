"""Enough of Triton to run `qstar.rows_triton` on the CPU, in torch, where there is no Triton.

The kernels run as they are written, one program after another; only what they call is replaced. It
shows what they compute, not that they compile: that needs Triton (`tests/core/test_rows_triton`).
"""

import importlib.util
import itertools
import math
import sys
from pathlib import Path
from types import ModuleType

import torch

import qstar

SOURCE = Path(qstar.__file__).parent / "rows_triton.py"


class Pointer:
    """The flat memory of a contiguous tensor, from some entries on."""

    def __init__(self, memory, at=0):
        self.memory, self.at = memory, at

    def __add__(self, offset):
        return Pointer(self.memory, self.at + offset)


class Constexpr:
    """A number with the name that Triton gives it on the host."""

    def __new__(cls, value):
        made = type("Constant", (type(value),), {"value": value})(value)
        return made


class Kernel:
    """A function that runs over a grid when it is asked for one."""

    def __init__(self, function, language):
        self.function, self.language = function, language

    def __call__(self, *args):
        return self.function(*args)

    def __getitem__(self, grid):
        def launch(*args, num_warps):
            assert num_warps in (1, 2, 4, 8)
            args = [
                Pointer(x.view(-1)) if isinstance(x, torch.Tensor) else _scalar(x) for x in args
            ]
            for place in itertools.product(*map(range, grid)):
                self.language.place = place
                self.function(*args)

        return launch


def _scalar(x):
    """As a kernel gets it: floats in float32; whole numbers count as constants here."""
    return torch.tensor(x) if isinstance(x, float) else x


def _tensor(x):
    if isinstance(x, torch.Tensor):
        return x
    return torch.tensor(x, dtype=torch.float32 if isinstance(x, float) else torch.int32)


def _load(pointer, mask=None, other=0.0):
    if mask is None:
        return pointer.memory[pointer.at]
    found = torch.full(mask.shape, other, dtype=pointer.memory.dtype)
    found[mask] = pointer.memory[_tensor(pointer.at)[mask]]
    return found


def _store(pointer, value):
    pointer.memory[pointer.at] = value


def _language():
    language = ModuleType("triton.language")
    language.constexpr = Constexpr
    for name in ("float32", "int8", "int32", "int64"):
        setattr(language, name, getattr(torch, name))
    language.program_id = lambda axis: torch.tensor(language.place[axis])
    language.arange = torch.arange
    language.full = lambda shape, value, dtype: torch.full(shape, value, dtype=dtype)
    language.load, language.store = _load, _store
    language.cdiv = lambda x, y: -(-x // y)
    language.where = lambda on, x, y: torch.where(on, _tensor(x), _tensor(y))
    language.sum = lambda x, axis: x.sum(axis)
    language.max = lambda x, axis: x.nan_to_num(nan=-math.inf, neginf=-math.inf).amax(axis)
    language.maximum = lambda x, y: torch.fmax(_tensor(x), _tensor(y))
    language.minimum = lambda x, y: torch.fmin(_tensor(x), _tensor(y))
    language.fma = lambda x, y, z: (x.double() * y + z.double()).float()
    for name in ("abs", "exp2", "log", "sqrt"):
        setattr(language, name, getattr(torch, name))
    return language


def rows_triton(change=lambda source: source):
    """The module on these functions; `change` may plant a fault in its source."""
    language, triton = _language(), ModuleType("triton")
    triton.language = language
    triton.jit = lambda function=None, **_: (
        Kernel(function, language) if function else lambda f: Kernel(f, language)
    )
    triton.cdiv = language.cdiv
    spec = importlib.util.spec_from_loader("rows_triton_on_torch", loader=None)
    module = importlib.util.module_from_spec(spec)
    before = {name: sys.modules.get(name) for name in ("triton", "triton.language")}
    sys.modules |= {"triton": triton, "triton.language": language}
    try:
        text = SOURCE.read_text(encoding="utf8")
        changed = change(text)
        exec(compile(changed, str(SOURCE), "exec"), vars(module))
    finally:
        for name, old in before.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old
    return module
