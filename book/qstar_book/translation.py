"""The Chinese edition of the book: its pages, and its catalogues.

    qstar-book pages        # builds both editions
    qstar-book translate    # brings the catalogues up to date with the English text

The catalogues are the gettext files in `book/locale/zh_CN/LC_MESSAGES`: one for each page of
`translated_pages` in `_config.yml`, `qstar.po` for what the book's extensions say, and `scripts.po`
for what its scripts say. A message without a translation, or with a doubtful one, is shown in
English, and a test names it.
"""

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from babel.messages.catalog import Catalog, Message
from babel.messages.extract import extract_from_file
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po, write_po

from .files import find_checkout

LANGUAGE, FOLDER = "zh_CN", "zh"
READ = "read"
"""A file beside the trees of the English pages, from when all of them are there."""
LOCALE = Path("book", "locale")
WIDTH = 100


def catalogs(root: Path) -> dict[str, Catalog]:
    """Every catalogue of the translation by its name, such as `chapters/gaussians`."""
    return _read(root / LOCALE / LANGUAGE / "LC_MESSAGES", "po", LANGUAGE)


def _read(folder: Path, ending: str, locale: str | None = None) -> dict[str, Catalog]:
    found = {}
    for file in sorted(folder.rglob(f"*.{ending}")):
        with file.open("rb") as stream:
            found[file.relative_to(folder).with_suffix("").as_posix()] = read_po(stream, locale)
    return found


def compile_catalogs(root: Path, out: Path) -> None:
    """Write what gettext reads, without the doubtful translations."""
    for name, catalog in catalogs(root).items():
        file = out / LANGUAGE / "LC_MESSAGES" / f"{name}.mo"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as stream:
            write_mo(stream, catalog)


def translated_pages(root: Path) -> list[str]:
    """The pages that are to be shown in Chinese, too, by `_config.yml`."""
    config = yaml.safe_load((root / "book" / "_config.yml").read_text(encoding="utf8"))
    return list(config.get("sphinx", {}).get("config", {}).get("translated_pages", []))


def _sources(root: Path) -> list[str]:
    book = root / "book"
    found = []
    for name in translated_pages(root):
        (file,) = (f for end in ("md", "ipynb") if (f := book / f"{name}.{end}").is_file())
        found.append(str(file))
    return found


def _run_sphinx(root: Path, out: Path, builder: str, said: Mapping[str, Any], **how: Any) -> bool:
    """Jupyter Book's own way to call Sphinx, for these pages alone."""
    from jupyter_book.sphinx import build_sphinx  # type: ignore[import-untyped]

    book = root / "book"
    overrides = {
        "external_toc_path": str(book / "_toc.yml"),
        "latex_individualpages": False,
        "gettext_compact": False,
        "gettext_location": False,
        "gettext_auto_build": False,
        **said,
    }
    result = build_sphinx(
        book,
        out,
        noconfig=True,
        path_config=book / "_config.yml",
        confoverrides=overrides,
        builder=builder,
        filenames=_sources(root),
        quiet=True,
        **how,
    )
    return result == 0


def build(root: Path, english: Path) -> bool:
    """Build the Chinese pages beside the English ones, which may still be being written.

    They are written again from the trees that the English build has read (`READ`); the folder of
    the pages belongs into that of the English ones.
    """
    locale = english.with_name("locale")
    trees = english.with_name(".doctrees-zh")
    shutil.copytree(english.with_name(".doctrees"), trees)
    compile_catalogs(root, locale)
    said = {
        "language": LANGUAGE,
        "locale_dirs": [str(locale)],
        "nitpicky": True,
        "html_search_language": "en",  # ours, which finds Chinese by pairs of characters
    }
    pages = english.with_name(FOLDER)
    how = {"doctreedir": trees, "warningiserror": True}
    return _run_sphinx(root, pages, "html", said, keep_going=True, **how)


# --- The catalogues ------------------------------------------------------------------------------


