"""Build the book's pages into book/_build/html, if anything that they are made from has changed.

Always from nothing, beside the last good pages, which are replaced only by a build without a
warning. With CI set, or with `--force`, nothing is skipped.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from .files import find_checkout
from .fresh import digest_of_files
from .translation import translated_pages

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
    # Its standard output only names a folder that is moved below; what is wrong goes to stderr.
    command = [tool, "build", root / "book", "--path-output", fresh, *OPTIONS]
    run = subprocess.run(list(map(str, command)), cwd=root, stdout=subprocess.DEVNULL)
    if run.returncode == 0 and translated_pages(root):
        english = fresh / "_build" / "html"
        chinese = [sys.executable, "-m", "qstar_book.translation", str(root), str(english)]
        run = subprocess.run(chinese, cwd=root, stdout=subprocess.DEVNULL)
    if run.returncode != 0:
        print(f"The book was not built. What there is of it: {fresh / '_build' / 'html'}")
        return False
    shutil.rmtree(html, ignore_errors=True)
    (fresh / "_build" / "html").rename(html)
    (html / ".made-from").write_text(made)
    shutil.rmtree(fresh)
    return True


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
