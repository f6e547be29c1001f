"""What would the verdict be, had the data come out otherwise? Each deciding cell is asked that.

The data are changed, and nothing else (a condition that no data can make false moves all the same
once a function or a constant of the package is broken): the names that hold what was measured,
counted, solved or read from a record get values that could have come out, and the cells between
them and the verdict run again. Each claim needs data other than the book's under which its
published verdict holds, and data under which another one must follow; each verdict that a cell can
utter must follow from some data.

A chapter's cases stand in a test file of its own, `tests/test_counterfactuals_NN.py`:

    NOTEBOOK, FEWER = "05_exact_sampling", {"trials": 200}  # parameters that make it quick
    CASES = (
        Case("loop-step-draft", "confirmed", {"careless": torch.tensor([0, 0])}, "possible tokens"),
        Case("rule-is-exact", "refuted", {"gaps": Changed(lambda gaps: gaps + 0.1)}, "another law"),
    )

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_the_verdict_follows_the_data(case):
        assert decide(NOTEBOOK, case, FEWER) == case.verdict, case.why

    def test_every_verdict_of_the_chapter_could_have_come_out_otherwise():
        assert lacking(NOTEBOOK, CASES) == []

A name keeps its new value from the last cell before the deciding one that binds it; whatever is
computed from it on the way is computed again. Prefer a name far up (a record, the parents) where
the cells in between are quick, so that they are tested, too. Functions and modules are refused: a
verdict that only other code would move does not rest on data. A cell in between must not change in
place what an earlier cell made, for it would do so twice.
"""

import ast
import contextlib
import dataclasses
import functools
import io
import json
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from qstar_book.claims import VERDICTS, Claim, read_claims

matplotlib.use("Agg")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
_, CLAIMS = read_claims(ROOT / "data" / "claims.yaml")


@dataclasses.dataclass(frozen=True)
class Changed:
    """A value that is made from the one that the chapter has."""

    how: Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """Data that could have come out, and the verdict that must then follow.

    Attributes:
        claim: Its id in the register.
        verdict: What the deciding cell must say.
        data: By name, the value instead of the chapter's, or `Changed`.
        why: What the data are, in words.
    """

    claim: str
    verdict: str
    data: Mapping[str, Any]
    why: str

    def __str__(self) -> str:
        return f"{self.claim}: {self.verdict} with {self.why}"


@dataclasses.dataclass
class Chapter:
    """A notebook, run as far as its deciding cells need it.

    Attributes:
        folder: Where it lies.
        code: By cell id, the code of each code cell.
        after: By cell id, every name as it stands after the cell, for the cells that were run.
        verdicts: By claim id, what was glued.
    """

    folder: Path
    code: dict[str, str]
    after: dict[str, dict[str, Any]]
    verdicts: dict[str, str]


