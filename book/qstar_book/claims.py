"""The claims register: what the source claims, and whether the book's cells agree with it.

    qstar-book claims                # the register against what the chapters hold
    qstar-book claims --source FILE  # and its quotations against the source

`data/claims.yaml` has one entry per claim, as `data/claims.schema.json` describes. A claim is
decided by one cell of one notebook, which calls `decide` with its verdict; the register only
repeats that verdict. Whatever disagrees, a verdict, a cell that is gone, a claim without a cell or
a cell that decides an unknown claim, is reported by entry.
"""

import ast
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from .files import RefusedError
from .numbers import read_cells, read_expected, read_glued
from .publishing import VERDICTS

PREFIX = "claim-"


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim of the source.

    Attributes:
        id: Its name; the deciding cell says `decide(id, verdict)`.
        lines: The lines of the source that say it, the first of them first.
        original: What the source says, word for word.
        english: The same in English.
        kind: statement, number, formula, algorithm, figure or future direction.
        verdict: One of `VERDICTS`.
        statement: What holds instead, or what would measure it; MyST Markdown.
        notebook: The notebook that decides it, by stem.
        cell: The id of the deciding cell.
        also: Where the source says the same again.
    """

    id: str
    lines: tuple[int, ...]
    original: str
    english: str
    kind: str
    verdict: str
    statement: str
    notebook: str
    cell: str
    also: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The name under which the deciding cell glues the verdict."""
        return PREFIX + self.id


@dataclass(frozen=True, slots=True)
class Source:
    """The text that the claims are taken from.

    Attributes:
        title: What it is.
        sha256: The hash of its bytes.
        num_lines: How many lines it has.
        without_claims: The lines that claim nothing: headings, blank lines and the like.
    """

    title: str
    sha256: str
    num_lines: int
    without_claims: frozenset[int]


# --- The file ------------------------------------------------------------------------------------


def read_claims(file: Path) -> tuple[Source, tuple[Claim, ...]]:
    """The register.

    Raises:
        ValueError: It is not YAML or breaks its schema (`claims.schema.json`, beside it); an id
            stands twice, or a line of the source is in no entry. Every problem is listed, with its
            entry and key.
    """
    try:
        register = yaml.safe_load(file.read_bytes())
    except yaml.YAMLError as error:
        raise ValueError(f"{file.name} is not YAML: {error}") from error
    schema = json.loads(file.with_name("claims.schema.json").read_bytes())
    found = [
        _in_words(error, register) for error in Draft202012Validator(schema).iter_errors(register)
    ]
    found = found or [*_repeated(register), *_uncovered(register)]
    if found:
        raise ValueError(f"{file.name}:\n" + "\n".join(f"  {problem}" for problem in found))
    source = register["source"]
    about = Source(
        source["title"],
        source["sha256"],
        source["lines"],
        frozenset(_numbers(source["without_claims"])),
    )
    return about, tuple(_claim(entry) for entry in register["claims"])


def _claim(entry: Mapping[str, Any]) -> Claim:
    notebook, _, cell = entry["cell"].partition("#")
    return Claim(
        id=entry["id"],
        lines=tuple(_numbers(entry["lines"])),
        original=entry["original"],
        english=entry["english"],
        kind=entry["kind"],
        verdict=entry["verdict"],
        statement=entry["statement"].strip(),
        notebook=notebook,
        cell=cell,
        also=tuple(entry.get("also", ())),
    )


def _numbers(ranges: str) -> Iterator[int]:
    """The numbers of "12 27-29", in order."""
    for part in ranges.split():
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def _in_words(error: Any, register: Any) -> str:
    """A problem as jsonschema says it, after the entry and the key, with the schema's own hint."""
    path = list(error.absolute_path)
    where = "the register"
    if path[:1] == ["claims"] and len(path) > 1:
        entry = register["claims"][path[1]]
        name = entry.get("id") if isinstance(entry, dict) else None
        where = f"entry {path[1] + 1}" + (f" ({name})" if name else "")
        path = path[2:]
    keys = f", key {'.'.join(map(str, path))}" if path else ""
    hint = error.schema.get("description", "") if error.validator == "pattern" else ""
    return f"{where}{keys}: {error.message} {hint}".rstrip()


def _repeated(register: Mapping[str, Any]) -> Iterator[str]:
    seen: dict[str, int] = {}
    for place, entry in enumerate(register["claims"], start=1):
        if entry["id"] in seen:
            yield f"entry {place} ({entry['id']}), key id: entry {seen[entry['id']]} has it already"
        seen[entry["id"]] = place


def _uncovered(register: Mapping[str, Any]) -> Iterator[str]:
    """Lines of the source that neither an entry nor `without_claims` names, or that it lacks."""
    last = register["source"]["lines"]
    without = set(_numbers(register["source"]["without_claims"]))
    covered = set(without)
    for place, entry in enumerate(register["claims"], start=1):
        lines = set(_numbers(entry["lines"]))
        if lines & without or not lines <= set(range(1, last + 1)):
            yield (
                f"entry {place} ({entry['id']}), key lines: expected lines from 1 to {last} that "
                f"are not in source.without_claims, got {entry['lines']!r}"
            )
        covered |= lines
    if missing := sorted(set(range(1, last + 1)) - covered):
        yield (
            f"source: no entry covers line {', '.join(map(str, missing))}: add the claim, or name "
            "the line in without_claims"
        )


# --- What the book decides -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Decision:
    """What one cell decided.

    Attributes:
        notebook: The notebook, by stem.
        cell: The id of the cell.
        verdict: What it glued.
    """

    notebook: str
    cell: str
    verdict: str


