"""What would the verdict be, had the data come out otherwise? Each deciding cell is asked that.

The data are changed, and nothing else (a condition that no data can make false moves all the same
once a function or a constant of the package is broken): the names that hold what was measured,
counted, solved or read from a record get values that could have come out, and the cells between
them and the verdict run again. Each claim needs data other than the book's under which its
published verdict holds, and data under which another one must follow; each verdict that a cell can
utter must follow from some data.

A chapter's cases stand in a test file of its own, `tests/decided/test_decided_NAME.py`:

    NOTEBOOK, FEWER = "exact_sampling", {"trials": 200}  # parameters that make it quick
    CASES = (
        Case("loop-step-draft", "confirmed", {"careless": torch.tensor([0, 0])}, "possible tokens"),
        Case("rule-is-exact", "refuted", {"gaps": Changed(lambda gaps: gaps + 0.1)}, "another one"),
    )

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_the_verdict_follows_the_data(case):
        assert decide(NOTEBOOK, case, CASES, FEWER) == case.verdict, case.why

    def test_every_verdict_of_the_chapter_could_have_come_out_otherwise():
        assert lacking(NOTEBOOK, CASES) == []

A name keeps its new value from the last cell before the deciding one that binds it; whatever is
computed from it on the way is computed again, and nothing else: the other cells run once a process,
and those that no case needs do not run. A value instead of the chapter's spares the cells that make
it, `Changed` does not. Prefer a name far up (a record, the parents) where the cells in between are
quick, so that they are tested, too. Functions and modules are refused: a verdict that only other
code would move does not rest on data. A cell in between must not change in place what an earlier
cell made, for it would do so twice.

What a cell only prints, or publishes as a number, is left out: no later cell hears of it.
"""

import ast
import contextlib
import dataclasses
import functools
import io
import json
import re
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from qstar_book.claims import VERDICTS, Claim, read_claims

matplotlib.use("Agg")

ROOT = Path(__file__).resolve().parents[2]
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
    """A notebook, run as far as some questions need it.

    Attributes:
        folder: Where it lies.
        code: By cell id, the code of each code cell.
        made: By cell id, what the cell bound, for the cells that were run.
    """

    folder: Path
    code: dict[str, str]
    made: dict[str, dict[str, Any]]


