"""The numbers that the book publishes, and whether a fresh run still gives them.

    qstar-book check             # the chapters against data/expected/
    qstar-book accept gaussians  # make a chapter's values the expected ones

A chapter publishes a value by gluing it. `data/expected/<notebook>.json` holds, for each glued
name, its `value`, an absolute `tolerance` and its `origin`: in one line, why this value is right
(a closed form, a reference case by its id, a seeded run on the CPU). Numbers agree within the
tolerance; strings, booleans and types agree exactly. Glued figures are not numbers, and ignored.
"""

import ast
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import RefusedError, write_json
from .fresh import made_from, out_of_date

Value = float | int | str | bool

TODO = "TODO: say why this value is right"


@dataclass(frozen=True, slots=True)
class Expected:
    """What a glued name is held to.

    Attributes:
        value: What the book was published with.
        tolerance: How far a number may be from it, absolutely, in its own unit; 0 for the rest.
        origin: Why it is right, in one line.
    """

    value: Value
    tolerance: float
    origin: str


@dataclass(frozen=True, slots=True)
class Drift:
    """One disagreement between a chapter and what is expected of it.

    Attributes:
        name: The glued name; empty if the whole chapter is meant.
        problem: What is wrong, in a few words.
        expected: What should have come, if anything.
        got: What came, if anything.
        tolerance: How far apart they might have been.
    """

    name: str
    problem: str
    expected: Value | None = None
    got: Value | None = None
    tolerance: float | None = None


# --- What a chapter glued ------------------------------------------------------------------------


def read_glued(notebook: Path) -> dict[str, Value]:
    """Every plain value that an executed notebook glued, by name; figures are left out.

    Raises:
        ValueError: A name is glued twice, or to something that is no figure and no plain Python
            float, int, str or bool (a NumPy scalar, say).
    """
    glued: dict[str, Value] = {}
    seen = set()
    for _, name, shown in _glued_outputs(notebook):
        if name in seen:
            raise ValueError(f"{notebook.name} glues {name!r} twice; the book would show only one")
        seen.add(name)
        if any(kind.startswith("image/") for kind in shown):
            continue
        text = "".join(shown.get("text/plain", ""))
        value = _read_repr(text)
        if value is None:
            raise ValueError(
                f"{notebook.name} glues {name!r} to {text[:80]!r}; glue a plain float, int, str or "
                "bool, for instance float(x)"
            )
        glued[name] = value
    return glued


def read_figure_names(notebook: Path) -> set[str]:
    """The names that an executed notebook glued to figures."""
    outputs = _glued_outputs(notebook)
    return {name for _, name, shown in outputs if any(kind.startswith("image/") for kind in shown)}


def read_cells(notebook: Path) -> dict[str, str]:
    """The id of the cell that glued each name, in an executed notebook."""
    return {name: cell for cell, name, _ in _glued_outputs(notebook)}


