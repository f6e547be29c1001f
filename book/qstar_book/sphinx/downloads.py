"""What can be taken away from a page: figures as SVG and PNG, tables as CSV, numbers as JSON.

All of them are files beside the pages, made from the executed notebook when the book is built; a
page loads none of them.
"""

import base64
import csv
import hashlib
import html
import io
import json
import math
import os
import re
from pathlib import Path

import nbformat
import numpy as np
from docutils import nodes
from matplotlib.image import imread, imsave
from sphinx.application import Sphinx
from sphinx.locale import get_translation
from sphinx.util.typing import ExtensionMetadata

from qstar_book.numbers import read_glued

from .edition import CATALOG

_ = get_translation(CATALOG)

FOLDER = "_downloads"
FIGURE = re.compile(
    r'<figure\b[^>]*\bid="(?P<id>[^"]+)"[^>]*>.*?<img\b[^>]*\bsrc="(?P<src>[^"]+\.svg)"'
    r"(?:(?!</figure>).)*?(?P<end></figcaption>\s*</figure>)",
    re.DOTALL,
)
TABLE = re.compile(
    r'<div class="pst-scrollable-table-container">\s*(?P<table><table\b.*?</table>)\s*</div>',
    re.DOTALL,
)


def drawn_twice(notebook: Path) -> dict[str, bytes]:
    """Of each figure that has both: the name of its SVG among the pages' images -> its PNG."""
    found = {}
    for cell in nbformat.read(notebook, as_version=4).cells:
        for output in cell.get("outputs", []):
            data = {
                kind.removeprefix("application/papermill.record/"): what
                for kind, what in output.get("data", {}).items()
            }
            if {"image/svg+xml", "image/png"} <= data.keys():
                lines = data["image/svg+xml"].splitlines()  # as MyST-NB writes the file
                name = hashlib.sha256(os.linesep.join(lines).encode()).hexdigest()
                found[name] = base64.b64decode(data["image/png"])
    return found


def on_white(png: bytes) -> bytes:
    """A picture whose ground is transparent, on white: a viewer may put anything behind it."""
    picture = np.asarray(imread(io.BytesIO(png), format="png"))
    if picture.ndim != 3 or picture.shape[-1] != 4:
        return png
    colour, opacity = picture[..., :3], picture[..., 3:]
    out = io.BytesIO()
    imsave(out, colour * opacity + 1 - opacity, format="png")
    return out.getvalue()


def rows_of(table: str) -> list[list[str]]:
    """The cells of a table in HTML, as plain text."""

    def text(cell: str) -> str:
        cell = re.sub(r"&(?:ApplyFunction|InvisibleTimes|nbsp);", " ", cell)
        plain = html.unescape(re.sub("<[^>]*>", "", cell)).replace("\u2061", "")
        return " ".join(plain.split())

    return [
        [text(cell) for cell in re.findall(r"<t[dh]\b[^>]*>(.*?)</t[dh]>", row, re.DOTALL)]
        for row in re.findall(r"<tr\b[^>]*>(.*?)</tr>", table, re.DOTALL)
    ]


def file_name(chapter: str, name: str) -> str:
    """Of a figure or table, by its own name: that of the chapter stands once before it."""
    return f"{chapter}-{name.removeprefix(f'{chapter}-')}"


def written(rows: list[list[str]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


def numbers(notebook: Path) -> str:
    """All values that a chapter publishes, by their names."""
    values = {
        name: value if not isinstance(value, float) or math.isfinite(value) else str(value)
        for name, value in read_glued(notebook).items()
    }
    return json.dumps(values, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def _offer(
    app: Sphinx, pagename: str, templatename: str, context: dict, doctree: nodes.document | None
) -> None:
    notebook = Path(app.srcdir) / f"{pagename}.ipynb"
    if doctree is None or not notebook.is_file():
        return
    chapter = notebook.stem
    folder = Path(app.outdir) / FOLDER
    folder.mkdir(exist_ok=True)
    up = "../" * pagename.count("/")
    pngs = drawn_twice(notebook)

    def link(kind: str, name: str, address: str | None = None) -> str:
        return f'<a href="{address or f"{up}{FOLDER}/{name}"}" download="{name}">{kind}</a>'

    def figure(found: re.Match[str]) -> str:
        name = file_name(chapter, found["id"].removeprefix("fig-"))
        links = [link("SVG", f"{name}.svg", found["src"])]
        if png := pngs.get(Path(found["src"]).stem):
            (folder / f"{name}.png").write_bytes(on_white(png))
            links.append(link("PNG", f"{name}.png"))
        begin = found[0][: -len(found["end"])]
        return f'{begin}<p class="qs-get">{" ".join(links)}</p>{found["end"]}'

    number = 0

    def table(found: re.Match[str]) -> str:
        nonlocal number
        number += 1
        head = found["table"].partition(">")[0]
        place = re.search(r'\bid="([^"]+)"', head)
        named = place[1].removeprefix("tab-") if place else f"table-{number}"
        name = f"{file_name(chapter, named)}.csv"
        (folder / name).write_text(written(rows_of(found["table"])), encoding="utf8")
        return f'{found[0]}<p class="qs-get">{link("CSV", name)}</p>'

    body = TABLE.sub(table, FIGURE.sub(figure, context["body"]))
    (folder / f"{chapter}.json").write_text(numbers(notebook), encoding="utf8")
    source = f"{up}_sources/{pagename}.ipynb"
    links = [
        link(str(_("Notebook")), notebook.name, source),
        link(str(_("Numbers (JSON)")), f"{chapter}.json"),
    ]
    context["body"] = f'{body}<p class="qs-get">{" ".join(links)}</p>'


def setup(app: Sphinx) -> ExtensionMetadata:
    app.connect("html-page-context", _offer, priority=820)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
