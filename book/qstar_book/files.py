"""What the commands share: the checkout, JSON that is written whole, how a record was made."""

import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any


class RefusedError(ValueError):
    """What was asked for cannot be done; the message says what can."""


def find_checkout(given: Path | None = None) -> Path:
    """The project's folder: the one given, else the one this package lies in, else the current one.

    Raises:
        RefusedError: It holds no folder `notebooks`.
    """
    for root in [given] if given else [Path(__file__).resolve().parents[2], Path.cwd()]:
        if (root / "notebooks").is_dir():
            return root.resolve()
    raise RefusedError(
        f"no folder notebooks/ in {given or Path.cwd()}: run this in a checkout, or name one with "
        "--root"
    )


def short(path: Path) -> str:
    """A path as seen from the current folder, if it is inside."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def write_json(path: Path, data: object, *, indent: int = 1) -> None:
    """Write JSON, complete or not at all; a list of plain values takes one line.

    Raises:
        TypeError: Something in `data` is no JSON; nothing was written.
        ValueError: The same, of nan and the infinities.
    """
    text = json.dumps(data, indent=indent, ensure_ascii=False, allow_nan=False)
    text = re.sub(r"\[\n[^\[\]{}]*\]", lambda found: re.sub(r"\n\s*", " ", found[0]), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf8") as file:
            os.fchmod(handle, 0o644)
            file.write(text + "\n")
            file.flush()
            os.fsync(handle)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def command_line() -> str:
    """The command that is running, as a record repeats it: absolute paths by their last name."""
    said = [Path(x).name if Path(x).is_absolute() else x for x in sys.argv[1:]]
    return shlex.join(["qstar-book", *said])


def provenance(*packages: str, **machine: Any) -> dict[str, Any]:
    """How a record is being made: command, date, what is told of the machine, versions, and by
    which source of `qstar` (`source_digest`)."""
    return {
        "command": command_line(),
        "source": source_digest(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
    }


def source_digest() -> str:
    """What tells one revision of `qstar` from another, where no version control is at hand: the
    beginning of the SHA-256 of its modules, in the order of their names."""
    found = hashlib.sha256()
    for file in sorted(Path(str(files("qstar"))).rglob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()[:12]


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


IN_ITS_OWN = """
import importlib, json, sys
function = getattr(importlib.import_module(sys.argv[1]), sys.argv[2])
found = function(**json.loads(sys.stdin.readline()))
print("\\n" + json.dumps(found))
"""


class OwnProcess:
    """A fresh Python that imports what a function needs, and waits to call it once."""

    def __init__(
        self, function: Callable[..., Any], *, environment: Mapping[str, str] | None = None
    ) -> None:
        """Begin to import.

        Args:
            function: One that stands in a module by its own name.
            environment: Variables that are set there, besides those that are set here, before
                anything is imported.
        """
        self._process = subprocess.Popen(
            [sys.executable, "-c", IN_ITS_OWN, function.__module__, function.__name__],
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def call(self, given: Mapping[str, Any], *, limit_s: float | None = None) -> Any:
        """Call it, and end.

        Args:
            given: Its arguments, as JSON can hold them; so must be what it returns.
            limit_s: After so many seconds it is ended.

        Raises:
            RuntimeError: It failed, or took too long; the message is the end of what it said.
        """
        try:
            out, said = self._process.communicate(json.dumps(dict(given)) + "\n", timeout=limit_s)
        except subprocess.TimeoutExpired:
            self.end()
            raise RuntimeError(f"took longer than {limit_s} s") from None
        if self._process.returncode:
            raise RuntimeError(said[-2000:])
        return json.loads(out.splitlines()[-1])

    def end(self) -> None:
        """Without a call."""
        self._process.kill()
        self._process.communicate()


def in_own_process(
    function: Callable[..., Any],
    given: Mapping[str, Any],
    *,
    environment: Mapping[str, str] | None = None,
    limit_s: float | None = None,
) -> Any:
    """What a function returns in a fresh Python: `OwnProcess` made and called at once."""
    return OwnProcess(function, environment=environment).call(given, limit_s=limit_s)