def _glued_outputs(notebook: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(id of the cell, name, what is shown by MIME type) for each glued output, in order."""
    for cell in json.loads(notebook.read_bytes())["cells"]:
        for output in cell.get("outputs", []):
            if glue := output.get("metadata", {}).get("scrapbook"):
                prefix, data = glue.get("mime_prefix", ""), output["data"]
                shown = {kind.removeprefix(prefix): said for kind, said in data.items()}
                yield cell.get("id", ""), glue["name"], shown


def _read_repr(text: str) -> Value | None:
    if text in ("nan", "inf", "-inf"):
        return float(text)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None
    return value if isinstance(value, float | int | str | bool) else None


# --- What is expected of it ----------------------------------------------------------------------


def read_expected(file: Path) -> dict[str, Expected]:
    """The entries of one file of `data/expected/`.

    Raises:
        ValueError: It is not JSON, or an entry is not a value, a tolerance and an origin.
    """
    try:
        entries = json.loads(file.read_bytes())
        return {name: _entry(name, entry) for name, entry in entries.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: {error}") from error


def _entry(name: str, entry: Any) -> Expected:
    if not isinstance(entry, dict) or set(entry) != {"value", "tolerance", "origin"}:
        raise ValueError(f"{name!r} must have value, tolerance and origin, got {entry!r}")
    value, tolerance, origin = entry["value"], entry["tolerance"], entry["origin"]
    if isinstance(value, dict) and set(value) == {"float"}:
        value = float(value["float"])
    if not isinstance(value, float | int | str | bool):
        raise ValueError(f"{name!r}: the value must be a number, a text or a truth, got {value!r}")
    if isinstance(tolerance, bool) or not isinstance(tolerance, float | int):
        raise ValueError(f"{name!r}: the tolerance must be a number, got {tolerance!r}")
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"{name!r}: the tolerance must be finite and not negative")
    if not isinstance(origin, str) or not origin.strip() or "\n" in origin:
        raise ValueError(f"{name!r}: the origin must be one line of text, got {origin!r}")
    return Expected(value, tolerance, origin)


def write_expected(file: Path, entries: Mapping[str, Expected]) -> None:
    """Write the entries, sorted by name, floats to the last bit, in one step."""
    plain = {
        name: {"value": _jsonable(e.value), "tolerance": e.tolerance, "origin": e.origin}
        for name, e in sorted(entries.items())
    }
    write_json(file, plain, indent=2)


def _jsonable(value: Value) -> Value | dict[str, str]:
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}  # JSON has no nan
    return value


# --- Comparing -----------------------------------------------------------------------------------


def agrees(value: Value, expected: Expected) -> bool:
    """Whether a value is the expected one: same type; a number within the tolerance; nan is nan."""
    if type(value) is not type(expected.value):
        return False
    if isinstance(value, str | bool) or isinstance(expected.value, str | bool):
        return value == expected.value
    if not (math.isfinite(value) and math.isfinite(expected.value)):
        return value == expected.value or (math.isnan(value) and math.isnan(expected.value))
    return abs(value - expected.value) <= expected.tolerance


def compare(chapter: Path, expected: Path) -> list[Drift]:
    """Where an executed chapter and its file of expected values disagree; empty if nowhere.

    Besides values that drifted this reports names that are expected and were not glued, names
    that were glued and are not expected, and entries whose origin is still to be written.
    """
    got = read_glued(chapter)
    held = read_expected(expected) if expected.exists() else {}
    drifts = []
    for name in sorted(got.keys() | held.keys()):
        if name not in held:
            drifts.append(Drift(name, "not in data/expected: accept it", got=got[name]))
            continue
        entry = held[name]
        if name not in got:
            drifts.append(Drift(name, "no longer glued", entry.value, None, entry.tolerance))
        elif not agrees(got[name], entry):
            drifts.append(Drift(name, "drifted", entry.value, got[name], entry.tolerance))
        if entry.origin.startswith("TODO"):
            drifts.append(Drift(name, "origin not written", entry.value))
    return drifts


def check(
    chapters: Path, expected: Path, names: Sequence[str] | None = None
) -> dict[str, list[Drift]]:
    """Compare the chapters of a folder with the expected values; drifts by chapter.

    Args:
        chapters: The folder of executed notebooks.
        expected: The folder of expected values.
        names: Which notebooks, by stem; by default all that either folder has.
    """
    both = {file.stem for file in [*chapters.glob("*.ipynb"), *expected.glob("*.json")]}
    drifts: dict[str, list[Drift]] = {}
    owners: dict[str, str] = {}
    for stem in sorted(both if names is None else names):
        chapter, held = chapters / f"{stem}.ipynb", expected / f"{stem}.json"
        if not chapter.exists():
            drifts[stem] = [Drift("", "not executed: run qstar-book run")]
            continue
        drifts[stem] = compare(chapter, held)
        for name in read_glued(chapter).keys() | read_figure_names(chapter):
            if name in owners:
                drifts[stem].append(Drift(name, f"also glued by {owners[name]}"))
            owners[name] = stem
    return {stem: found for stem, found in drifts.items() if found}


def default_tolerance(value: Value) -> float:
    """The tolerance of a new name: a millionth of a float, 1e-12 of 0.0; 0 for anything else.

    Float64 results move by less between machines; float32 ones, sampled ones and those that are
    rounding errors move by more, and need a tolerance by hand.
    """
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{1e-6 * abs(value):.0e}") or 1e-12
    return 0.0


def accept(
    chapter: Path, expected: Path, *, tolerance: float | None = None, origin: str | None = None
) -> list[str]:
    """Make a chapter's values the expected ones; what changed, a line each.

    A value within its tolerance is left as it stands, a changed one keeps its tolerance and
    origin, and a name that is no longer glued goes.

    Args:
        chapter: The executed notebook.
        expected: Its file of expected values; made if missing.
        tolerance: For new names that are numbers, instead of `default_tolerance`.
        origin: For new names, instead of one that `check` refuses until somebody writes it.
    """
    got = read_glued(chapter)
    held = read_expected(expected) if expected.exists() else {}
    entries, changes = {}, []
    for name, value in got.items():
        old = held.get(name)
        if old is not None and agrees(value, old):
            entries[name] = old
        elif old is not None and type(old.value) is type(value):
            entries[name] = Expected(value, old.tolerance, old.origin)
            changes.append(f"~ {name}: {old.value!r} -> {value!r}")
        else:
            number = isinstance(value, float | int) and not isinstance(value, bool)
            given = tolerance if number and tolerance is not None else default_tolerance(value)
            entries[name] = Expected(value, given, origin or TODO)
            changes.append(f"+ {name}: {value!r}, tolerance {given:g}, {entries[name].origin}")
    changes += [f"- {name}: {held[name].value!r}" for name in sorted(held.keys() - got.keys())]
    if changes:
        write_expected(expected, entries)
    return changes


# --- The command ---------------------------------------------------------------------------------


def table(drifts: Mapping[str, Sequence[Drift]]) -> str:
    """The drifts as a table that can be read in a terminal."""
    rows = [["", "name", "problem", "expected", "got", "tolerance"]]
    for stem, found in drifts.items():
        for drift in found:
            values = ["" if x is None else repr(x) for x in (drift.expected, drift.got)]
            tolerance = "" if drift.tolerance is None else f"{drift.tolerance:g}"
            rows.append([stem, drift.name, drift.problem, *values, tolerance])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def check_command(*, notebooks: Sequence[str], chapters: Path, expected: Path) -> int:
    """`qstar-book check`; 1 if a published number drifted."""
    names = _stems(notebooks)
    _say_what_is_stale(chapters.resolve(), names)
    try:
        drifts = check(chapters, expected, names)
    except ValueError as error:
        raise RefusedError(str(error)) from error
    if drifts:
        count = sum(map(len, drifts.values()))
        print(f"{table(drifts)}\n{count} problem{'s' * (count != 1)}.")
        return 1
    files = sorted(chapters.glob("*.ipynb")) if names is None else names
    print(f"{len(files)} chapters checked: they give the numbers that are published.")
    return 0


def accept_command(
    *,
    notebooks: Sequence[str],
    chapters: Path,
    expected: Path,
    tolerance: float | None,
    origin: str | None,
) -> None:
    """`qstar-book accept`."""
    names = _stems(notebooks)
    _say_what_is_stale(chapters.resolve(), names)
    for name in names or sorted(chapter.stem for chapter in chapters.glob("*.ipynb")):
        chapter, held = chapters / f"{name}.ipynb", expected / f"{name}.json"
        if not chapter.exists():
            raise RefusedError(f"no executed {chapter}: run qstar-book run")
        try:
            changes = accept(chapter, held, tolerance=tolerance, origin=origin)
        except ValueError as error:
            raise RefusedError(str(error)) from error
        print("\n".join([f"{name}: {len(changes)} changes", *(f"  {line}" for line in changes)]))


def _stems(notebooks: Sequence[str]) -> list[str] | None:
    """Which chapters are meant, by stem; None for all."""
    return [Path(name).name.removesuffix(".ipynb") for name in notebooks] or None


def _say_what_is_stale(chapters: Path, names: Sequence[str] | None) -> None:
    """A note on standard error for every chapter that a run would make anew."""
    root = chapters.parent.parent
    for notebook in sorted((root / "notebooks").glob("*.ipynb")):
        if (chapters / notebook.name).exists() and (names is None or notebook.stem in names):
            reasons = ", ".join(out_of_date(notebook, chapters, made_from(notebook, {}, root)))
            if reasons:
                note = f"note: {notebook.stem} is out of date ({reasons}): run qstar-book run"
                print(note, file=sys.stderr)
