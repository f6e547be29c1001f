"""Execute the notebooks into the book, each only when something that it is made from has changed.

    qstar-book run                         # all of them, into book/chapters/
    qstar-book run --list                  # their parameters, and what is up to date
    qstar-book run --only 06 --set seed=1  # one, into build/runs/, not into the book

A chapter is up to date if it is the very file that the last run wrote, and that run had the same
notebook, modules of `qstar` and `qstar_book` that it imports, directly or through others
(`qstar_book.closure`), data (`data/`, save the expected values and the register of claims, which no
notebook reads), parameters, pins (`constraints.txt`, the installed version of each package
it names, and the Python) and machine (system, processor, accelerators in sight). Where caches lie,
how many threads there are and `--jobs` are left out: they may move the last digits, and published
numbers carry a tolerance.

Each notebook runs in a process of its own and in a fresh kernel of this very Python, whatever other
kernels, IPython profile or matplotlib settings the user has. Its executed copy is stripped of times
and paths and then renamed into place, so that at any moment, and after any interruption, a chapter
is either the old one or the new one. A notebook that fails leaves the old one, and itself in
`build/failed/`.
"""

import argparse
import ast
import fcntl
import fnmatch
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tokenize
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import qstar

from .closure import imported_files
from .files import RefusedError, find_checkout

PACKAGES = (Path(qstar.__file__).resolve().parent, Path(__file__).resolve().parent)
"""The folders of the packages that the chapters import: `qstar` and the book's own."""

RECORDS = ".runner"
"""The folder, inside the output folder, that says what each chapter was made from."""

NOT_READ = ("expected", "claims.yaml", "claims.schema.json")
"""What lies in `data/` and is read by no notebook."""

NAMED = ("numpy", "scipy", "matplotlib", "torch", "transformers")
"""The packages whose versions an executed copy states."""

HEARTBEAT_S = 60.0
GRACE_S = 5.0
SHOWN_LINES = 25


# --- Notebooks and their parameters --------------------------------------------------------------


def known_parameters(notebook: Path) -> dict[str, str]:
    """The parameters of a notebook: each name that its tagged cell assigns, and the default.

    Args:
        notebook: A notebook with at most one cell tagged `parameters`.

    Returns:
        Name to default, as the cell spells it, in the cell's order; empty without such a cell.

    Raises:
        RefusedError: It is not a notebook, or that cell is not Python.
    """
    return {
        target.id: ast.unparse(statement.value)
        for statement in ast.parse(_parameters_cell(notebook)).body
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value
        for target in _targets(statement)
        if isinstance(target, ast.Name)
    }


