"""The book's pages, for tests that look at them: where they are, and what is done once a run."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
HTML = BOOK / "_build" / "html"


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def once(folders: pytest.TempPathFactory, name: str, make: Callable[[], str]) -> str:
    """What `make` returns, called by the first of the processes that run the tests."""
    folder = folders.getbasetemp()
    kept = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / name
    with FileLock(kept.with_suffix(".lock")):
        if not kept.exists():
            kept.write_text(make(), encoding="utf8")
    return kept.read_text(encoding="utf8")
