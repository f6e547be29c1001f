"""What several test modules share."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_finish():
    """What libraries and tests consist of stays until the end: no collector need look at it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_finding_outlives_a_patch(request):
    """What a cache is found to do while something is patched is true in that test alone."""
    tried = sys.modules.get("qstar.decoding.cache_check")
    if tried is not None and "monkeypatch" in request.fixturenames:
        patch = request.getfixturevalue("monkeypatch")
        patch.setattr(tried, "_FOUND", dict(tried._FOUND))


@pytest.fixture(scope="session")
def chapters():
    """The book's chapters, brought up to date: a second after `make book`, minutes before it."""
    from filelock import FileLock  # here, for `make newest` runs other tests without it

    command = [sys.executable, "-m", "qstar_book", "run"]
    (ROOT / "build").mkdir(exist_ok=True)
    with FileLock(ROOT / "build" / ".chapters.lock"):  # one of the processes that run the tests
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        pytest.fail(f"the chapters could not be made:\n{result.stdout}\n{result.stderr}")
    return ROOT / "book" / "chapters"