def declared_ranges(notebook: Path) -> dict[str, str]:
    """What the comment behind each parameter's assignment says of the values it may take.

    A comment declares something if it, or its part before a semicolon, is one of

    - `1..`, `..0.5` or `1..512`: a number, or a list of numbers, within these limits;
    - `distribution of 3`: so many positive probabilities that sum to 1; two such parameters differ;
    - `one of auto, cpu, cuda*`: a text like one of these;
    - `text`: not an empty one;
    - `file`: the path of a file, as seen from the notebook's folder.

    Returns:
        Parameter to declaration; those that declare nothing are left out.
    """
    source = _parameters_cell(notebook)
    said = {
        token.start[0]: token.string.lstrip("# ").partition(";")[0].strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    return {
        target.id: said[statement.end_lineno]
        for statement in ast.parse(source).body
        if isinstance(statement, ast.Assign | ast.AnnAssign)
        for target in _targets(statement)
        if isinstance(target, ast.Name) and statement.end_lineno in said
        if DECLARATION.fullmatch(said[statement.end_lineno])
    }


NUMBER = r"-?\d[\d_]*(?:\.\d+)?(?:e-?\d+)?"
DECLARATION = re.compile(
    rf"(?P<low>{NUMBER})?\.\.(?P<high>{NUMBER})?|distribution of (?P<size>\d+)"
    rf"|one of (?P<choices>.+)|text|file"
)


def _parameters_cell(notebook: Path) -> str:
    """The source of the cell that is tagged `parameters`; empty without one."""
    for cell in _cells(notebook):
        if cell["cell_type"] == "code" and "parameters" in cell["metadata"].get("tags", []):
            source = _text(cell["source"])
            try:
                ast.parse(source)
            except SyntaxError as error:
                raise RefusedError(f"{notebook}: the parameters cell: {error}") from error
            return source
    return ""


def _targets(statement: ast.Assign | ast.AnnAssign) -> list[ast.expr]:
    return statement.targets if isinstance(statement, ast.Assign) else [statement.target]


def _cells(notebook: Path) -> list[dict[str, Any]]:
    try:
        cells: list[dict[str, Any]] = json.loads(notebook.read_bytes())["cells"]
    except (ValueError, KeyError, TypeError) as error:
        raise RefusedError(f"{notebook} is not a notebook: {error}") from error
    return cells


def _text(source: str | list[str]) -> str:
    return source if isinstance(source, str) else "".join(source)


def read_setting(text: str) -> tuple[str, object]:
    """Split NAME=VALUE; the value is a Python literal or, failing that, the text itself."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise RefusedError(f"--set takes NAME=VALUE, such as seed=1; got {text!r}")
    try:
        literal = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
    if not _plain(literal):
        raise RefusedError(
            f"--set {name}: a notebook can be given numbers that are finite, texts, True, False, "
            f"None, and lists, tuples and dicts (by text) of these; got {value}"
        )
    return name, literal


def _plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    return value is None or (isinstance(value, bool | int | str) or _is_finite(value))


def _is_finite(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def as_literals() -> Any:
    """A translator for papermill that writes parameters as Python does, so that each arrives whole.

    Its own writes a tuple as the text of it.
    """
    from papermill.translators import PythonTranslator  # type: ignore[import-untyped]

    class Literals(PythonTranslator):  # type: ignore[misc]
        @classmethod
        def translate(cls, val: object) -> str:
            return repr(val)

    return Literals


def check_parameters(notebooks: Sequence[Path], parameters: Mapping[str, object]) -> None:
    """Refuse a parameter that one of the notebooks does not have, or a value it cannot take.

    That is one of another type than the default, or outside what the parameters cell declares
    (`declared_ranges`). Papermill only warns of the first and takes the second as it comes, so that
    a misspelt `seed` or `flag=false`, a non-empty string, would go unnoticed.

    Raises:
        RefusedError: It lists the parameters of each notebook that lacks one.
    """
    problems = []
    for notebook in notebooks:
        known = known_parameters(notebook)
        if unknown := sorted(parameters.keys() - known.keys()):
            it_has = ", ".join(known) or "none"
            problems.append(
                f"{notebook.stem} has no parameter {', '.join(unknown)}; it has {it_has}"
            )
        before = len(problems)
        for name in sorted(parameters.keys() & known.keys()):
            with suppress(ValueError, TypeError):  # a default that is no literal says nothing
                default = ast.literal_eval(known[name])
                if not _alike(default, parameters[name]):
                    problems.append(
                        f"{notebook.stem}: {name} is {_kind(default)} (by default {known[name]}); "
                        f"got {parameters[name]!r}, {_kind(parameters[name])}"
                    )
        if len(problems) == before:
            problems += _out_of_range(notebook, known, parameters)
    if problems:
        hint = " (choose notebooks with --only)" if len(notebooks) > 1 else ""
        raise RefusedError("\n".join(problems) + hint)


def _out_of_range(
    notebook: Path, known: Mapping[str, str], parameters: Mapping[str, object]
) -> Iterator[str]:
    """What the parameters cell of a notebook forbids."""
    declared = declared_ranges(notebook)
    for name in sorted(declared.keys() & parameters.keys()):
        if problem := _problem(declared[name], parameters[name], notebook.parent):
            yield f"{notebook.stem}: {name} must be {problem}; got {parameters[name]!r}"
            return
    laws = [name for name, said in declared.items() if said.startswith("distribution")]
    values = [list(parameters.get(name, ast.literal_eval(known[name]))) for name in laws]  # type: ignore[call-overload]
    if parameters.keys() & set(laws) and any(value in values[:i] for i, value in enumerate(values)):
        yield f"{notebook.stem}: {' and '.join(laws)} must differ; got {values[0]!r} for both"


def _problem(declared: str, value: object, folder: Path) -> str | None:
    """What a value must be and is not."""
    found = DECLARATION.fullmatch(declared)
    assert found is not None
    if found["size"]:
        right = (
            isinstance(value, list | tuple)
            and len(value) == int(found["size"])
            and all(isinstance(x, int | float) and x > 0 for x in value)
            and abs(sum(value) - 1) < 1e-9
        )
        return None if right else f"{found['size']} positive probabilities that sum to 1"
    if found["choices"]:
        choices = [choice.strip() for choice in found["choices"].split(",")]
        fits = any(fnmatch.fnmatchcase(str(value), choice) for choice in choices)
        return None if fits else declared
    if declared == "text":
        return None if str(value).strip() else "a text that is not empty"
    if declared == "file":
        there = (folder / str(value)).is_file()
        return None if there else f"a file, as seen from {_short(folder)}"
    numbers: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    low = -math.inf if found["low"] is None else float(found["low"])
    high = math.inf if found["high"] is None else float(found["high"])
    fits = all(_is_number(x) and low <= x <= high for x in numbers)
    limits = [f"at least {found['low']}"] if found["low"] else []
    limits += [f"at most {found['high']}"] if found["high"] else []
    return None if fits else " and ".join(limits)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _alike(default: object, value: object) -> bool:
    if default is None:
        return True
    if isinstance(default, float):
        return isinstance(value, float | int) and not isinstance(value, bool)
    if isinstance(default, list | tuple):
        return isinstance(value, list | tuple)
    return type(default) is type(value)


def _kind(value: object) -> str:
    return f"of type {type(value).__name__}"


def select(folder: Path, only: Collection[str] | None) -> list[Path]:
    """The notebooks in a folder, or those of them that are named by number, name or path.

    Raises:
        RefusedError: A name fits none of them; the message lists them.
    """
    notebooks = sorted(path for path in folder.glob("*.ipynb") if not path.name.startswith("."))
    if only is None:
        return notebooks
    chosen = set()
    for wanted in only:
        name = Path(wanted).stem if wanted.endswith(".ipynb") else wanted
        name = name.zfill(2) if name.isdecimal() else name
        found = {path for path in notebooks if path.stem == name or path.stem.split("_")[0] == name}
        if "/" in wanted:
            found = {path for path in found if path.resolve() == Path(wanted).resolve()}
        if not found:
            there_are = ", ".join(path.stem for path in notebooks) or "none"
            raise RefusedError(f"no notebook {wanted!r} in {folder}; there are: {there_are}")
        chosen |= found
    return sorted(chosen)


# --- What a chapter is made from -----------------------------------------------------------------


def made_from(
    notebook: Path,
    parameters: Mapping[str, object],
    root: Path,
    *,
    packages: Sequence[Path] = PACKAGES,
) -> dict[str, str]:
    """Everything that decides what an executed notebook shows: part by part, a digest or a text.

    Args:
        notebook: The source.
        parameters: What replaces the defaults of its parameters cell.
        root: The checkout, with `data/` and `constraints.txt` (either may be missing).
        packages: The folders of our packages, of which the notebook imports some modules.
    """
    return {
        "notebook": _digest(notebook.read_bytes()),
        "modules that it imports": _closure_digest(notebook, packages),
        "data": _tree_digest(root / "data", leave_out=NOT_READ),
        "pins": _digest("\n".join(_pins(root / "constraints.txt")).encode()),
        "parameters": repr(sorted(parameters.items())),
        "machine": f"{sys.platform} {platform.machine()}, accelerators: {accelerators()}",
    }


def _closure_digest(notebook: Path, packages: Sequence[Path]) -> str:
    """Of the modules that the notebook's code imports, through others too, and of this runner."""
    code = "\n".join(
        _text(cell["source"]) for cell in _cells(notebook) if cell["cell_type"] == "code"
    )
    modules = imported_files(code, packages)
    lines = [f"{name} {_digest(file.read_bytes())}\n" for name, file in modules.items()]
    return _digest("".join([*lines, _digest(Path(__file__).read_bytes())]).encode())


def accelerators() -> str:
    """Which accelerators torch could see, found without loading it; "none" on a CPU."""
    devices = [device.name for device in Path("/dev").glob("nvidia[0-9]*")]
    devices += ["kfd"] if Path("/dev/kfd").exists() else []
    devices += ["mps"] if (sys.platform, platform.machine()) == ("darwin", "arm64") else []
    if not devices:
        return "none"
    limits = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
    chosen = [f"{name}={os.environ[name]}" for name in limits if name in os.environ]
    return " ".join(sorted(devices) + chosen)


def _pins(constraints: Path) -> Iterator[str]:
    """The Python, the pins, and the installed version of every package that they name."""
    yield f"{platform.python_implementation()} {platform.python_version()}"
    text = constraints.read_text(encoding="utf8") if constraints.is_file() else ""
    for line in text.splitlines():
        if pin := re.match(r"([\w.-]+)\s*==", line):
            yield f"{line} installed {_version(pin[1])}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _tree_digest(folder: Path, *, leave_out: Collection[str] = ()) -> str:
    lines = []
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        ignored = any(part.startswith(".") or part == "__pycache__" for part in inside.parts)
        if file.is_file() and not ignored and inside.parts[0] not in leave_out:
            lines.append(f"{inside.as_posix()} {_digest(file.read_bytes())}\n")
    return _digest("".join(lines).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def out_of_date(notebook: Path, out: Path, made: Mapping[str, str]) -> list[str]:
    """Why the executed copy in `out` is not the one that a run would give now; empty if it is."""
    try:
        content = (out / notebook.name).read_bytes()
    except FileNotFoundError:
        return ["not run yet"]
    try:
        record = json.loads(_record_of(notebook, out).read_bytes())
        output, earlier = record["output"], dict(record["made_from"])
    except (OSError, ValueError, KeyError, TypeError):
        return ["no record of the last run"]
    if output != _digest(content):
        return ["the executed copy is not what the last run wrote"]
    return [f"{part} changed" for part in made if earlier.get(part) != made[part]]


def _record_of(notebook: Path, out: Path) -> Path:
    return out / RECORDS / f"{notebook.stem}.json"


# --- The executed copy ---------------------------------------------------------------------------


def finished(executed: dict[str, Any], parameters: Mapping[str, object]) -> dict[str, Any]:
    """An executed notebook as the book takes it: the same on every run, no times, no paths.

    Args:
        executed: What papermill wrote, as JSON data.
        parameters: What replaced the defaults; recorded in its metadata, with the versions.

    Raises:
        ValueError: A code cell was not executed (the notebook ended its own kernel).
    """
    cells = []
    for number, cell in enumerate(executed["cells"], 1):
        metadata = {
            k: v for k, v in cell["metadata"].items() if k not in ("papermill", "execution")
        }
        if metadata.get("tags") == []:
            del metadata["tags"]
        cell = {**cell, "metadata": metadata}
        if "injected-parameters" in metadata.get("tags", []):
            cell["id"] = "injected-parameters"  # papermill draws one at random
        if cell["cell_type"] == "code" and _text(cell["source"]).strip():
            if cell["execution_count"] is None:
                raise ValueError(f"cell {number} was not executed, and no earlier one failed")
            for output in cell["outputs"]:
                if output["output_type"] == "error":  # papermill takes exit() for a good end
                    raise ValueError(f"cell {number} ended with {output['ename']}")
        cells.append(cell)
    metadata = {k: v for k, v in executed["metadata"].items() if k != "papermill"}
    metadata["qstar"] = {
        "parameters": {name: repr(value) for name, value in sorted(parameters.items())},
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in NAMED},
        "accelerators": accelerators(),
    }
    return {**executed, "cells": cells, "metadata": metadata}


def _as_json(data: object) -> bytes:
    return (json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _place(content: bytes, final: Path, scratch: Path) -> None:
    """Put a file under its final name in one step, whole."""
    handle, name = tempfile.mkstemp(dir=scratch)
    with os.fdopen(handle, "wb") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    final.parent.mkdir(parents=True, exist_ok=True)
    os.replace(name, final)


# --- Running -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Run:
    """One notebook being executed by a process of its own.

    Attributes:
        notebook: The source.
        made: What it is made from, as of the start.
        folder: Scratch; holds the copy that is executed and the one that papermill writes.
        process: The worker; it lives as long as its standard input is open.
        events: The pipe on which it tells how far it is, one JSON object a line.
        started: When, by the monotonic clock.
        cell: The number of the cell that is running, from 1.
        cells: How many there are.
        kernel: The kernel's process, once there is one.
        error: What the worker said went wrong.
    """

    notebook: Path
    made: dict[str, str]
    folder: Path
    process: subprocess.Popen[bytes]
    events: int
    started: float
    cell: int = 0
    cells: int = 0
    kernel: int | None = None
    error: dict[str, Any] | None = None
    pending: bytes = b""
    told_at: float = field(default=0.0)

    @property
    def name(self) -> str:
        return self.notebook.stem

    @property
    def output(self) -> Path:
        return self.folder / "executed.ipynb"

    def seconds(self) -> float:
        return time.monotonic() - self.started


class Display(Protocol):
    """Where progress is shown."""

    def begin(self, run: Run) -> None: ...
    def show(self, run: Run) -> None: ...
    def end(self, run: Run, message: str) -> None: ...
    def close(self) -> None: ...


class Lines:
    """Progress as plain lines, for logs: starts, ends, and a sign of life each minute."""

    def begin(self, run: Run) -> None:
        print(f"{run.name}: started", file=sys.stderr, flush=True)

    def show(self, run: Run) -> None:
        if run.seconds() - run.told_at >= HEARTBEAT_S:
            run.told_at = run.seconds()
            at = f"{run.name}: cell {run.cell} of {run.cells} after {run.told_at:.0f} s"
            print(at, file=sys.stderr, flush=True)

    def end(self, run: Run, message: str) -> None:
        print(f"{run.name}: {message}", file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


class Bars:
    """Progress as bars, for a terminal: one for all notebooks, and one for each that runs."""

    def __init__(self, notebooks: int, jobs: int) -> None:
        from tqdm import tqdm

        self._tqdm = tqdm
        self._free = list(range(jobs, 0, -1))
        self._bars: dict[str, Any] = {}
        shape = "{desc:24} {bar} {n_fmt}/{total_fmt} {unit}, {elapsed}"
        self._options: dict[str, Any] = {"bar_format": shape, "file": sys.stderr, "ncols": 79}
        self._all = tqdm(
            total=notebooks, desc="all", unit="notebooks", position=0, leave=False, **self._options
        )

    def begin(self, run: Run) -> None:
        name, position = run.name[:24], self._free.pop()
        self._bars[run.name] = self._tqdm(
            desc=name, unit="cells", position=position, leave=False, **self._options
        )

    def show(self, run: Run) -> None:
        bar = self._bars[run.name]
        bar.total, bar.n = run.cells or None, max(0, run.cell - 1)
        bar.refresh()
        self._all.refresh()

    def end(self, run: Run, message: str) -> None:
        bar = self._bars.pop(run.name)
        self._free.append(-bar.pos)
        bar.close()
        self._tqdm.write(f"{run.name}: {message}", file=sys.stderr)
        self._all.n += 1
        self._all.refresh()

    def close(self) -> None:
        for bar in [*self._bars.values(), self._all]:
            bar.close()


def run_all(
    notebooks: Sequence[Path],
    out: Path,
    parameters: Mapping[str, object],
    *,
    root: Path,
    failed: Path,
    jobs: int,
    limit_s: float,
    display: Display,
) -> list[str]:
    """Execute notebooks into `out`, `jobs` at a time; every one has its turn, whatever fails.

    Args:
        notebooks: The sources; never written to.
        out: The folder of the executed copies.
        parameters: What replaces the defaults of their parameters cells; known to all of them.
        root: The checkout.
        failed: The folder for copies that failed.
        jobs: How many run at once; each gets its share of the cores.
        limit_s: The seconds each may take, from the start of its process.
        display: Where to show progress.

    Returns:
        The names of those that failed. Their earlier copies in `out` are as they were.
    """
    waiting, running, failures = list(notebooks), list[Run](), list[str]()
    threads = max(1, _cores() // max(1, min(jobs, len(notebooks))))
    with _scratch(out) as scratch, selectors.DefaultSelector() as selector:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = _start(waiting.pop(0), parameters, root, scratch, threads)
                    running.append(run)
                    selector.register(run.events, selectors.EVENT_READ, run)
                    display.begin(run)
                ended = [
                    key.data for key, _ in selector.select(timeout=0.5) if not _listen(key.data)
                ]
                for run in running:
                    display.show(run)
                late = [run for run in running if run not in ended and run.seconds() > limit_s]
                for run in [*ended, *late]:
                    selector.unregister(run.events)
                    _end(run)
                    running.remove(run)
                    if run in late:
                        said = f"stopped after {limit_s:g} s, its limit (--limit)"
                        run.error = {"said": said}
                    problem = _keep(run, out, parameters, root, scratch)
                    if problem is None:
                        display.end(run, f"done, {run.cells} cells in {run.seconds():.0f} s")
                        (failed / run.notebook.name).unlink(missing_ok=True)
                    else:
                        failures.append(run.name)
                        display.end(run, _with_places(problem, run, out, failed, scratch))
        finally:
            display.close()
            for run in running:
                _end(run)
    return sorted(failures)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A folder on the file system of `out`; what a killed run left of its own is removed."""
    place = out / RECORDS / "running"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _start(
    notebook: Path, parameters: Mapping[str, object], root: Path, scratch: Path, threads: int
) -> Run:
    """Start the worker that executes one notebook as it is now."""
    made = made_from(notebook, parameters, root)
    folder = Path(tempfile.mkdtemp(dir=scratch))
    shutil.copyfile(notebook, folder / "source.ipynb")
    (folder / "matplotlibrc").touch()
    read_end, write_end = os.pipe()
    job = {
        "folder": str(folder),
        "parameters": repr(dict(parameters)),
        "cwd": str(notebook.parent),
        "events": write_end,
    }
    above = os.environ.get("PYTHONPATH")
    environment = {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [*dict.fromkeys(str(p.parent) for p in PACKAGES), *([above] if above else [])]
        ),
        "PYTHONHASHSEED": "0",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "MATPLOTLIBRC": str(folder / "matplotlibrc"),  # nobody's own settings
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "TQDM_DISABLE": "1",  # a chapter is no place for the debris of progress bars
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    command = [sys.executable, "-c", "from qstar_book.run import _work; _work()", json.dumps(job)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[write_end],
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the runner alone, and it ends the others
        )
    os.close(write_end)
    return Run(notebook, made, folder, process, read_end, time.monotonic())


def _listen(run: Run) -> bool:
    """Take in what the worker has told; False when it has closed its end."""
    told = os.read(run.events, 1 << 16)
    *lines, run.pending = (run.pending + told).split(b"\n")
    for line in lines:
        for name, value in json.loads(line).items():
            setattr(run, name, value)
    return bool(told)


def _end(run: Run) -> None:
    """End the worker and its kernel, if they have not ended by themselves."""
    assert run.process.stdin is not None
    run.process.stdin.close()
    try:
        run.process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        _kill_group(run.kernel)
        run.process.kill()
        run.process.wait()
    os.close(run.events)


def _kill_group(leader: int | None) -> None:
    if leader is not None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, signal.SIGKILL)


def _keep(
    run: Run, out: Path, parameters: Mapping[str, object], root: Path, scratch: Path
) -> str | None:
    """Put a good copy in its place and record what it was made from; else say what is wrong."""
    if run.error is not None:
        return describe({"cell": run.cell, **run.error}, _source_of(run))
    if run.process.returncode != 0:
        log = _plain_lines((run.folder / "log").read_text(errors="replace"))
        where = f"its process ended with {run.process.returncode} in cell {run.cell}"
        return "\n".join([f"failed: {where}; it said last:", *(f"    {x}" for x in log[-15:])])
    try:
        content = _as_json(finished(json.loads(run.output.read_bytes()), parameters))
    except ValueError as error:
        return f"failed: {error}"
    record = _record_of(run.notebook, out)
    record.unlink(missing_ok=True)
    _place(content, out / run.notebook.name, scratch)
    if made_from(run.notebook, parameters, root) == run.made:  # else: edited while it ran
        _place(_as_json({"output": _digest(content), "made_from": run.made}), record, scratch)
    return None


def _source_of(run: Run) -> list[str]:
    """The lines of the cell that was running, as it stands in the copy that was executed."""
    with suppress(OSError, ValueError, LookupError):
        cells = [
            cell
            for cell in json.loads(run.output.read_bytes())["cells"]
            if "papermill-error-cell-tag" not in cell["metadata"].get("tags", [])
        ]
        return _text(cells[run.cell - 1]["source"]).splitlines()
    return []


def describe(error: Mapping[str, Any], source: Sequence[str]) -> str:
    """A failure in a page: the cell, an arrow at its line, where it was raised and the error.

    Args:
        error: `said` (one line), `cell` (its number) and, if Python raised, `traceback`: IPython's,
            whose last entry is the error itself.
        source: The lines of the cell.
    """
    trace = [_plain_lines(entry) for entry in error.get("traceback", [])]
    arrow, raised_in = 0, ""
    for entry in trace:
        if entry and re.match(r"(Cell In|File .*ipykernel)", entry[0]):
            arrows = [found[1] for line in entry if (found := re.match(r"-+> *(\d+)", line))]
            arrow = int(arrows[0]) if arrows else arrow
        elif entry and (frame := re.match(r"File (.+?:\d+), in (\w+)", entry[0])):
            raised_in = f"raised in {frame[2]}, {_short(frame[1])}"
    first = max(0, min(arrow - SHOWN_LINES // 2, len(source) - SHOWN_LINES))
    shown = [
        f"{'-->' if number == arrow else '   '} {number:3} | {line}"
        for number, line in enumerate(source, 1)
        if first < number <= first + SHOWN_LINES
    ]
    said = trace[-1] if trace else _plain_lines(error["said"])
    if len(said) > SHOWN_LINES:
        said = [*said[:SHOWN_LINES], "..."]
    head = f"failed in cell {error['cell']}" if error["cell"] else "failed before its first cell"
    middle = [f"    {raised_in}"] if raised_in else []
    return "\n".join([head, *shown, *middle, *(f"    {line}" for line in said)])


def _plain_lines(text: str) -> list[str]:
    """Lines without the escape sequences of a terminal."""
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).strip("\n").splitlines()


def _with_places(problem: str, run: Run, out: Path, failed: Path, scratch: Path) -> str:
    """The failure, and where to look: keeps the copy that failed, if there is a whole one."""
    places = []
    with suppress(OSError, ValueError):
        content = run.output.read_bytes()
        json.loads(content)
        copy = failed / run.notebook.name
        failed.mkdir(parents=True, exist_ok=True)
        shutil.move(run.output, copy)
        places.append(f"The copy with its outputs and the traceback: {_short(copy)}")
    if (chapter := out / run.notebook.name).exists():
        places.append(f"The earlier good copy is kept: {_short(chapter)}")
    return "\n".join([problem, *(f"    {place}" for place in places)])


def _short(path: Path | str) -> str:
    """A path as seen from the current folder, if it is inside."""
    with suppress(ValueError):
        return str(Path(path).relative_to(Path.cwd()))
    return str(path)


# --- The worker ----------------------------------------------------------------------------------


def _work() -> None:
    """What the process of one notebook does: execute it, and tell the runner how far it is."""
    job = json.loads(sys.argv[1])
    folder = Path(job["folder"])
    report = os.fdopen(job["events"], "w")
    os.set_inheritable(report.fileno(), False)
    client: Any = None

    def tell(**event: object) -> None:
        report.write(json.dumps(event) + "\n")
        report.flush()

    def kernel() -> int | None:
        return getattr(getattr(client and client.km, "provisioner", None), "pid", None)

    def end_with_the_runner() -> None:
        os.read(0, 1)  # returns when the runner closes its end or is no more
        _kill_group(kernel())
        os._exit(1)

    threading.Thread(target=end_with_the_runner, daemon=True).start()

    import papermill  # type: ignore[import-untyped]
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec
    from papermill.clientwrap import PapermillNotebookClient  # type: ignore[import-untyped]
    from papermill.engines import NBClientEngine, papermill_engines  # type: ignore[import-untyped]
    from papermill.translators import papermill_translators

    class ThisPython(AsyncKernelManager):
        """Kernels of this interpreter, whatever `python3` means to the user's Jupyter."""

        @property
        def kernel_spec(self) -> KernelSpec:
            command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=command, display_name="Python 3", language="python")

    class Engine(NBClientEngine):
        """Papermill's engine, telling the runner before each cell."""

        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **_: Any) -> Any:
            nonlocal client
            start = nb_man.cell_start

            def cell_start(cell: Any, cell_index: int, **options: Any) -> None:
                tell(cell=cell_index + 1, cells=len(nb_man.nb.cells), kernel=kernel())
                start(cell, cell_index, **options)

            nb_man.cell_start = cell_start
            client = PapermillNotebookClient(
                nb_man,
                kernel_name=kernel_name,
                kernel_manager_class=ThisPython,
                startup_timeout=120,
                record_timing=False,
            )
            return client.execute()

    papermill_engines.register("qstar", Engine)
    papermill_translators.register("python", as_literals())
    try:
        papermill.execute_notebook(
            folder / "source.ipynb",
            folder / "executed.ipynb",
            parameters=ast.literal_eval(job["parameters"]),
            engine_name="qstar",
            cwd=job["cwd"],
            progress_bar=False,
        )
    except papermill.PapermillExecutionError as error:
        said = f"{error.ename}: {error.evalue}"
        tell(error={"said": said, "cell": error.cell_index + 1, "traceback": error.traceback})
    except Exception as error:
        tell(error={"said": f"{type(error).__name__}: {error}"})
        raise
    sys.stdout.flush()
    os._exit(0)  # not by returning: a closed pipe tells the runner to end this process


# --- The command ---------------------------------------------------------------------------------


def command(**options: Any) -> int:
    """`qstar-book run`; 1 if a notebook failed."""
    return _main(argparse.Namespace(**options))


def _main(options: argparse.Namespace) -> int:
    if options.jobs < 1 or not options.limit > 0:
        raise RefusedError("--jobs and --limit must be positive")
    root = find_checkout(options.root)
    book = root / "book" / "chapters"
    parameters = dict(map(read_setting, options.set))
    notebooks = select(root / "notebooks", options.only)
    check_parameters(notebooks, parameters)
    if options.out is not None:
        out = options.out.resolve()
    else:
        out = root / "build" / "runs" / _run_name(parameters) if parameters else book
    if options.list:
        print("\n".join(_listing(notebooks, out, parameters, root)))
        return 0
    failed = root / "build" / "failed" if out == book else out / "failed"
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out, wait=not options.no_wait), _termination_is_an_interrupt():
        if out == book:
            _remove_strays(out, {path.name for path in select(root / "notebooks", None)})
        due = [
            notebook
            for notebook in notebooks
            if options.force or out_of_date(notebook, out, made_from(notebook, parameters, root))
        ]
        failures = list[str]()
        if due:
            bars = sys.stderr.isatty()
            failures = run_all(
                due,
                out,
                parameters,
                root=root,
                failed=failed,
                jobs=options.jobs,
                limit_s=options.limit,
                display=Bars(len(due), options.jobs) if bars else Lines(),
            )
    counts = {
        "executed": len(due) - len(failures),
        "up to date": len(notebooks) - len(due),
        "failed": len(failures),
    }
    said = ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "no notebooks"
    print(f"{_short(out)}: {said}" + (f" ({', '.join(failures)})" if failures else ""))
    return 1 if failures else 0


def _run_name(parameters: Mapping[str, object]) -> str:
    """A folder name that tells runs apart, and a reader which one this is."""
    said = ",".join(f"{name}={value}" for name, value in sorted(parameters.items()))
    readable = re.sub(r"[^\w=,.+-]+", "_", said)[:60]
    return f"{readable}-{_digest(repr(sorted(parameters.items())).encode())[:6]}"


def _listing(
    notebooks: Sequence[Path], out: Path, parameters: Mapping[str, object], root: Path
) -> Iterator[str]:
    yield f"Into {_short(out)}:"
    for notebook in notebooks:
        reasons = out_of_date(notebook, out, made_from(notebook, parameters, root))
        yield f"{notebook.stem}: {', '.join(reasons) or 'up to date'}"
        declared = declared_ranges(notebook)
        for name, default in known_parameters(notebook).items():
            changed = f"  (here {parameters[name]!r})" if name in parameters else ""
            allowed = f"  # {declared[name]}" if name in declared else ""
            yield f"    {name} = {default}{allowed}{changed}"


def _remove_strays(book: Path, names: Collection[str]) -> None:
    """Remove chapters whose notebook is no more, and what was recorded of them."""
    for chapter in book.glob("*.ipynb"):
        if chapter.name not in names:
            chapter.unlink()
            _record_of(chapter, book).unlink(missing_ok=True)
            print(f"{chapter.stem}: removed, its notebook is no more", file=sys.stderr)


@contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[None]:
    """Be the only run that writes to a folder; the lock goes with the process, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"another run is writing to {_short(folder)}"
            if not wait:
                raise RefusedError(f"{message}; start again when it has ended") from None
            print(f"qstar-book: {message}; waiting for its end", file=sys.stderr, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def _termination_is_an_interrupt() -> Iterator[None]:
    """A request to end, or a closed terminal, unwinds as Ctrl-C does; not what `nohup` ignores."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    earlier = {
        number: signal.signal(number, interrupt)
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