def read_decisions(chapters: Path) -> dict[str, Decision]:
    """By claim id, what the executed notebooks of a folder decided, and where.

    Raises:
        ValueError: Two notebooks decide one claim.
    """
    decisions: dict[str, Decision] = {}
    for chapter in sorted(chapters.glob("*.ipynb")):
        cells = read_cells(chapter)
        for name, value in read_glued(chapter).items():
            if name.startswith(PREFIX):
                _add(decisions, name, Decision(chapter.stem, cells[name], str(value)))
    return decisions


def read_held_decisions(notebooks: Path, expected: Path) -> dict[str, Decision]:
    """The same without executing anything: verdicts from `data/expected`, cells from the sources.

    Raises:
        ValueError: Two notebooks decide one claim, or no cell, or more than one, of a notebook
            glues a verdict that is expected of it.
    """
    decisions: dict[str, Decision] = {}
    for notebook in sorted(notebooks.glob("*.ipynb")):
        file = expected / f"{notebook.stem}.json"
        held = read_expected(file) if file.exists() else {}
        glued = deciding_cells(notebook)
        for name, entry in held.items():
            if not name.startswith(PREFIX):
                continue
            cells = [cell for cell, names in glued.items() if any(n.fullmatch(name) for n in names)]
            if len(cells) != 1:
                where = " and ".join(cells) or "no cell"
                raise ValueError(
                    f"{notebook.name}: expected one cell that glues {name}, got {where}"
                )
            _add(decisions, name, Decision(notebook.stem, cells[0], str(entry.value)))
    return decisions


def _add(decisions: dict[str, Decision], name: str, decision: Decision) -> None:
    claim = name.removeprefix(PREFIX)
    if claim in decisions:
        raise ValueError(f"{decisions[claim].notebook} and {decision.notebook} both decide {claim}")
    decisions[claim] = decision


def deciding_cells(notebook: Path) -> dict[str, list[re.Pattern[str]]]:
    """By cell id, the names of verdicts that a notebook's cells reach, as their source says it.

    A name that is put together, `decide(f"row{row}", ...)`, becomes a pattern.
    """
    cells = {}
    for cell in json.loads(notebook.read_bytes())["cells"]:
        if cell["cell_type"] != "code":
            continue
        calls = [
            (node.func.id, _pattern(node.args[0]))
            for node in ast.walk(ast.parse("".join(cell["source"])))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args
        ]
        names = [re.escape(PREFIX) + name for called, name in calls if called == "decide"]
        if names:
            cells[cell["id"]] = [re.compile(name) for name in names]
    return cells


def _pattern(name: ast.expr) -> str:
    match name:
        case ast.Constant(value=str(text)):
            return re.escape(text)
        case ast.JoinedStr(values=parts):
            return "".join(_pattern(part) for part in parts)
    return r"[\w-]+"


def disagreements(claims: Sequence[Claim], decisions: Mapping[str, Decision]) -> list[str]:
    """Where the register and the book disagree, a line for each; empty if nowhere."""
    found = []
    for claim in claims:
        decision = decisions.get(claim.id)
        if decision is None:
            found.append(
                f"{claim.id}: no cell glues {claim.key}; {claim.notebook}#{claim.cell} should"
            )
            continue
        if (decision.notebook, decision.cell) != (claim.notebook, claim.cell):
            found.append(
                f"{claim.id}, key cell: the register says {claim.notebook}#{claim.cell}, the claim "
                f"is decided in {decision.notebook}#{decision.cell}"
            )
        if decision.verdict != claim.verdict:
            found.append(
                f"{claim.id}, key verdict: the register says {claim.verdict}, "
                f"{decision.notebook}#{decision.cell} says {decision.verdict}"
            )
    for unknown in sorted(decisions.keys() - {claim.id for claim in claims}):
        where = f"{decisions[unknown].notebook}#{decisions[unknown].cell}"
        found.append(f"{unknown}: {where} decides it, and the register has no such entry")
    return found


def misquotations(source: Source, claims: Sequence[Claim], file: Path) -> list[str]:
    """Where the quotations are not exact parts of the source, a line for each; empty if nowhere."""
    content = file.read_bytes()
    found = []
    if hashlib.sha256(content).hexdigest() != source.sha256:
        found.append(f"source, key sha256: {file.name} is another text")
    lines = content.decode().splitlines()
    if len(lines) != source.num_lines:
        found.append(f"source, key lines: {file.name} has {len(lines)}, not {source.num_lines}")
        return found
    for claim in claims:
        said = "\n".join(lines[number - 1] for number in claim.lines)
        for key, quotation in (
            ("original", claim.original),
            *(("also", text) for text in claim.also),
        ):
            if quotation not in said:
                found.append(f"{claim.id}, key {key}: {quotation!r} is not in its lines")
    return found


# --- The command ---------------------------------------------------------------------------------


def command(*, register: Path, notebooks: Path, expected: Path, source: Path | None) -> int:
    """`qstar-book claims`; 1 where something disagrees."""
    try:
        about, claims = read_claims(register)
        found = disagreements(claims, read_held_decisions(notebooks, expected))
        if source:
            found += misquotations(about, claims, source)
    except (ValueError, OSError) as error:
        raise RefusedError(str(error)) from error
    print("\n".join(found) if found else _counts(claims))
    return 1 if found else 0


def _counts(claims: Sequence[Claim]) -> str:
    counts = [f"{sum(c.verdict == verdict for c in claims)} {verdict}" for verdict in VERDICTS]
    return f"{len(claims)} claims agree with the book: {', '.join(counts)}."
