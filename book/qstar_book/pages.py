"""Build the book's pages into book/_build/html, if anything that they are made from has changed.

Always from nothing, beside the last good pages, which are replaced only by a build without a
warning. With CI set, or with `--force`, nothing is skipped.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from .files import find_checkout
from .fresh import digest_of_files
from .translation import FOLDER, READ, translated_pages

HTML = Path("book", "_build", "html")
"""Where the pages are, in the checkout."""

INPUTS = ("book", "data", "qstar", "CITATION.cff", "pyproject.toml", "constraints.txt")
OPTIONS = ("-W", "-n", "--keep-going", "-q")


def made_from(root: Path) -> str:
    """One digest of the names and contents of everything that the pages are made from."""
    files = [file for name in INPUTS for file in [root / name, *sorted((root / name).rglob("*"))]]
    inside = {str(file.relative_to(root)): file for file in files if file.is_file()}
    left_out = {"_build", "__pycache__"}
    return digest_of_files({n: f for n, f in inside.items() if not left_out & set(Path(n).parts)})


def build(root: Path) -> bool:
    """Build afresh and put the result in place; False, and the old pages stay, on a warning."""
    made, html = made_from(root), root / HTML
    fresh = html.with_name("fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    tool = Path(sys.executable).with_name("jupyter-book")
    made_in = fresh / "_build"
    builds = [_start(root, tool, "build", root / "book", "--path-output", fresh, *OPTIONS)]
    editions = 2 if translated_pages(root) else 1
    if editions == 2 and _all_is_read(made_in, builds[0]):
        module = "qstar_book.translation"
        builds.append(_start(root, sys.executable, "-m", module, root, made_in / "html"))
    if any([build.wait() for build in builds]) or len(builds) < editions:
        print(f"The book was not built. What there is of it: {made_in / 'html'}")
        return False
    if editions == 2:
        (made_in / FOLDER).rename(made_in / "html" / FOLDER)
    shutil.rmtree(html, ignore_errors=True)
    (made_in / "html").rename(html)
    (html / ".made-from").write_text(made)
    shutil.rmtree(fresh)
    return True


def _start(root: Path, *command: str | Path) -> subprocess.Popen[bytes]:
    """A build whose standard output, which names folders that are moved, is nobody's business."""
    return subprocess.Popen(list(map(str, command)), cwd=root, stdout=subprocess.DEVNULL)


def _all_is_read(made_in: Path, english: subprocess.Popen[bytes]) -> bool:
    """Wait for the English build to have read every page; whether it has, and did not fail."""
    read = made_in / ".doctrees" / READ
    while not read.exists() and english.poll() is None:
        time.sleep(0.1)
    return read.exists() and not english.poll()


def command(*, force: bool = False, root: Path | None = None) -> int:
    """`qstar-book pages`."""
    root = find_checkout(root)
    earlier = root / HTML / ".made-from"
    unchanged = earlier.is_file() and earlier.read_text() == made_from(root)
    if unchanged and not (force or os.environ.get("CI")):
        print("The pages are up to date.")
    elif not build(root):
        return 1
    print(f"The book: {root / HTML / 'index.html'}")
    return 0