def read_chapter(
    notebook: Path,
    asked: Iterable[tuple[str, Mapping[str, Any]]],
    parameters: Mapping[str, Any],
) -> Chapter:
    """Run what must stand as it is to ask each of these cells about these data.

    Args:
        notebook: The file.
        asked: Deciding cells, each with the data that could have come out.
        parameters: Values that replace those of its parameters cell.
    """
    cells = [c for c in json.loads(notebook.read_bytes())["cells"] if c["cell_type"] == "code"]
    code = {cell["id"]: _without_telling("".join(cell["source"])) for cell in cells}
    first = next(cell["id"] for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    needed = {first}.union(*(_plan(code, cell, data).kept for cell, data in asked))
    chapter = Chapter(notebook.parent, code, {})
    names: dict[str, Any] = {}
    for cell in code:
        if cell in needed:
            run(code[cell], names, notebook.parent)
            if cell == first:
                unknown = parameters.keys() - names.keys()
                assert not unknown, f"{notebook.name} has no parameter {unknown}"
                names.update(parameters)
            chapter.made[cell] = {x: names[x] for x in names_of(code[cell]).stores if x in names}
    return chapter


def decide_in(chapter: Chapter, claim: str, cell: str, data: Mapping[str, Any]) -> str:
    """The verdict of a cell on a claim, had the data been these."""
    plan = _plan(chapter.code, cell, data)
    names: dict[str, Any] = {}
    for c in _before(chapter.code, cell):
        if c in plan.again:
            run(chapter.code[c], names, chapter.folder)
        elif c in plan.kept:
            names |= {x: v for x, v in chapter.made[c].items() if x in plan.kept[c]}
        for name in plan.given[c]:
            value = data[name]
            old = names[name] if isinstance(value, Changed) else value
            code = callable(old) or isinstance(old, types.ModuleType)
            assert not code, f"{name} is code, not data: name what was measured or solved"
            names[name] = value.how(old) if isinstance(value, Changed) else value
    return run(chapter.code[cell], names, chapter.folder)[claim]


@dataclasses.dataclass
class Plan:
    """How to ask a cell about other data.

    Attributes:
        given: By cell id, the names that get their other values after it, for those that count.
        kept: By cell id, the names that are as the chapter made them, for the cells that count.
        again: The cells that read something that is not as the chapter made it.
    """

    given: dict[str, list[str]]
    kept: dict[str, set[str]]
    again: set[str]


def _plan(code: Mapping[str, str], cell: str, data: Mapping[str, Any]) -> Plan:
    """What must run, and what must run again, to ask a cell about other data."""
    plan = Plan({}, {}, set())
    before = _before(code, cell)
    binder = {name: c for c in before for name in names_of(code[c]).stores}
    assert data.keys() <= binder.keys(), f"no cell before {cell} makes one of {', '.join(data)}"
    needed, read = set(), names_of(code[cell]).loads
    for c in reversed(before):  # whatever binds or changes a name that is read further down
        plan.given[c] = [name for name in data if binder[name] == c and name in read]
        read = read - {name for name in plan.given[c] if not isinstance(data[name], Changed)}
        here = names_of(code[c])
        if here.stores & read:
            needed.add(c)
            read = (read - here.anew) | here.loads
    dirty: set[str] = set()
    for c in before:
        here = names_of(code[c])
        if c in needed and here.loads & dirty:
            plan.again.add(c)
            dirty |= here.stores
        elif c in needed:
            dirty -= here.anew
            plan.kept[c] = here.stores - dirty
        dirty |= set(plan.given[c])
    reads = names_of(code[cell]).loads & dirty
    assert reads or not data, f"{cell} reads nothing that depends on {', '.join(data)}"
    return plan


def _before(code: Mapping[str, str], cell: str) -> list[str]:
    cells = list(code)
    return cells[: cells.index(cell)]


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


_CHAPTERS: dict[str, Chapter] = {}


def decide(
    notebook: str, case: Case, cases: Iterable[Case], parameters: Mapping[str, Any] | None = None
) -> str:
    """What the chapter's deciding cell would have said.

    Args:
        notebook: The chapter, by its file's name.
        case: One of the cases.
        cases: All of them: the chapter is run once a process, as far as they need it.
        parameters: Values that replace those of its parameters cell.
    """
    cell_of = {claim.id: claim.cell for claim in CLAIMS if claim.notebook == notebook}
    if notebook not in _CHAPTERS:
        asked = [(cell_of[other.claim], other.data) for other in cases]
        _CHAPTERS[notebook] = read_chapter(NOTEBOOKS / f"{notebook}.ipynb", asked, parameters or {})
    return decide_in(_CHAPTERS[notebook], case.claim, cell_of[case.claim], case.data)


def lacking(notebook: str, cases: Iterable[Case]) -> list[str]:
    """What the cases leave unasked of the chapter's claims, a line for each."""
    cells = json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_bytes())["cells"]
    code = {c["id"]: "".join(c["source"]) for c in cells if c["cell_type"] == "code"}
    return lacking_in([c for c in CLAIMS if c.notebook == notebook], code, cases)


# --- A notebook's cells -----------------------------------------------------------------------


def _without_telling(source: str) -> str:
    """A cell without the statements that print, or publish a number."""
    body = ast.parse(source).body
    return "\n".join(ast.unparse(statement) for statement in body if not _only_tells(statement))


def _only_tells(statement: ast.stmt) -> bool:
    match statement:
        case ast.Expr(value=ast.Call(func=ast.Name(id="print" | "publish"))):
            return True
    return False


@dataclasses.dataclass
class Names:
    """The names of a cell.

    Attributes:
        loads: Those that it reads as an earlier cell left them.
        stores: Those that it binds or changes in place.
        anew: Those of them that it binds, whatever they were, and on every way through it.
    """

    loads: set[str]
    stores: set[str]
    anew: set[str]