def _said_by(root: Path) -> Iterator[tuple[str, str]]:
    """(Catalogue, message): what extensions and scripts mark by `_`, and what is configured."""
    book = root / "book"
    for name, method, files in (
        ("qstar", "python", (book / "qstar_book" / "sphinx").glob("*.py")),
        ("scripts", "javascript", (book / "_static").glob("*.js")),
    ):
        for file in sorted(files):
            for _, text, _, _ in extract_from_file(method, file, keywords={"_": None}):
                yield name, str(text)
    config = yaml.safe_load((book / "_config.yml").read_text(encoding="utf8"))
    contents = yaml.safe_load((book / "_toc.yml").read_text(encoding="utf8"))
    yield "qstar", config["title"]
    yield from (("qstar", part["caption"]) for part in contents["parts"])


def extract(root: Path, out: Path) -> bool:
    """Write the templates of all catalogues, `NAME.pot`, from the English text."""
    first, *others = translated_pages(root)
    contents = {"format": "jb-book", "root": first, "chapters": [{"file": name} for name in others]}
    with tempfile.TemporaryDirectory() as folder:
        toc = Path(folder, "_toc.yml")
        toc.write_text(yaml.safe_dump(contents))
        said = {"external_toc_path": str(toc)}
        if not _run_sphinx(root, out, "gettext", said, doctreedir=folder, really_quiet=True):
            return False
    messages = [
        (name, str(message.id))
        for name, catalog in read_templates(out).items()
        for message in catalog
        if message.id
    ]
    found: dict[str, Catalog] = {}
    for name, text in [*messages, *_said_by(root)]:
        if needs_words(text):
            found.setdefault(name, Catalog(project="qstar", charset="utf-8")).add(text)
    for name, catalog in found.items():
        with (out / f"{name}.pot").open("wb") as stream:
            write_po(stream, catalog, width=WIDTH)
    return True


def needs_words(text: str) -> bool:
    """Whether a message says anything that can be translated: not so a formula, or code."""
    bare = re.sub(r"\{[\w:-]+\}`[^`]*`|\$[^$]+\$|`[^`]+`", "", text)
    return re.search(r"[A-Za-z]{2}", bare) is not None


def behind(name: str, ours: Catalog | None, template: Catalog) -> list[str]:
    """What a catalogue lacks: messages that are not translated, doubtful, or no longer said."""
    if ours is None:
        return [f"{name}: no catalogue"]
    found = []
    for message in template:
        translated: Message | None = ours.get(message.id)
        if message.id:
            if translated is None or not translated.string:
                found.append(f"{name}: not translated: {message.id}")
            elif translated.fuzzy:
                found.append(f"{name}: doubtful: {message.id}")
    wanted = {message.id for message in template}
    gone = [m.id for m in ours if m.id and m.id not in wanted] + list(ours.obsolete)
    return found + [f"{name}: no longer said: {text}" for text in gone]


def read_templates(folder: Path) -> dict[str, Catalog]:
    return _read(folder, "pot")


def command(*, root: Path | None = None, check: bool = False) -> int:
    """`qstar-book translate`."""
    from sphinx_intl.basic import update  # type: ignore[import-untyped]

    root = find_checkout(root)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        if not extract(root, out):
            print("The messages were not extracted.", file=sys.stderr)
            return 1
        if not check:
            update(str(root / LOCALE), folder, (LANGUAGE,), line_width=WIDTH, jobs=1)
        ours = catalogs(root)
        found = [
            problem
            for name, template in read_templates(out).items()
            for problem in behind(name, ours.get(name), template)
        ]
    print(*found, f"{len(found)} messages to look at in {LOCALE}", sep="\n")
    return 1 if check and found else 0


def main() -> int:
    """Build the Chinese pages, for `qstar-book pages`: in a process of its own, as Sphinx likes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("english", type=Path)
    options = parser.parse_args()
    return 0 if build(options.root, options.english) else 1


if __name__ == "__main__":
    sys.exit(main())
