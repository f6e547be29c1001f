"""Does a verdict follow from what was computed? Change one input of its cell, and look.

A notebook is run in this process, only as far as its deciding cells need it (`states`). Then each
deciding cell is run again in the state that the cells before it left, with *one* thing that it
reads replaced: a number scaled, shifted, negated or set to zero, a truth inverted, an array turned
round, a function of the package made to return such a thing. A verdict that no such change moves
was typed, not computed.
"""

import ast
import builtins
import contextlib
import dataclasses
import functools
import io
import json
import operator
import types
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

OPERATIONS = {
    "scaled": lambda x: x * 1.5,
    "shifted": lambda x: x + 0.3,
    "set to zero": lambda x: x * 0,
    "negated": operator.neg,
    "shrunk": lambda x: x * 1e-3,
    "raised": lambda x: x + 100,
    "tenfold": lambda x: x * 10,
    "multiplied by 7": lambda x: x * 7,
    "turned round": lambda x: x,
}
MOST_ITEMS = 12


def sabotage(value: Any, name: str) -> Any:
    """The value with one operation applied to every number in it; functions return such values."""
    if isinstance(value, bool | np.bool_):
        return not value
    if isinstance(value, int | float | np.number):
        return OPERATIONS[name](value)
    if isinstance(value, str):
        return value[::-1] if name == "negated" else value
    if isinstance(value, np.ndarray) or type(value).__module__ == "torch":
        return _sabotage_array(value, name)
    if isinstance(value, Mapping):
        items = [sabotage(item, name) for item in value.values()]
        items = items[::-1] if name == "turned round" else items
        return dict(zip(value, items, strict=True))
    if isinstance(value, list | tuple):
        items = [sabotage(item, name) for item in value]
        items = items[::-1] if name == "turned round" else items
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            with contextlib.suppress(Exception):  # a field that cannot be changed stays
                changed = sabotage(getattr(value, field.name), name)
                value = dataclasses.replace(value, **{field.name: changed})
        return value
    if isinstance(value, types.ModuleType):
        return _Sabotaged(value, name)
    if callable(value):
        return lambda *given, **named: sabotage(value(*given, **named), name)
    return value


def _sabotage_array(value: Any, name: str) -> Any:
    if "bool" in str(value.dtype):
        return ~value
    if name == "turned round" and value.ndim:
        return value.flip(0) if hasattr(value, "flip") else value[::-1]
    return OPERATIONS[name](value)


class _Sabotaged:
    """A module whose values and functions are sabotaged."""

    def __init__(self, module: types.ModuleType, name: str) -> None:
        self._module, self._name = module, name

    def __getattr__(self, attribute: str) -> Any:
        return sabotage(getattr(self._module, attribute), self._name)


def sabotages(value: Any) -> Iterator[tuple[str, Any]]:
    """Every (description, sabotaged value): all numbers in it at once, then one item at a time.

    What cannot be done to a value (the negative of a covariance, say) is passed over.
    """
    for name in OPERATIONS:
        with contextlib.suppress(Exception), np.errstate(all="ignore"):
            yield name, sabotage(value, name)
    if not isinstance(value, Mapping | list | tuple) or not 1 < len(value) <= MOST_ITEMS:
        return
    for key in list(value) if isinstance(value, Mapping) else range(len(value)):
        for name in OPERATIONS:
            with contextlib.suppress(Exception):
                items: Any = dict(value) if isinstance(value, Mapping) else list(value)
                items[key] = sabotage(items[key], name)
                yield f"{name} at {key!r}", tuple(items) if isinstance(value, tuple) else items


# --- A notebook, as far as some of its cells need it ---------------------------------------------


@dataclasses.dataclass(frozen=True)
class State:
    """What a deciding cell is given.

    Attributes:
        source: The cell's code.
        names: Everything that the cells before it left behind.
        verdicts: What it glues under `claim-...` when nothing is sabotaged.
    """

    source: str
    names: dict[str, Any]
    verdicts: dict[str, str]


