"""The whole book as one PDF: the built pages, one after the other, printed by a browser.

Links from page to page become links within the PDF; the outline is that of the headings.
"""

import html
import os
import posixpath
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .files import RefusedError, find_checkout
from .pages import HTML

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PDF = Path("book", "_build", "qstar.pdf")
LIMIT_S = 900
SHEET = """
@page { size: A4; margin: 17mm 16mm 19mm; }
@page { @bottom-center { content: counter(page); font-size: 9pt; } }
@page :first { @bottom-center { content: none; } }
body .bd-main, body .bd-main .bd-content { display: block; }
.bd-article { break-before: page; max-width: none; padding: 0; }
.qs-cover { padding-top: 60mm; text-align: center; }
.qs-cover ul { display: inline-block; list-style: none; margin-top: 15mm; text-align: left; }
"""


def names_of(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The pages below some entries of the table of contents, in its order."""
    nested = [[str(one["file"]), *names_of(one.get("sections", []))] for one in entries]
    return [name for names in nested for name in names]


def pages_of(contents: Mapping[str, Any]) -> list[str]:
    """All pages of a table of contents (`_toc.yml`), in its order."""
    parts = contents.get("parts") or [{"chapters": contents.get("chapters", [])}]
    return [str(contents["root"]), *(name for part in parts for name in names_of(part["chapters"]))]


def _anchor(page: str, place: str = "") -> str:
    return f"{page.replace('/', '-')}--{place}"


def article(page: str, text: str, pages: Sequence[str]) -> str:
    """What a page says, its places and links named so that all pages can stand in one file."""
    found = re.search(r'<article class="bd-article"[^>]*>(.*?)</article>', text, re.DOTALL)
    if found is None:
        raise RefusedError(f"{page}.html has no article: was it built by `qstar-book pages`?")
    folder = posixpath.dirname(page)

    def link(said: re.Match[str]) -> str:
        name, address = said[1], html.unescape(said[2])
        path, _, place = address.partition("#")
        if re.match("[a-z]+:", address):
            return said[0]
        target = posixpath.normpath(posixpath.join(folder, path)) if path else f"{page}.html"
        if name == "href" and target.removesuffix(".html") in pages:
            return f'href="#{_anchor(target.removesuffix(".html"), place)}"'
        return f'{name}="{html.escape(target)}"'

    body = re.sub(r'\b(href|src)="([^"]*)"', link, found[1])
    body = re.sub(r'\bid="([^"]*)"', lambda said: f'id="{_anchor(page, said[1])}"', body)
    body = body.replace(' loading="lazy"', "")
    return f'<article class="bd-article" id="{_anchor(page)}">{body}</article>'


def one_page(folder: Path, pages: Sequence[str]) -> str:
    """The pages of a folder as one, with a cover, and the head of the first."""
    texts = {page: (folder / f"{page}.html").read_text(encoding="utf8") for page in pages}
    first = texts[pages[0]]
    sheets = "".join(re.findall(r'<link[^>]*rel="stylesheet"[^>]*>', first))
    title = html.escape(re.search("<title>(.*?)</title>", first, re.DOTALL)[1].strip())  # type: ignore[index]
    heads = {
        page: re.search(r'<article\b.*?<h1[^>]*>(.*?)<a class="headerlink', text, re.DOTALL)
        for page, text in texts.items()
    }
    rows = "".join(
        f'<li><a href="#{_anchor(page)}">{head[1]}</a></li>' for page, head in heads.items() if head
    )
    articles = "".join(article(page, text, pages) for page, text in texts.items())
    return (
        f'<!doctype html><html lang="en" data-theme="light" data-mode="light"><head>'
        f'<meta charset="utf-8"><title>{title}</title>{sheets}<style>{SHEET}</style></head>'
        f'<body><main class="bd-main"><div class="bd-content">'
        f'<section class="qs-cover"><p class="h1">{title}</p><ul>{rows}</ul></section>'
        f"{articles}</div></main></body></html>"
    )


def count_pages(pdf: bytes) -> int:
    """The number of pages of a PDF that Chromium wrote."""
    return len(re.findall(rb"/Type\s*/Page\b(?!s)", pdf))


def print_page(file: Path, out: Path) -> None:
    """Let an installed browser print a page into a PDF.

    Raises:
        RefusedError: There is no browser, or it wrote nothing.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise RefusedError(f"no browser found; install one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [
                browser,
                "--headless",
                "--disable-gpu",
                *([] if os.geteuid() else ["--no-sandbox"]),  # root has none
                "--host-resolver-rules=MAP * ~NOTFOUND",
                f"--user-data-dir={profile}",
                "--no-pdf-header-footer",
                "--generate-pdf-document-outline",
                f"--print-to-pdf={out}",
                file.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
    if done.returncode or not out.is_file():
        raise RefusedError(f"{browser} printed nothing:\n{done.stderr[-2000:]}")


def command(*, out: Path | None = None, root: Path | None = None) -> int:
    """`qstar-book pdf`."""
    root = find_checkout(root)
    folder = root / HTML
    if not (folder / "index.html").is_file():
        raise RefusedError("there are no pages yet: qstar-book pages")
    contents = yaml.safe_load((root / "book" / "_toc.yml").read_text(encoding="utf8"))
    out = (out or root / PDF).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    whole = folder / "_book.html"
    try:
        whole.write_text(one_page(folder, pages_of(contents)), encoding="utf8")
        print_page(whole, out)
    finally:
        whole.unlink(missing_ok=True)
    content = out.read_bytes()
    print(f"The book: {out}, {count_pages(content)} pages, {len(content) / 1e6:.1f} MB")
    return 0
