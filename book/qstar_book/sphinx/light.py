"""What the finished pages load, made light: icons, style sheets, the search index.

The theme brings every icon of Font Awesome, every rule of Bootstrap, and the search index on every
page. Once all is written, each page gets the icons that it shows, the style sheets lose the rules
for what no page has, and the index is loaded where one searches.
"""

import base64
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.typing import ExtensionMetadata

from .edition import is_translation

OURS, FONT_CSS = "qstar.css", "maths.css"
ICON = re.compile(r'<(i|span) class="([^"]*\bfa-[^"]*)"([^>]*)></\1>')
WORD = re.compile(r"[A-Za-z_][\w-]*")
FONT = re.compile(r'@font-face\s*\{[^}]*url\("(fonts/[^"]+)"\)[^}]*\}')
FONT_LINK = (
    r'\n    <link rel="stylesheet" type="text/css" href="\2maths.css" />'
    "\n    <script>document.fonts.load(\"1em 'qstar maths'\")</script>"
)
FONTS_OF_TRANSLATIONS = "1em 'qstar chinese', 'qstar squares'"
FONTS_OF_QUOTATIONS = "1em 'qstar squares'"  # the other comes for what is on the screen

THEME_LATER = 'document.documentElement.dataset.theme = localStorage.getItem("theme") || "auto";'
THEME_AT_ONCE = """const said = document.documentElement.dataset;
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    said.theme = said.mode === "auto" ? (dark ? "dark" : "light") : said.mode;"""
"""Light or dark before the first line is laid: until then borders are missing and logos double."""

FIRST_IMAGES = 1
"""Of a page's images, how many are loaded at once; the others when one scrolls to them."""


def icon_paths(script: str) -> dict[str, tuple[str, str]]:
    """Name -> (view box, path), of all icons of Font Awesome's script."""
    pattern = r'"?([a-z0-9-]+)"?:\[(\d+),(\d+),\[[^\]]*\],"[0-9a-f]+","([^"]+)"\]'
    found: dict[str, tuple[str, str]] = {}
    for name, width, height, path in re.findall(pattern, script):
        found[name] = (f"0 0 {width} {height}", path)  # the last family, the solid one, wins
    if "pencil" in found:
        found.setdefault("pencil-alt", found["pencil"])  # an older name, which the theme uses
    return found


def with_icons(page: str, icons: dict[str, tuple[str, str]]) -> str:
    """The page with each icon drawn in it, as the theme's script would draw it.

    Raises:
        KeyError: An icon of the page is not among them.
    """

    def draw(icon: re.Match[str]) -> str:
        names = icon[2].split()
        sizes = {"fa-lg", "fa-sm", "fa-xs", "fa-solid", "fa-regular", "fa-brands", "fa-fw"}
        (name,) = (n for n in names if n.startswith("fa-") and n not in sizes)
        box, path = icons[name.removeprefix("fa-")]
        kept = " ".join(n for n in names if n not in {"fas", "far", "fab", "fa-solid"})
        mode = " ".join(re.findall(r'data-[a-z]+="[^"]*"', icon[3]))
        return (
            f'<svg class="svg-inline--fa {kept}" {mode} aria-hidden="true" viewBox="{box}">'
            f'<path fill="currentColor" d="{path}"/></svg>'
        )

    return ICON.sub(draw, page)


def _blocks(css: str) -> Iterable[tuple[str, str | None]]:
    """The rules of a style sheet: (what stands before the brace, what stands in it)."""
    start, at = 0, 0
    while at < len(css):
        if css[at] in "\"'":
            at = re.compile(r"(?:\\.|[^\\])*?" + css[at], re.DOTALL).match(css, at + 1).end()  # type: ignore[union-attr]
            continue
        if css[at] == ";":
            yield css[start : at + 1].strip(), None
            start = at + 1
        elif css[at] == "{":
            depth, end = 1, at
            while depth:
                end += 1
                if css[end] in "\"'":
                    quoted = re.compile(r"(?:\\.|[^\\])*?" + css[end], re.DOTALL)
                    end = quoted.match(css, end + 1).end() - 1  # type: ignore[union-attr]
                elif css[end] in "{}":
                    depth += 1 if css[end] == "{" else -1
            yield css[start:at].strip(), css[at + 1 : end]
            start, at = end + 1, end
        at += 1


def _selectors(text: str) -> list[str]:
    """The selectors of a list: commas in brackets part nothing."""
    return [part.strip() for part in re.split(r",(?![^(\[]*[)\]])", text)]


