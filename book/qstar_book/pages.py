"""Build the book's pages into book/_build/html, if anything that they are made from has changed.

Always from nothing, beside the last good pages, which are replaced only by a build without a
warning. With CI set, or with `--force`, nothing is skipped.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from .files import find_checkout

HTML = Path("book", "_build", "html")
"""Where the pages are, in the checkout."""

INPUTS = ("book", "data", "qstar", "pyproject.toml", "constraints.txt")
OPTIONS = ("-W", "-n", "--keep-going", "-q")


def digest(root: Path) -> str:
    """One hash of the names and contents of everything that the pages are made from."""
    total = hashlib.sha256()
    for path in (root / name for name in INPUTS):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            inside = file.relative_to(root)
            if file.is_file() and not {"_build", "__pycache__"} & set(inside.parts):
                content = hashlib.sha256(file.read_bytes()).hexdigest()
                total.update(f"{inside} {content}\n".encode())
    return total.hexdigest()


def build(root: Path) -> bool:
    """Build afresh and put the result in place; False, and the old pages stay, on a warning."""
    made_from, html = digest(root), root / HTML
    fresh = html.with_name("fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    tool = Path(sys.executable).with_name("jupyter-book")
    # Its standard output only names a folder that is moved below; what is wrong goes to stderr.
    command = [tool, "build", root / "book", "--path-output", fresh, *OPTIONS]
    run = subprocess.run(list(map(str, command)), cwd=root, stdout=subprocess.DEVNULL)
    if run.returncode != 0:
        print(f"The book was not built. What there is of it: {fresh / '_build' / 'html'}")
        return False
    shutil.rmtree(html, ignore_errors=True)
    (fresh / "_build" / "html").rename(html)
    (html / ".made-from").write_text(made_from)
    shutil.rmtree(fresh)
    return True


def command(*, force: bool = False, root: Path | None = None) -> int:
    """`qstar-book pages`."""
    root = find_checkout(root)
    made_from = root / HTML / ".made-from"
    unchanged = made_from.is_file() and made_from.read_text() == digest(root)
    if unchanged and not (force or os.environ.get("CI")):
        print("The pages are up to date.")
    elif not build(root):
        return 1
    print(f"The book: {root / HTML / 'index.html'}")
    return 0