def read_chapter(notebook: Path, wanted: Iterable[str], parameters: Mapping[str, Any]) -> Chapter:
    """Run what the wanted cells need, with these values of its parameters."""
    cells = [c for c in json.loads(notebook.read_bytes())["cells"] if c["cell_type"] == "code"]
    code = {cell["id"]: "".join(cell["source"]) for cell in cells}
    first = next(cell["id"] for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    needed = {first, *_slice(list(code.items()), set(wanted))}
    chapter = Chapter(notebook.parent, code, {}, {})
    names: dict[str, Any] = {}
    for cell in code:
        if cell in needed:
            glued = run(code[cell], names, notebook.parent)
            if cell == first:
                unknown = parameters.keys() - names.keys()
                assert not unknown, f"{notebook.name} has no parameter {unknown}"
                names.update(parameters)
            chapter.after[cell] = dict(names)
            chapter.verdicts |= {key.removeprefix("claim-"): v for key, v in glued.items()}
    return chapter


def decide_in(chapter: Chapter, claim: str, cell: str, data: Mapping[str, Any]) -> str:
    """The verdict of a cell on a claim, had the data been these."""
    before = list(chapter.after)[: list(chapter.after).index(cell)]
    bound = {}
    for name in data:
        binders = [c for c in before if name in _names(chapter.code[c])[1]]
        assert binders, f"no cell before {cell} makes {name}"
        bound[name] = binders[-1]
        old = chapter.after[binders[-1]][name]
        code = callable(old) or isinstance(old, types.ModuleType)
        assert not code, f"{name} is code, not data: name what was measured or solved"
    needed = _slice([(c, chapter.code[c]) for c in [*before, cell]], {cell})
    start = min((before.index(c) for c in bound.values()), default=len(before) - 1)
    names = dict(chapter.after[before[start]])
    dirty: set[str] = set()
    for c in before[start:]:
        loads, stores = _names(chapter.code[c])
        if c in needed and loads & dirty:
            run(chapter.code[c], names, chapter.folder)
            dirty |= stores
        elif c != before[start]:  # as it was
            old = chapter.after[c]
            names |= {name: old[name] for name in stores - dirty if name in old}
        for name in (name for name, binder in bound.items() if binder == c):
            value = data[name]
            names[name] = value.how(names[name]) if isinstance(value, Changed) else value
            dirty.add(name)
    read = _names(chapter.code[cell])[0]
    assert not data or read & dirty, f"{cell} reads nothing that depends on {', '.join(data)}"
    return run(chapter.code[cell], names, chapter.folder)[f"claim-{claim}"]


def lacking_in(
    claims: Iterable[Claim], code: Mapping[str, str], cases: Iterable[Case]
) -> list[str]:
    """What the cases leave unasked of these claims, a line for each."""
    asked: dict[str, set[str]] = {}
    for case in cases:
        asked.setdefault(case.claim, set()).add(case.verdict)
    found = []
    uttered: dict[str, set[str]] = {}
    for claim in claims:
        cell = uttered.setdefault(claim.cell, set())
        verdicts = asked.pop(claim.id, set())
        cell |= {claim.verdict, *verdicts}
        if claim.verdict == "not measured":
            continue  # no data, no counterfactual
        if claim.verdict not in verdicts:
            found.append(f"{claim.id}: no other data that leave it {claim.verdict}")
        if not verdicts - {claim.verdict}:
            found.append(f"{claim.id}: no data that would make it anything but {claim.verdict}")
    for cell, verdicts in uttered.items():
        nodes = ast.walk(ast.parse(code[cell]))
        said = {n.value for n in nodes if isinstance(n, ast.Constant) and n.value in VERDICTS}
        found += [f"{cell}: no data make it say {v}" for v in sorted(said - verdicts)]
    return found + [f"{claim}: not a claim of this chapter" for claim in asked]


# --- The book's own chapters ---------------------------------------------------------------------


@functools.cache
def _chapter(notebook: str, parameters: tuple[tuple[str, Any], ...]) -> Chapter:
    wanted = {claim.cell for claim in CLAIMS if claim.notebook == notebook}
    return read_chapter(NOTEBOOKS / f"{notebook}.ipynb", wanted, dict(parameters))


def decide(notebook: str, case: Case, parameters: Mapping[str, Any] | None = None) -> str:
    """What the chapter's deciding cell would have said; the chapter is run once a process."""
    (claim,) = (c for c in CLAIMS if (c.id, c.notebook) == (case.claim, notebook))
    chapter = _chapter(notebook, tuple((parameters or {}).items()))
    return decide_in(chapter, claim.id, claim.cell, case.data)


def lacking(notebook: str, cases: Iterable[Case]) -> list[str]:
    """What the cases leave unasked of the chapter's claims, a line for each."""
    cells = json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_bytes())["cells"]
    code = {c["id"]: "".join(c["source"]) for c in cells if c["cell_type"] == "code"}
    return lacking_in([c for c in CLAIMS if c.notebook == notebook], code, cases)


# --- A notebook's cells -----------------------------------------------------------------------


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
