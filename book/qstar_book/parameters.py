"""The parameters of a notebook: what its tagged cell declares, and what may be put in their place.

Checked before any work begins. Papermill only warns of a name that a notebook does not have, takes
any value as it comes (`flag=false` is a text, and true), and cuts a default in two at a `#` in it.
"""

import ast
import fnmatch
import io
import json
import math
import re
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import RefusedError, short

NUMBER = r"-?\d[\d_]*(?:\.\d+)?(?:e-?\d+)?"
DECLARATION = re.compile(
    rf"(?P<low>{NUMBER})?\.\.(?P<high>{NUMBER})?|distribution of (?P<size>\d+)"
    rf"|one of (?P<choices>.+)|text|file"
)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One assignment of a notebook's parameters cell.

    Attributes:
        default: The value, as the cell spells it.
        declared: What the comment behind it says that the value may be; empty if it says nothing.
    """

    default: str
    declared: str = ""


def read_cells(notebook: Path) -> list[dict[str, Any]]:
    """The cells of a notebook, the source of each in one text.

    Raises:
        RefusedError: It is no notebook.
    """
    try:
        cells: list[dict[str, Any]] = json.loads(notebook.read_bytes())["cells"]
        return [{**cell, "source": "".join(cell["source"])} for cell in cells]
    except (ValueError, KeyError, TypeError) as error:
        raise RefusedError(f"{notebook} is not a notebook: {error}") from error


def read_parameters(notebook: Path) -> dict[str, Parameter]:
    """The parameters of a notebook, in the order of its cell tagged `parameters`; {} without one.

    The comment behind an assignment declares something if it, or its part before a semicolon, is

    - `1..`, `..0.5` or `1..512`: a number, or a list of numbers, within these limits;
    - `distribution of 3`: so many positive probabilities that sum to 1; two such parameters differ;
    - `one of auto, cpu, cuda*`: a text like one of these;
    - `text`: not an empty one;
    - `file`: the path of a file, as seen from the notebook's folder.

    Raises:
        RefusedError: It is no notebook, or that cell is not Python.
    """
    sources = [
        cell["source"]
        for cell in read_cells(notebook)
        if cell["cell_type"] == "code" and "parameters" in cell["metadata"].get("tags", [])
    ]
    source = sources[0] if sources else ""
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise RefusedError(f"{notebook}: the parameters cell: {error}") from error
    said = {
        token.start[0]: token.string.lstrip("# ").partition(";")[0].strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for statement in statements:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value:
            declared = said.get(statement.end_lineno or 0, "")
            declared = declared if DECLARATION.fullmatch(declared) else ""
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for target in targets:
                if isinstance(target, ast.Name):
                    found[target.id] = Parameter(ast.unparse(statement.value), declared)
    return found


def read_setting(text: str) -> tuple[str, object]:
    """Split NAME=VALUE; the value is a Python literal or, failing that, the text itself."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise RefusedError(f"--set takes NAME=VALUE, such as seed=1; got {text!r}")
    try:
        literal = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
    if not _is_plain(literal):
        raise RefusedError(
            f"--set {name}: a notebook can be given numbers that are finite, texts, True, False, "
            f"None, and lists, tuples and dicts (by text) of these; got {value}"
        )
    return name, literal


def _is_plain(value: object) -> bool:
    match value:
        case list() | tuple():
            return all(map(_is_plain, value))
        case dict():
            return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
        case float():
            return math.isfinite(value)
    return value is None or isinstance(value, int | str)


def check_parameters(notebooks: Sequence[Path], given: Mapping[str, object]) -> None:
    """Refuse a parameter that one of the notebooks does not have, or a value it cannot take.

    That is one of another type than the default (an integer serves for a float, a tuple for a
    list), or outside what the parameters cell declares (`read_parameters`).

    Raises:
        RefusedError: A line for each problem; the parameters of each notebook that lacks one.
    """
    problems = [
        f"{notebook.stem}{problem}"
        for notebook in notebooks
        for problem in _problems(read_parameters(notebook), given, notebook.parent)
    ]
    if problems:
        hint = " (choose notebooks with --only)" if len(notebooks) > 1 else ""
        raise RefusedError("\n".join(problems) + hint)


def _problems(
    known: Mapping[str, Parameter], given: Mapping[str, object], folder: Path
) -> Iterator[str]:
    if unknown := sorted(given.keys() - known.keys()):
        yield f" has no parameter {', '.join(unknown)}; it has {', '.join(known) or 'none'}"
    distributions: dict[str, Any] = {}
    for name, parameter in known.items():
        try:
            default = ast.literal_eval(parameter.default)
        except (ValueError, TypeError):  # no literal: any type will do
            default = None
        value = given.get(name, default)
        if not _alike(default, value):
            yield (
                f": {name} is of type {type(default).__name__} (by default {parameter.default}); "
                f"got {value!r}, of type {type(value).__name__}"
            )
        elif name in given and (limits := _broken(parameter.declared, value, folder)):
            yield f": {name} must be {limits}; got {value!r}"
        elif parameter.declared.startswith("distribution"):
            distributions[name] = list(value)  # type: ignore[call-overload]
    rows = list(distributions.values())
    repeated = any(row in rows[:i] for i, row in enumerate(rows))
    if repeated and given.keys() & distributions.keys():
        yield f": {' and '.join(distributions)} must differ; got {rows[0]!r} for both"


def _alike(default: object, value: object) -> bool:
    match default:
        case None:
            return True
        case float():
            return _is_number(value)
        case list() | tuple():
            return isinstance(value, list | tuple)
    return type(default) is type(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _broken(declared: str, value: Any, folder: Path) -> str | None:
    """What a value must be and is not."""
    found = DECLARATION.fullmatch(declared)
    if found is None:  # nothing is declared
        return None
    items = list(value) if isinstance(value, list | tuple) else [value]
    numbers = all(map(_is_number, items))
    if size := found["size"]:
        fits = numbers and len(items) == int(size) and min(items) > 0 and abs(sum(items) - 1) < 1e-9
        declared = f"{size} positive probabilities that sum to 1"
    elif choices := found["choices"]:
        fits = any(fnmatch.fnmatchcase(str(value), choice.strip()) for choice in choices.split(","))
    elif declared == "text":
        fits, declared = bool(str(value).strip()), "a text that is not empty"
    elif declared == "file":
        fits = (folder / str(value)).is_file()
        declared = f"a file, as seen from {short(folder)}"
    else:
        low, high = found["low"], found["high"]
        fits = numbers and all(
            (low is None or float(low) <= x) and (high is None or x <= float(high)) for x in items
        )
        limits = [f"at least {low}" if low else "", f"at most {high}" if high else ""]
        declared = " and ".join(filter(None, limits))
    return None if fits else declared
