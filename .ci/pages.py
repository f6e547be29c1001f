"""Build the book's pages into book/_build/html, if anything that they are made from has changed.

Always from nothing, beside the last good pages, which are replaced only by a build without a
warning. With CI set, or with --force, nothing is skipped.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "book" / "_build"
HTML = BUILD / "html"
MADE_FROM = HTML / ".made-from"
INPUTS = ("book", "data", "qstar", "pyproject.toml", "constraints.txt")
OPTIONS = ("-W", "-n", "--keep-going", "-q")


def input_files() -> Iterator[Path]:
    for name in INPUTS:
        path = ROOT / name
        yield from sorted(path.rglob("*")) if path.is_dir() else [path]


def digest() -> str:
    """One hash of the names and contents of everything that the pages are made from."""
    total = hashlib.sha256()
    for file in input_files():
        if file.is_file() and BUILD not in file.parents and "__pycache__" not in file.parts:
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            total.update(f"{file.relative_to(ROOT)} {content}\n".encode())
    return total.hexdigest()


def build() -> bool:
    """Build afresh and put the result in place; False, and the old pages stay, on a warning."""
    made_from = digest()
    fresh = BUILD / "fresh"
    shutil.rmtree(fresh, ignore_errors=True)
    tool = Path(sys.executable).with_name("jupyter-book")
    where = [str(ROOT / "book"), "--path-output", str(fresh)]
    # Its standard output only names a folder that is moved below; what is wrong goes to stderr.
    command = [str(tool), "build", *where, *OPTIONS]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    if run.returncode != 0:
        print(f"The book was not built. What there is of it: {fresh / '_build' / 'html'}")
        return False
    shutil.rmtree(HTML, ignore_errors=True)
    (fresh / "_build" / "html").rename(HTML)
    MADE_FROM.write_text(made_from)
    shutil.rmtree(fresh)
    return True


def main(arguments: list[str]) -> int:
    force = "--force" in arguments or bool(os.environ.get("CI"))
    unchanged = MADE_FROM.is_file() and MADE_FROM.read_text() == digest()
    if unchanged and not force:
        print("The pages are up to date.")
    elif not build():
        return 1
    print(f"The book: {HTML / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