def states(notebook: Path, wanted: set[str], parameters: Mapping[str, Any]) -> dict[str, State]:
    """The state of each wanted cell; only cells that one of them depends on are run.

    Args:
        notebook: The source.
        wanted: Ids of deciding cells.
        parameters: Values that replace those of the parameters cell.
    """
    cells = [c for c in json.loads(notebook.read_bytes())["cells"] if c["cell_type"] == "code"]
    code = {cell["id"]: "".join(cell["source"]) for cell in cells}
    needed = _slice(list(code.items()), wanted)
    first = next(cell["id"] for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    names: dict[str, Any] = {}
    found = {}
    for cell in [first, *(cell for cell in code if cell in needed and cell != first)]:
        before = dict(names)
        glued = run(code[cell], names, notebook.parent)
        if cell == first:
            unknown = parameters.keys() - names.keys()
            assert not unknown, f"{notebook.name} has no parameter {unknown}"
            names.update(parameters)
        if cell in wanted:
            found[cell] = State(code[cell], before, glued)
    return found


def _slice(code: list[tuple[str, str]], wanted: set[str]) -> set[str]:
    """The wanted cells and, backwards, every cell that binds or changes a name they read."""
    needed, read = set(), set()
    for cell, source in reversed(code):
        loads, stores = _names(source)
        if cell in wanted or stores & read:
            needed.add(cell)
            read |= loads
    return needed


def _names(source: str) -> tuple[set[str], set[str]]:
    """The names that a cell reads, and those that it binds or changes in place."""
    loads, stores = set(), set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                loads.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                stores.add(name)
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                stores |= {(alias.asname or alias.name).partition(".")[0] for alias in aliases}
            case ast.Subscript(value=ast.Name(id=name), ctx=ast.Store()):
                stores.add(name)
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=name)))):
                if name != "figures":  # what it draws is not looked at here
                    stores.add(name)
    return loads, stores


def run(source: str, names: dict[str, Any], folder: Path) -> dict[str, str]:
    """Run a cell in these names, quietly, from the notebook's folder; the verdicts it glues."""
    glued: dict[str, str] = {}

    def glue(name: str, value: Any, display: bool = True) -> None:
        if name.startswith("claim-"):
            glued[name] = value

    if "myst_nb" in source:
        source = source.replace("from myst_nb import glue", "")
    names["glue"] = glue
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
        matplotlib.rc_context(),
        np.errstate(all="ignore"),
    ):
        warnings.simplefilter("ignore")
        exec(compile(source, "cell", "exec"), names)
    return glued


def moved_by(state: State, folder: Path) -> dict[str, str]:
    """By claim, a sabotage of one input that gives another verdict; claims that none moves lack."""
    found: dict[str, str] = {}
    read = _names(state.source)[0] - set(dir(builtins)) - {"glue", "print"}
    inputs = [name for name in sorted(read) if name in state.names and _is_ours(state.names[name])]
    for name in sorted(inputs, key=lambda name: callable(state.names[name])):
        arrays = {n: x for n in inputs if isinstance(x := state.names[n], np.ndarray) and n != name}
        shape = getattr(state.names[name], "shape", ())
        same = [(f"replaced by {n}", x) for n, x in arrays.items() if x.shape == shape != ()]
        for how, value in [*sabotages(state.names[name]), *same]:
            with contextlib.suppress(Exception):  # a cell that fails decides nothing
                glued = run(state.source, {**state.names, name: value}, folder)
                for claim, verdict in glued.items():
                    if verdict != state.verdicts.get(claim):
                        found.setdefault(claim, f"{name} {how}: {verdict}")
            if found.keys() >= state.verdicts.keys():
                return found
    return found


def _is_ours(value: Any) -> bool:
    """Whether a thing belongs to the notebook or the package: NumPy itself is not sabotaged."""
    if isinstance(value, types.ModuleType):
        return value.__name__.partition(".")[0] == "qstar"
    if isinstance(value, functools.partial) or not callable(value):
        return True
    return (getattr(value, "__module__", None) or "").partition(".")[0] in (
        "qstar",
        "builtins",
        "__main__",
        "",
    )
