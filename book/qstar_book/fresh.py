"""What an executed chapter was made from, and whether a run would give it anew.

A chapter is up to date if it is the very file that the last run wrote, and that run had the same
notebook, modules of `qstar` and `qstar_book` that it imports, directly or through others
(`qstar_book.closure`), data (`data/`, save the expected values and the register of claims, which no
notebook reads), parameters, pins (`constraints.txt`, the installed version of each package it
names, and the Python) and machine (system, processor, accelerators in sight). Where caches lie, how
many threads there are and `--jobs` are left out: they may move the last digits, and published
numbers carry a tolerance.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import qstar

from .closure import imported_files
from .parameters import read_cells

HERE = Path(__file__).resolve().parent
PACKAGES = (Path(qstar.__file__).resolve().parent, HERE)
"""The folders of the packages that the chapters import: `qstar` and the book's own."""

RUNNER = {name: HERE / name for name in ("run.py", "_worker.py")}
RECORDS = ".runner"
"""The folder, inside the output folder, that says what each chapter was made from."""

NOT_READ = ("expected", "claims.yaml", "claims.schema.json")
"""What lies in `data/` and is read by no notebook."""


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
        "notebook": digest(notebook.read_bytes()),
        "modules that it imports": digest_of_files(modules_of(notebook, packages) | RUNNER),
        "data": digest_of_files(_data(root / "data")),
        "pins": digest("\n".join(_pins(root / "constraints.txt")).encode()),
        "parameters": repr(sorted(parameters.items())),
        "machine": f"{sys.platform} {platform.machine()}, accelerators: {accelerators()}",
    }


def modules_of(notebook: Path, packages: Sequence[Path] = PACKAGES) -> dict[str, Path]:
    """The modules of our packages that a notebook imports, directly or through others."""
    code = "\n".join(c["source"] for c in read_cells(notebook) if c["cell_type"] == "code")
    return imported_files(code, packages)


def out_of_date(notebook: Path, out: Path, made: Mapping[str, str]) -> list[str]:
    """Why the executed copy in `out` is not the one that a run would give now; empty if it is."""
    try:
        content = (out / notebook.name).read_bytes()
    except FileNotFoundError:
        return ["not run yet"]
    try:
        record = json.loads(record_of(notebook, out).read_bytes())
        output, earlier = record["output"], dict(record["made_from"])
    except (OSError, ValueError, KeyError, TypeError):
        return ["no record of the last run"]
    if output != digest(content):
        return ["the executed copy is not what the last run wrote"]
    return [f"{part} changed" for part in made if earlier.get(part) != made[part]]


def record_of(notebook: Path, out: Path) -> Path:
    """The file that says what a chapter in `out` was made from."""
    return out / RECORDS / f"{notebook.stem}.json"


def digest(content: bytes) -> str:
    """The SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def digest_of_files(files: Mapping[str, Path]) -> str:
    """Of the names and the contents of some files."""
    lines = [f"{name} {digest(file.read_bytes())}\n" for name, file in files.items()]
    return digest("".join(lines).encode())


def _data(folder: Path) -> dict[str, Path]:
    """The files that a notebook may read, by name; no hidden ones."""
    return {
        inside.as_posix(): file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and (inside := file.relative_to(folder)).parts[0] not in NOT_READ
        if not any(part.startswith((".", "__pycache__")) for part in inside.parts)
    }


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
            yield f"{line} installed {installed_version(pin[1])}"


def installed_version(name: str) -> str:
    """The version of a package that is installed, or "none"."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"