@functools.cache
def names_of(source: str) -> Names:
    """What a cell reads and binds."""
    names = Names(set(), set(), set())
    _follow_all(ast.parse(source).body, names, names.anew)
    return names


def _follow(node: ast.AST, names: Names, bound: set[str]) -> None:
    """Take in a piece of code in the order in which it runs.

    Args:
        node: The code.
        names: What was found so far; this piece is added to it.
        bound: What this cell has certainly bound on the way here; this piece is added to it, unless
            it may be skipped. Inside a comprehension or a lambda: its own names, too.
    """
    match node:
        case ast.Name(id=name, ctx=ast.Load()):
            names.loads |= {name} - bound
        case ast.Name(id=name):
            names.stores.add(name)
            bound.add(name)
        case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
            imported = {(alias.asname or alias.name).partition(".")[0] for alias in aliases}
            names.stores |= imported
            bound |= imported
        case ast.Assign(targets=targets, value=value):
            _follow_all([value, *targets], names, bound)
        case ast.AugAssign(target=target, value=value):
            as_read = ast.parse(ast.unparse(target), mode="eval").body
            _follow_all([as_read, value, target], names, bound)
        case (ast.Subscript(ctx=ast.Store()) | ast.Attribute(ctx=ast.Store())) as place:
            if isinstance(place.value, ast.Name):
                names.stores.add(place.value.id)
            _follow_all(ast.iter_child_nodes(node), names, bound)
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=name))) as call):
            if name != "figures":  # what it draws is not looked at here
                names.stores.add(name)
            _follow(call, names, bound)
        case ast.For(iter=first, target=target, body=body, orelse=orelse):
            _follow(first, names, bound)
            _follow_all([target, *body], names, set(bound))
            _follow_all(orelse, names, set(bound))
        case ast.If(test=test, body=body, orelse=orelse):
            _follow(test, names, bound)
            either, other = set(bound), set(bound)
            _follow_all(body, names, either)
            _follow_all(orelse, names, other)
            bound |= either & other
        case ast.BoolOp(values=[first, *others]):
            _follow(first, names, bound)
            _follow_all(others, names, set(bound))
        case ast.IfExp(test=test, body=body, orelse=orelse):
            _follow(test, names, bound)
            for value in (body, orelse):
                _follow(value, names, set(bound))
        case ast.While() | ast.Try() | ast.Match():  # any part of it may be skipped
            for child in ast.iter_child_nodes(node):
                _follow(child, names, set(bound))
        case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
            own = Names(names.loads, set(), set())  # its variables are nobody else's
            inside = set(bound)
            for part in node.generators:
                _follow_all([part.iter, part.target, *part.ifs], own, inside)
            value = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
            _follow_all(value, own, inside)
        case ast.Lambda(args=arguments, body=body):
            _follow(arguments, names, bound)
            own = {a.arg for a in ast.walk(arguments) if isinstance(a, ast.arg)}
            _follow(body, Names(names.loads, set(), set()), bound | own)
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            for child in ast.iter_child_nodes(node):  # its own names count as read: too many
                _follow(child, Names(names.loads, set(), set()), set())
            names.stores.add(name)
            bound.add(name)
        case _:
            _follow_all(ast.iter_child_nodes(node), names, bound)


def _follow_all(nodes: Iterable[ast.AST], names: Names, bound: set[str]) -> None:
    for node in nodes:
        _follow(node, names, bound)


def run(source: str, names: dict[str, Any], folder: Path) -> dict[str, str]:
    """Run a cell in these names, quietly, from the notebook's folder; the verdicts it reaches."""
    decided: dict[str, str] = {}
    source = re.sub(r"from qstar_book.publishing import [\w, ]+", "", source)
    names |= {"decide": decided.__setitem__, "publish": lambda values: None}
    names |= {"cells_of": lambda *table, **how: {}}
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
        matplotlib.rc_context(),
        np.errstate(all="ignore"),
    ):
        warnings.simplefilter("ignore")
        exec(compile(source, "cell", "exec"), names)
    return decided