def _is_used(selector: str, words: set[str]) -> bool:
    """Whether each class and name that a selector asks for is a word of some page or script."""
    bare = selector
    while (less := re.sub(r":(?:not|is|where|has)\([^()]*\)|\[[^\]]*\]", "", bare)) != bare:
        bare = less
    names = re.findall(r"[.#]((?:\\.|[\w-])+)", bare)
    return all(re.sub(r"\\(.)", r"\1", name) in words for name in names)


def used_rules(css: str, words: set[str]) -> str:
    """A style sheet without the rules for classes and names that are none of the words.

    What cannot be judged stays: rules for elements, and within `:is()` and `:not()`.
    """
    kept = []
    for head, body in _blocks(re.sub(r"/\*.*?\*/", "", css, flags=re.DOTALL)):
        if body is None:
            kept.append(head)
        elif head.startswith(("@media", "@supports", "@layer", "@container")):
            if inside := used_rules(body, words):
                kept.append(f"{head}{{{inside}}}")
        elif head.startswith("@font-face"):
            if "Font Awesome" not in body and "FontAwesome" not in body:
                kept.append(f"{head}{{{body}}}")
        elif head.startswith("@"):
            kept.append(f"{head}{{{body}}}")
        elif used := [one for one in _selectors(head) if _is_used(one, words)]:
            kept.append(f"{','.join(used)}{{{body.strip()}}}")
    return "".join(kept)


def _begins_at_once(page: str) -> bool:
    """Whether the first section begins within the first screen."""
    first = re.search(r"</h1>(.*?)<h2\b", page, re.DOTALL)
    return first is not None and len(re.sub("<[^>]*>", "", first[1])) < 500


def light_page(page: str, icons: dict[str, tuple[str, str]], *, searches: bool) -> str:
    """A page that loads what it needs."""
    page = with_icons(page, icons)
    page = re.sub(r'\s*<script defer src="[^"]*fontawesome\.js[^"]*"></script>', "", page)
    page = re.sub(r'\s*<link rel="preload" as="font"[^>]*vendor/fontawesome[^>]*>', "", page)
    if not searches:
        unneeded = r"(?:searchtools|language_data|searchindex)\.js"
        page = re.sub(rf'\s*<script src="[^"]*{unneeded}[^"]*"></script>', "", page)
    if "<math" in page:  # within a style sheet its font is there before the first line is laid
        page = re.sub(r'(<link [^>]*href="([^"]*)qstar\.css[^>]*>)', r"\1" + FONT_LINK, page)
    translated = '<html lang="zh' in page
    if translated or 'lang="zh"' in page:
        fonts = FONTS_OF_TRANSLATIONS if translated else FONTS_OF_QUOTATIONS
        ask = rf'\1\n    <script>document.fonts.load("{fonts}", "中")</script>'
        page = re.sub(r'(<link [^>]*href="[^"]*chinese\.css[^>]*>)', ask, page)
    page = page.replace(THEME_LATER, THEME_AT_ONCE)
    if _begins_at_once(page):
        # Of the page's own contents the first entry is open, as the theme's script will find it.
        first = r'(section-nav flex-column">\s*<li class="toc-h2[^"]*)("><a class="[^"]*nav-link)"'
        page = re.sub(first, r'\1 active\2 active"', page)
    number = 0

    def later(image: re.Match[str]) -> str:
        nonlocal number
        number += 1
        lazy = number > FIRST_IMAGES and "loading=" not in image[0]
        return f'<img loading="lazy"{image[1]}' if lazy else image[0]

    return re.sub(r'<img\b([^>]*src="[^"]*_images/)', later, page)


CLOSE_ENOUGH = 0.02
"""How far, in points, a line of a figure may move: a fortieth of a pixel of CSS."""

_POINT = r"-?[\d.]+ -?[\d.]+(?![\w.])"
_BROKEN_LINE = re.compile(rf"M {_POINT}(?:\s*L {_POINT}){{3,}}")
_CLOUD = re.compile(
    r'<g clip-path="url\(#(\w+)\)">\s*<use [^>]*/>\s*</g>'
    r'(?:\s*<g clip-path="url\(#\1\)">\s*<use [^>]*/>\s*</g>)+'
)


def fewer_points(points: np.ndarray) -> np.ndarray:
    """The corners of a broken line that keep it within `CLOSE_ENOUGH`. Shape (corners, 2).

    By the rule of Ramer, Douglas and Peucker; the ends stay.
    """
    keep = np.zeros(len(points), dtype=bool)
    keep[[0, -1]] = True
    parts = [(0, len(points) - 1)]
    while parts:
        first, last = parts.pop()
        if last - first < 2:
            continue
        start, between = points[first], points[first + 1 : last] - points[first]
        chord = points[last] - start
        along = np.clip(between @ chord / max(chord @ chord, 1e-12), 0, 1)
        away = np.hypot(*(between - along[:, None] * chord).T)
        worst = int(away.argmax())
        if away[worst] > CLOSE_ENOUGH:
            middle = first + 1 + worst
            keep[middle] = True
            parts += [(first, middle), (middle, last)]
    return points[keep]


def _straightened(line: re.Match[str]) -> str:
    points = np.array(re.findall(r"-?[\d.]+", line[0]), dtype=float).reshape(-1, 2)
    return "M " + "\nL ".join(f"{x:g} {y:g}" for x, y in fewer_points(points).round(2))


def _in_one_group(cloud: re.Match[str]) -> str:
    """Points that are cut off alike, one group for all; of opaque points in one place, the last."""
    points = re.findall(r"<use [^>]*/>", cloud[0])
    if "opacity" not in cloud[0]:
        points = list(dict.fromkeys(reversed(points)))[::-1]
    return "\n".join([f'<g clip-path="url(#{cloud[1]})">', *points, "</g>"])


def slim(svg: str) -> str:
    """A figure without what no reader sees: its metadata, digits, corners, and groups of points.

    Digits below a hundredth of a point, that is; scales keep theirs, for they multiply.
    """
    svg = re.sub(
        r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL
    )
    pattern = r"(?:scale|matrix)\([^)]*\)|base64,[^\"]*|(?<![\w.#])-?\d+\.\d{3,}"

    def shorter(found: re.Match[str]) -> str:
        if not found[0].lstrip("-")[0].isdigit():
            return found[0]
        return f"{float(found[0]):.2f}".rstrip("0").rstrip(".")

    svg = _BROKEN_LINE.sub(_straightened, _CLOUD.sub(_in_one_group, svg))
    return re.sub(r"\s*\n\s*", "\n", re.sub(pattern, shorter, svg)).strip() + "\n"


def _inline_the_font(static: Path) -> None:
    """The font of formulas moves into a style sheet of its own, for the pages that have some."""
    ours = static / OURS
    css = ours.read_text(encoding="utf8")
    face = FONT.search(css)
    if face is None:
        return
    data = base64.b64encode((static / face[1]).read_bytes()).decode()
    inlined = face[0].replace(face[1], f"data:font/woff2;base64,{data}")
    (static / FONT_CSS).write_text(inlined, encoding="utf8")
    ours.write_text(FONT.sub("", css), encoding="utf8")


def _lighten(app: Sphinx, exception: Exception | None) -> None:
    if exception is not None or app.builder.format != "html":
        return
    out = Path(app.outdir)
    static = out / "_static"
    english = out.with_name("html") / "_static" if is_translation(app.config) else static
    script = english / "scripts" / "fontawesome.js"
    icons = icon_paths(script.read_text(encoding="utf8"))
    words: set[str] = set()
    for file in out.rglob("*.html"):
        if static in file.parents:
            continue
        page = file.read_text(encoding="utf8")
        try:
            lighter = light_page(page, icons, searches=file.name == "search.html")
        except KeyError as missing:
            logging.getLogger(__name__).warning(f"{file.name}: no icon is named {missing}")
            continue
        file.write_text(lighter, encoding="utf8")
        words |= set(WORD.findall(lighter))
    if english != static:  # whose style sheets and figures these pages share
        return
    for file in out.rglob("*.js"):
        if file != script and file.name != "searchindex.js":
            words |= set(WORD.findall(file.read_text(encoding="utf8")))
    _inline_the_font(static)
    for file in (out / "_images").glob("*.svg"):
        file.write_text(slim(file.read_text(encoding="utf8")), encoding="utf8")
    for file in static.rglob("*.css"):
        if file.name not in (OURS, FONT_CSS) and "vendor" not in file.parts:
            css = file.read_text(encoding="utf8")
            file.write_text(used_rules(css, words), encoding="utf8")


def setup(app: Sphinx) -> ExtensionMetadata:
    app.connect("build-finished", _lighten, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
