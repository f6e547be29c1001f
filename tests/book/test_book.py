"""The built book in a real browser, page by page: in light, in dark, and on a phone.

The pages are brought up to date first, by the commands of `make book`. Where no browser is
installed these tests are skipped, and with CI=true they fail.
"""

import functools
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit

import nbformat
import numpy as np
import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe
from browsers import VIEWS, require_browser, serve
from built_pages import BOOK, ROOT, run
from fontTools.ttLib import TTFont
from html_rules import html_faults
from playwright.sync_api import Browser, BrowserContext, Page

from qstar_book import claims
from qstar_book.sphinx import light, markup, maths, provenance
from qstar_book.sphinx import pages as page_extension

TOC = yaml.safe_load((BOOK / "_toc.yml").read_text(encoding="utf8"))
SETTINGS = yaml.safe_load((BOOK / "_config.yml").read_text(encoding="utf8"))["sphinx"]["config"]


def files_of(entries: list[dict[str, Any]]) -> list[str]:
    """The pages below some entries of the table of contents, in its order."""
    nested = [[entry["file"], *files_of(entry.get("sections", []))] for entry in entries]
    return [name for names in nested for name in names]


FILES = [name for part in TOC["parts"] for name in files_of(part["chapters"])]
CHAPTERS = [name for name in FILES if name.startswith("chapters/")]
FIRST = next(files_of(part["chapters"])[0] for part in TOC["parts"] if part.get("numbered"))
PAGES = [TOC["root"], *FILES, "search"]
VERDICTS = {"confirmed", "corrected", "refuted", "qualified", "not measured"}
# A link's text is judged by its style alone. Every call of axe-core walks through the whole page.
ALL = {"checks": {"link-in-text-block": {"enabled": False}}}
NO_COLOURS = ALL | {"rules": {"color-contrast": {"enabled": False}}}
COLOURS = {"runOnly": ["color-contrast"]}
# The dark view differs from the light one in its colours, and the phone's in all but those.
RULES = {"phone": [NO_COLOURS], "narrow": [], "light": [ALL], "dark": [COLOURS]}

# What a reader would see, asked of the page itself. Code is shown as it is: `{ref}` in it is fine.
INSPECT = r"""
async (scheme) => {
  await document.fonts.ready;
  // A new size or colour scheme is heard of before the frame that shows it.
  await new Promise((shown) => requestAnimationFrame(() => requestAnimationFrame(shown)));
  const found = [];
  const { theme } = document.documentElement.dataset;
  if (theme && theme !== scheme) found.push(`wrong theme: ${theme}`);
  const shown = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT, (node) =>
    node.parentElement.closest("script, style, pre, code, noscript, math, textarea")
      ? NodeFilter.FILTER_REJECT : NodeFilter.FILTER_ACCEPT);
  const texts = [document.title];
  while (shown.nextNode()) texts.push(shown.currentNode.data);
  for (const text of texts) {
    const said = text.trim();
    if (/\\[()[\]]|\$\$|\\(begin|frac|alpha)/.test(said)) found.push(`unrendered maths: ${said}`);
    if (/\{[a-z:]+\}`|Key not found|No key '/.test(said)) found.push(`unresolved role: ${said}`);
  }
  for (const error of document.querySelectorAll("merror"))
    found.push(`maths error: ${error.textContent}`);
  for (const maths of document.querySelectorAll(".math"))
    if (!maths.querySelector("math")) found.push(`unrendered maths: ${maths.textContent}`);
  for (const maths of document.querySelectorAll("math"))
    if (/[a-z][‘`]/.test(maths.textContent))
      found.push(`role in a formula: ${maths.textContent}`);
  // axe-core reads a formula as one text in the colour of its container; so all of it has that.
  for (const maths of document.querySelectorAll("math")) {
    const { color } = getComputedStyle(maths);
    for (const part of maths.querySelectorAll("*")) {
      const seen = getComputedStyle(part);
      if (seen.color === color && seen.backgroundColor === "rgba(0, 0, 0, 0)"
          && seen.backgroundImage === "none" && seen.opacity === "1") continue;
      found.push(`maths in another colour: ${seen.color} in ${color}: ${part.outerHTML}`);
      break;
    }
  }
  for (const pasted of document.querySelectorAll(".pasted-text"))
    if (!pasted.textContent.trim()) found.push("unresolved role: an empty glued value");
  for (const image of document.images) {
    image.loading = "eager";
    await image.decode().catch(() => {});
    if (!image.naturalWidth) found.push(`missing image: ${image.getAttribute("src")}`);
  }
  for (const figure of document.querySelectorAll("figure"))
    if (!figure.querySelector("img, svg, table, video")) found.push(`missing figure: ${figure.id}`);
  const scripts = [...document.scripts].map((script) => script.src).filter(Boolean);
  for (const script of scripts)
    if (scripts.filter((other) => other === script).length > 1) found.push(`twice: ${script}`);
  // Nothing is cut off: code is wrapped, and a table on a phone shows that it scrolls.
  for (const box of document.querySelectorAll("main :is(pre, table, .text_html)")) {
    const frame = box.closest(".pst-scrollable-table-container") ?? box;
    if (!frame.offsetParent || frame.scrollWidth <= frame.clientWidth + 1) continue;
    if (box.matches("pre") || window.innerWidth > 576 || !frame.matches(".qs-more[tabindex='0']"))
      found.push(`clipped: ${box.tagName}, ${frame.scrollWidth} px: ${box.innerText}`.slice(0, 99));
  }
  for (const maths of document.querySelectorAll("main math:not([display])")) {
    const text = maths.nextSibling ?? maths.parentElement.nextSibling;
    if (text?.nodeType !== Node.TEXT_NODE || !/^[.,;:!?)]/.test(text.data)) continue;
    const mark = document.createRange();
    mark.setStart(text, 0);
    mark.setEnd(text, 1);
    const line = mark.getBoundingClientRect();
    if (line.height && (line.top + line.bottom) / 2 > maths.getBoundingClientRect().bottom)
      found.push(`torn from its formula: ${text.data.slice(0, 40)}`);
  }
  for (const image of document.querySelectorAll("article img")) {
    const { backgroundColor, filter } = getComputedStyle(image);
    const name = image.getAttribute("src");
    if (backgroundColor !== "rgba(0, 0, 0, 0)") found.push(`figure on a slab: ${name}`);
    if (!image.closest(".qs-figure")) continue;
    if (filter.includes("invert") !== (scheme === "dark")) found.push(`wrong figure: ${name}`);
  }
  const wide = Math.max(document.documentElement.scrollWidth, document.body.scrollWidth);
  if (wide > window.innerWidth) found.push(`overflow: ${wide} px in ${window.innerWidth} px`);
  return found;
}
"""

# Of all texts with one look, axe-core is shown the first and the last: its rule for colours takes
# a minute for the ten thousand words of an API page, which have a few dozen looks. A look is all
# that the rule reads: the text's colour and size, and what is painted behind it, by its ancestors
# and by what is positioned over the same place.
MARK_LOOKS = r"""
(view) => {
  const numbers = new Map();
  const number = (key) => numbers.get(key) ?? numbers.set(key, numbers.size + 1).get(key);
  const styles = new Map();
  const ground = new Map([[null, 0]]);
  const placed = [];
  for (const box of document.querySelectorAll(":not(math *)")) {
    const style = getComputedStyle(box);
    styles.set(box, style);
    const paint = [
      style.backgroundColor, style.backgroundImage, style.backgroundClip, style.opacity,
      style.filter, style.mixBlendMode, style.visibility, style.clip, style.clipPath,
      style.overflowX, style.overflowY, style.position, style.zIndex, style.transform,
      style.float, box.matches("label, button, select, option, :disabled, [aria-disabled]"),
    ].join();
    ground.set(box, number(`${ground.get(box.parentElement)} ${paint}`));
    if (box.matches("math")) continue;  // it paints nothing behind its text
    if (style.position !== "static" || style.float !== "none") {
      const { left, right, top, bottom } = box.getBoundingClientRect();
      if (left < right && top < bottom) placed.push({ box, left, right, top, bottom });
    }
  }
  const looks = new Map();
  for (const box of document.body.querySelectorAll(":not(math *, script, style)")) {
    const text = [...box.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE)
      .map((node) => node.data.trim()).join("");
    if (!text && !box.matches("math, input, textarea, select")) continue;
    const { left, right, top, bottom } = box.getBoundingClientRect();
    if (left === right || top === bottom || !box.checkVisibility()) continue;
    const over = placed.filter((other) =>
      other.left < right && other.right > left && other.top < bottom && other.bottom > top &&
      !other.box.contains(box) && !box.contains(other.box));
    const { color, fontSize, fontWeight, textShadow, webkitTextFillColor } = styles.get(box);
    const look = [
      ground.get(box), color, fontSize, fontWeight, textShadow, webkitTextFillColor,
      text.length > 1, ...new Set(over.map((other) => ground.get(other.box))),
    ].join();
    looks.set(look, [looks.get(look)?.[0] ?? box, box]);
  }
  for (const box of [...looks.values()].flat()) box.setAttribute(`data-look-${view}`, "");
}
"""

# What axe-core need not walk through, once all else is done: the glyphs of a formula, which it is
# shown as one word, and the words of code, which are to no rule but text.
FOLD = r"""
() => {
  for (const maths of document.querySelectorAll("math")) {
    const word = document.createElement("span");
    word.append("formula");
    for (const { name } of maths.attributes)
      if (name.startsWith("data-")) word.setAttribute(name, "");
    maths.replaceWith(word);
  }
  for (const word of document.querySelectorAll(":is(pre, code, .sig) span"))
    if ([...word.attributes].every(({ name }) => name === "class"))
      word.replaceWith(...word.childNodes);
  document.body.normalize();
}
"""
RUN_AXE = r"""
async ([view, rules]) => {
  axe.configure({ rules: [{ id: "color-contrast", selector: `[data-look-${view}]` }] });
  const options = { preload: false, resultTypes: ["violations"], ...rules };
  return (await axe.run(document, options)).violations;
}
"""


@dataclass(frozen=True)
class Load:
    """What a page does to a browser when it is opened.

    Attributes:
        size: Bytes that are loaded at first, unpacked.
        scripts: Of these, the scripts and what stands of them in the page.
        elements: How many there are, once the scripts have run.
        shift: How far the layout shifts.
    """

    size: int
    scripts: int
    elements: int
    shift: float


WEIGH = """async () => {
  await document.fonts.ready;
  await new Promise((quiet) => requestIdleCallback(() => setTimeout(quiet, 100)));
  const inline = [...document.scripts].map((one) => one.src ? 0 : one.text.length);
  return [inline, document.querySelectorAll("*").length, window.shift];
}"""


def weigh(page: Page, finished: list[Any]) -> Load:
    """A page that was opened just now, by the requests that were finished for it."""
    inline, elements, shift = page.evaluate(WEIGH)
    sizes = {one.url: len(one.response().body()) for one in list(finished)}
    scripts = [size for address, size in sizes.items() if ".js" in urlsplit(address).path]
    return Load(sum(sizes.values()), sum(scripts) + sum(inline), elements, shift)


def faults_of(load: Load, most_scripts: int) -> list[str]:
    """How long a page blocks depends on the machine and its load; what it blocks with does not.

    With up to 19,000 elements and 200 kB of scripts the tasks of the main thread took at most .25 s
    of its processor time beyond 50 ms each.
    """
    found = {
        f"weight: {load.size} bytes": 200_000 < load.size <= 1_200_000,
        f"weight: {load.scripts} bytes of scripts": load.scripts <= most_scripts,
        f"weight: {load.elements} elements": load.elements <= 22_000,
        f"shift: {load.shift}": load.shift <= 0.05,
    }
    return [fault for fault, within in found.items() if not within]


def look_at(
    context: BrowserContext,
    url: str,
    views: Iterable[str] = VIEWS,
    rules: dict[str, list[dict[str, Any]]] = RULES,
    most_scripts: int | None = None,
) -> list[str]:
    """Everything that is wrong with one page, as a reader, a network tab and axe-core see it.

    The page is loaded once, in the first of the views, and turned into each of the others; in the
    tab of the page before it, for a new one costs a second. With a limit for its scripts it is
    weighed as well, loaded as by a reader who has seen no other page.
    """
    found: list[str] = []
    page = context.pages[0] if context.pages else context.new_page()
    page.goto("about:blank")  # what the page before still asks for is not asked by this one
    tools = context.new_cdp_session(page)
    tools.send("Network.enable")
    tools.send("Network.setCacheDisabled", {"cacheDisabled": most_scripts is not None})
    finished: list[Any] = []
    heard: list[tuple[Any, Callable[[Any], None]]] = []

    def when(event: str, problem: str, fails: Callable[[Any], str | bool | None]) -> None:
        def hear(what: Any) -> None:
            if text := fails(what):
                found.append(f"{problem}: {text}")

        page.on(event, hear)
        heard.append((event, hear))

    when("console", "console", lambda said: said.type == "error" and said.text)
    when("pageerror", "console", str)
    when("request", "external request", lambda asked: is_external(asked.url, url) and asked.url)
    when("requestfailed", "failed request", lambda asked: asked.url)
    when("response", "HTTP error", lambda got: got.status >= 400 and f"{got.status} {got.url}")
    when("requestfinished", "", lambda one: finished.append(one))
    for at, view in enumerate(views):
        turn(page, view)
        if at == 0:
            page.goto(url, wait_until="load")
            if most_scripts is not None:
                found += faults_of(weigh(page, finished), most_scripts)
                tools.send("Network.disable")
        found += page.evaluate(INSPECT, VIEWS[view]["color_scheme"])
        if any(some != NO_COLOURS for some in rules[view]):
            page.evaluate(MARK_LOOKS, view)
    page.evaluate(FOLD)
    page.evaluate(Axe().axe_script)
    for view in reversed(list(views)):
        turn(page, view)
        for some in rules[view]:
            found += axe_violations(page, view, some)
    for event, hear in heard:
        page.remove_listener(event, hear)
    tools.detach()
    return found


def turn(page: Page, view: str) -> None:
    page.set_viewport_size(VIEWS[view]["viewport"])
    page.emulate_media(
        color_scheme=VIEWS[view]["color_scheme"], reduced_motion=VIEWS[view]["reduced_motion"]
    )


def is_external(address: str, home: str) -> bool:
    there, here = urlsplit(address), urlsplit(home)
    return there.scheme not in ("data", "blob") and there[:2] != here[:2]


def axe_violations(page: Page, view: str, rules: dict[str, Any]) -> list[str]:
    """axe-core's findings, with the element and what to do."""
    return [
        f"accessibility: {rule['id']}: {view}: {node['html'][:160]}: {node['failureSummary']}"
        for rule in page.evaluate(RUN_AXE, [view, rules])
        for node in rule["nodes"]
    ]


class Anchors(HTMLParser):
    """The links and the identifiers of one page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.identifiers: set[str] = set()
        self.feed(file.read_text(encoding="utf8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if value and (name == "id" or (name == "name" and tag == "a")):
                self.identifiers.add(value)
            if value and name in ("href", "src"):
                self.links.append(value)


@functools.cache
def anchors(file: Path) -> Anchors:
    return Anchors(file)


def broken_links(folder: Path) -> list[str]:
    """Links inside the folder that lead to no file, or to no such place in it."""
    pages = {file: anchors(file) for file in folder.rglob("*.html") if "_static" not in file.parts}
    found = []
    for file, page in pages.items():
        for link in page.links:
            address, fragment = urldefrag(link)
            if urlsplit(address).scheme or address.startswith("//"):
                continue
            target = file.parent / unquote(urlsplit(address).path) if address else file
            target = target.resolve()
            if not target.exists():
                found.append(f"{file.name}: {link}: no such file")
            elif fragment and target in pages and fragment not in pages[target].identifiers:
                found.append(f"{file.name}: {link}: no such place in it")
    return found


@pytest.mark.parametrize("name", PAGES)
def test_page_is_light_and_sound_in_light_in_dark_and_on_a_phone(
    site: str, contexts: dict[str, BrowserContext], name: str
):
    most_scripts = 700_000 if name == "search" else 300_000
    assert look_at(contexts["phone"], f"{site}/{name}.html", most_scripts=most_scripts) == []


def test_every_page_of_the_book_is_looked_at(built: Path):
    pages = {str(file.relative_to(built).with_suffix("")) for file in built.rglob("*.html")}
    moved = SETTINGS["redirects"]
    chinese = {f"zh/{name}" for name in (*SETTINGS["translated_pages"], "search")}
    assert {page for page in pages if not page.startswith("_")} == {*PAGES, *moved, *chinese}


class Texts(HTMLParser):
    """The texts of one page, with the language of each; its elements; and the code of its cells."""

    VOID = frozenset({"area", "br", "col", "hr", "img", "input", "link", "meta", "wbr"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str, set[str]]] = [("", "", set())]  # tag, language, where
        self.found: list[tuple[str, str]] = []
        self.maths: set[str] = set()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.parts: dict[str, list[str]] = {"head title": [], "article": [], "cell_input pre": []}
        self.feed(page)
        self.title, self.text, self.code = ("".join(part) for part in self.parts.values())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            _, language, where = self.open[-1]
            names = {tag, *(dict(attributes).get("class") or "").split()}
            language = dict(attributes).get("lang") or language
            self.open.append((tag, language, where | names))

    def handle_endtag(self, tag: str) -> None:
        if any(tag == name for name, *_ in self.open):
            while self.open.pop()[0] != tag:
                pass

    def handle_data(self, data: str) -> None:
        _, language, where = self.open[-1]
        if {"script", "style"} & where:
            return
        for part, texts in self.parts.items():
            if where.issuperset(part.split()):
                texts.append(data)
        if "math" not in where:
            self.found.append((language, data))
        elif "mtext" not in where:
            self.maths |= set(data)


IDEOGRAPH = re.compile("[\u3400-\u9fff]")


def wrong_languages(page: Texts) -> list[str]:
    """Texts of a page with Chinese in them that do not say so, and others that say so."""
    return [
        text
        for language, text in page.found
        if bool(IDEOGRAPH.search(text)) != (language.partition("-")[0] == "zh") and text.strip()
    ]


@pytest.fixture(scope="session")
def texts(built: Path) -> dict[str, Texts]:
    return {name: Texts((built / f"{name}.html").read_text(encoding="utf8")) for name in PAGES}


@pytest.mark.parametrize("name", PAGES)
def test_chinese_text_says_that_it_is_chinese(texts: dict[str, Texts], name: str):
    assert wrong_languages(texts[name]) == []


def test_text_in_the_wrong_language_is_caught():
    page = "<html lang=en><p>A <b lang=zh>几何</b> mean</p><p lang=zh>not Chinese</p><td>交集</td>"
    assert wrong_languages(Texts(page)) == ["not Chinese", "交集"]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_html(built: Path, name: str):
    assert html_faults((built / f"{name}.html").read_text(encoding="utf8")) == set()


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("<p>a</i></p>", "unexpected-end-tag, line 1"),
        ("<b id=x></b><b id=x></b>", "2 places named 'x'"),
        ("<b id='x y'></b>", "a place named 'x y'"),
        ("<span><div>a</div></span>", "div in span"),
        ("<ul><p>a</p></ul>", "p in ul"),
        ("<p><style>p {}</style></p>", "style in body"),
        ("<a href=x><button>a</button></a>", "button in a"),
        ("<details><p>a</p></details>", "details without a summary"),
        ("<img src=x>", "img without alt or src"),
    ],
)
def test_what_is_not_html_is_caught(body: str, fault: str):
    page = "<!doctype html><html><head><title>A page</title></head><body>{}</body></html>"
    assert html_faults(page.format(body)) == {fault}
    assert html_faults(page.format("<details><summary><p>a</p></summary></details>")) == set()


@pytest.mark.parametrize("name", PAGES)
def test_the_head_of_a_page_says_each_thing_once(texts: dict[str, Texts], name: str):
    metas = [attributes for tag, attributes in texts[name].elements if tag == "meta"]
    named = [meta.get("name") for meta in metas]
    assert named.count("viewport") == 1
    if name != "search":
        (said,) = [meta["content"] or "" for meta in metas if meta.get("name") == "description"]
        assert 30 < len(said) < 210
        assert not re.search(r"[\\{}]|<", said), said
    assert texts[name].title.count("balanced geometric mean") == 1


@pytest.mark.parametrize(
    ("load", "fault"),
    [
        (Load(1_200_001, 3, 3, 0), "weight: 1200001 bytes"),
        (Load(100_000, 3, 3, 0), "weight: 100000 bytes"),
        (Load(300_000, 300_001, 3, 0), "weight: 300001 bytes of scripts"),
        (Load(300_000, 3, 22_001, 0), "weight: 22001 elements"),
        (Load(300_000, 3, 3, 0.051), "shift: 0.051"),
    ],
)
def test_a_heavy_or_restless_page_is_caught(load: Load, fault: str):
    assert faults_of(load, 300_000) == [fault]
    assert faults_of(Load(1_200_000, 300_000, 22_000, 0.05), 300_000) == []


def test_every_sign_of_a_formula_is_in_the_font_of_the_book(texts: dict[str, Texts]):
    cmap = TTFont(BOOK / "_static" / "fonts" / "maths.woff2").getBestCmap()
    used = {sign for page in texts.values() for sign in page.maths}
    assert len(used) > 80
    lacking = {sign for sign in used if ord(sign) not in cmap and sign.strip()}
    # Two accents that the browser takes elsewhere, and a mark without a shape.
    assert lacking <= {"ˆ", "˜", "\ufe00"}
    assert ord("几") not in cmap


def test_a_formula_that_cannot_be_translated_is_refused():
    assert maths.mathml(r"q^\star", display=False).startswith("<math>")
    two_lines = maths.mathml(r"\begin{gathered}a\\[0.4em]b\end{gathered}", display=True)
    assert two_lines.count("<mtr>") == 2
    assert "[" not in two_lines
    with pytest.raises(ValueError, match="nosuchthing"):
        maths.mathml(r"\nosuchthing", display=False)


def test_no_two_pages_are_described_alike(texts: dict[str, Texts]):
    described = [
        attributes["content"]
        for page in texts.values()
        for tag, attributes in page.elements
        if tag == "meta" and attributes.get("name") == "description"
    ]
    assert len(set(described)) == len(described) == len(PAGES) - 1


@pytest.mark.parametrize("name", ["index", *CHAPTERS])
def test_an_image_says_its_size(built: Path, texts: dict[str, Texts], name: str):
    """So that the text does not jump when it comes, and that a phone shows letters of 9 px."""
    images = [
        a
        for tag, a in texts[name].elements
        if tag == "img" and "_images" in str(a["src"]) and "explorer-" not in str(a["src"])
    ]
    assert images
    for image in images:
        svg = ((built / f"{name}.html").parent / str(image["src"])).read_text(encoding="utf8")
        width, height, least = page_extension.svg_size(svg)
        assert (image.get("width"), image.get("height")) == (str(width), str(height))
        shown = int(str(image["style"]).removeprefix("min-width: ").removesuffix("px"))
        assert abs(shown - min(least, width)) <= 1  # the file was optimised after it was measured


FOLDED = re.compile(r"<details class=.admonition hide.*?</details>\s*</div>\s*", re.DOTALL)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_folded_cells_that_follow_each_other_have_one_bar(built: Path, chapter: str):
    cells = nbformat.read(notebook_of(chapter), as_version=4).cells
    folded = sum("hide-cell" in cell["metadata"].get("tags", []) for cell in cells)
    page = (built / f"{chapter}.html").read_text(encoding="utf8")
    for bar in FOLDED.finditer(page):
        assert not page.startswith('<div class="cell tag_hide-cell', bar.end()), bar[0][-200:]
    assert page.count("tag_hide-cell") == folded, "none is lost"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_wrapped_code_is_the_code_of_the_notebook(texts: dict[str, Texts], chapter: str):
    """What is copied from the page runs: wrapping adds no line and takes none."""
    cells = nbformat.read(notebook_of(chapter), as_version=4).cells
    position = 0
    for cell in cells:
        hidden = {"remove-input", "remove-cell"} & set(cell.metadata.get("tags", []))
        if cell.cell_type == "code" and cell.source.strip() and not hidden:
            position = texts[chapter].code.find(cell.source.strip(), position)
            assert position >= 0, cell.source


def test_python_s_own_docstrings_are_not_shown_as_ours(texts: dict[str, Texts]):
    """Of a plain value Sphinx shows the docstring of its type."""
    for kind in (tuple, dict, list, set, str, int, float, frozenset, type(None)):
        first = (kind.__doc__ or "no docstring").splitlines()[0].rstrip(".")
        for name in FILES:
            if name.startswith("api") and len(first) > 12:
                assert first not in texts[name].text.replace("’", "'"), f"{name}: {kind}"


def test_the_overview_names_every_documented_module():
    overview = (BOOK / "api.md").read_text(encoding="utf8").split("## ")[0]
    named = set(re.findall(r"`(qstar(?:_book)?\.[\w.]+)`", overview))
    pages = "\n".join(page.read_text(encoding="utf8") for page in BOOK.glob("api*.md"))
    documented = set(re.findall(r"automodule:: ([\w.]+)", pages))
    assert named == {name for name in documented if not name.startswith("qstar_book.figures.")}


def test_every_reference_is_cited_and_none_is_doubtful():
    entries = (BOOK / "references.bib").read_text(encoding="utf8")
    sources = [
        *(ROOT / "notebooks").glob("*.ipynb"),
        *BOOK.glob("*.md"),
        *ROOT.glob("qstar/**/*.py"),
        *BOOK.glob("qstar_book/**/*.py"),
    ]
    text = "\n".join(file.read_text(encoding="utf8") for file in sources)
    cited = {
        key.strip()
        for group in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", text)
        for key in group.split(",")
    }
    assert set(re.findall(r"^@\w+\{(\w+),", entries, re.MULTILINE)) == cited
    shown = entries + (BOOK / "bibliography.md").read_text(encoding="utf8")
    assert not re.search("unverified|to be checked|TODO", shown, re.IGNORECASE)


QUERIES = ["几何平均", "交集", "投机采样", "平", "公平", "Chernoff", "几何平均 Chernoff"]


def test_search_finds_every_page_with_a_chinese_text_and_english_ones(
    built: Path, contexts: dict[str, BrowserContext], texts: dict[str, Texts]
):
    page = contexts["light"].new_page()
    page.goto((built / "search.html").as_uri(), wait_until="load")
    found = page.evaluate(
        """(queries) => queries.map((query) =>
          Search._performSearch(...Search._parseQuery(query)).map((result) => result[0]))""",
        QUERIES,
    )
    page.close()
    for query, pages in zip(QUERIES, found, strict=True):
        words = query.split()
        holding = {
            name for name in ["index", *FILES] if all(word in texts[name].text for word in words)
        }
        assert holding, query
        assert holding <= set(pages), query
        if all(IDEOGRAPH.search(word) for word in words):  # and none without its characters
            assert all(set(query) <= set(texts[name].text) for name in pages)


def test_nothing_is_lost_on_paper(site: str, contexts: dict[str, BrowserContext]):
    page = contexts["light"].new_page()
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 680, "height": 960})  # A4 within its margins
    page.goto(f"{site}/{FIRST}.html", wait_until="load")
    lost = page.evaluate(
        """() => {
          const seen = (box) => box.checkVisibility() && box.getBoundingClientRect().height > 0;
          const all = (query) => [...document.querySelectorAll(`.bd-article ${query}`)];
          const whole = all(":is(div.math, .cell_input, .cell_output, figure)");
          return {
            title: [...document.querySelectorAll("h1")].filter(seen).map((h1) => h1.innerText),
            handles: all("summary:not(.qs-solution > summary)").filter(seen).length,
            torn: whole.filter((box) => getComputedStyle(box).breakInside !== "avoid").length,
            cut: all(":is(pre, table)").filter((box) => box.scrollWidth > box.clientWidth + 1)
              .length,
            beyond: all("math").filter(
              (box) => box.getBoundingClientRect().right > window.innerWidth).length,
          };
        }"""
    )
    page.close()
    assert re.match(r"1\.\s", lost["title"][0])
    assert len(lost["title"]) == 1
    assert (lost["handles"], lost["torn"], lost["cut"], lost["beyond"]) == (0, 0, 0, 0)


def test_every_internal_link_leads_somewhere(built: Path):
    assert broken_links(built) == []


BROKEN = """<!doctype html>
<html lang="en" data-theme="dark"><head><title>A page</title><style>
@media (prefers-color-scheme: dark) { .night { color: #333; background: #000 } }
@media (min-width: 500px) { .small { display: none } } .k { color: #ddd }</style>
</head><body><main><h1>A page</h1>
<script>console.error("broken on purpose")</script><script>throw Error("thrown on purpose")</script>
<script src="http://elsewhere.example/script.js"></script>
<script src="data:text/javascript,1"></script><script src="data:text/javascript,1"></script>
<p>Raw: $$ x^2 $$</p><p>Raw: \\(x\\)</p>
<p><math><merror><mtext>no such command</mtext></merror></math></p>
<p><math><mi>e</mi><mi>f</mi><mi>&lsquo;</mi><mi>x</mi><mi>&lsquo;</mi></math></p>
<p>The value {glue:text}`ch9-nothing:.3f`</p><p>A glued value: <span class="pasted-text"></span></p>
<img src="nowhere.png" alt="missing"><figure id="fig-empty"></figure><img src="nowhere.png">
<div style="width: 3000px">wide</div><table><tr><th></th><td>empty</td></tr></table>
<pre style="width: 90px; overflow: auto">code that is wider than its box</pre>
<table style="display: block; width: 90px; overflow: auto"><tr><td>a_wide_table_in_a_small_box</td>
</tr></table><p style="width: 90px">A formula <math><mspace width="88px"/></math>, and on</p>
<article><img src="data:," alt="a figure" style="background: #fff"><span class="qs-figure"><img
src="data:,1" alt="a figure" style="filter: invert(1)"></span></article>
<p style="color: #ddd; background: #fff">pale</p><p class="night">pale at night</p>
<p style="color: #dde; background: #fff"><math><mi>pale</mi></math></p>
<p><math><mi>x</mi><mi style="color: red">red</mi></math> is red in black</p>
<p>Below a word <b style="position: absolute; left: 0; background: #000; color: #111">over it</b>
</p>
<pre><span class="n">first</span> <span class="k">pale</span> <span class="n">last</span></pre>
<p>A text with
<a href="index.html" style="text-decoration: none; color: #000">a link</a> like it</p>
<button class="small"></button>
<a href="nowhere.html">no page</a><a href="#nowhere">no place</a></main></body></html>"""


@pytest.mark.parametrize(
    "problem",
    [
        "wrong theme: dark",
        "console: broken on purpose",
        "console: thrown on purpose",
        "failed request: http://elsewhere.example/script.js",
        "external request: http://elsewhere.example/script.js",
        "HTTP error: 404",
        "unrendered maths: Raw: $$",
        "unrendered maths: Raw: \\(x\\)",
        "maths error: no such command",
        "maths in another colour: rgb(255, 0, 0) in rgb(0, 0, 0)",
        "role in a formula: ef‘x‘",
        "unresolved role: The value",
        "unresolved role: an empty glued value",
        "missing image: nowhere.png",
        "missing figure: fig-empty",
        "overflow: 3",
        "clipped: PRE",
        "clipped: TABLE",
        "torn from its formula: , and on",
        "figure on a slab: data:,",
        "wrong figure: data:,1",
        "twice: data:text/javascript,1",
        "accessibility: image-alt: light",
        "accessibility: image-alt: phone",
        "accessibility: empty-table-header: light",
        "accessibility: button-name: phone",
        "accessibility: link-in-text-block: light",
        'accessibility: color-contrast: light: <p style="color: #ddd',
        'accessibility: color-contrast: dark: <p style="color: #ddd',
        'accessibility: color-contrast: dark: <p class="night"',
        "accessibility: color-contrast: light: <span data-look-light",
        'accessibility: color-contrast: light: <b style="position: absolute',
        'accessibility: color-contrast: light: <span class="k"',
    ],
)
def test_a_broken_page_is_caught(broken_page: list[str], problem: str):
    """The negative control: the checker must be able to fail, in every way it claims."""
    assert any(found.startswith(problem) for found in broken_page), broken_page


@pytest.fixture(scope="session")
def broken_page(
    contexts: dict[str, BrowserContext], tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    folder = tmp_path_factory.mktemp("broken")
    (folder / "index.html").write_text(BROKEN, encoding="utf8")
    servers = serve(folder)
    found = look_at(contexts["phone"], f"{next(servers)}/index.html")
    next(servers, None)
    return found


def test_a_broken_link_is_caught(tmp_path: Path):
    (tmp_path / "index.html").write_text(BROKEN, encoding="utf8")
    links = {found.split(": ")[1] for found in broken_links(tmp_path)}
    assert links == {"nowhere.html", "#nowhere", "nowhere.png"}


def test_without_a_browser_the_tests_say_how_to_get_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt-get install chromium"):
        require_browser(None)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium"):
        require_browser(None)


def notebook_of(chapter: str) -> Path:
    return ROOT / "notebooks" / f"{Path(chapter).name}.ipynb"


def expected_figures(chapter: str) -> set[str]:
    """The names of the figures that a notebook declares, in its cells' metadata or by `glue`."""
    cells = nbformat.read(notebook_of(chapter), as_version=4).cells
    declared = {cell.metadata.get("mystnb", {}).get("figure", {}).get("name") for cell in cells}
    pasted = re.findall(r"\{glue:figure\}[^`]*?:name: (\S+)", "\n".join(c.source for c in cells))
    return (declared | set(pasted)) - {None}


class Figures(HTMLParser):
    """The images of one page's figures, by each identifier of the figure and of what is in it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.images: dict[str, dict[str, str | None]] = {}
        self.open: list[tuple[set[str], list[dict[str, str | None]]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        said = dict(attributes)
        if tag == "figure":
            self.open.append((set(), []))
        for names, images in self.open:
            names |= {name} if (name := said.get("id")) else set()
            images += [said] if tag == "img" else []

    def handle_endtag(self, tag: str) -> None:
        if tag == "figure":
            names, images = self.open.pop()
            self.images |= {name: image for name in names for image in images[:1]}


def poor_figures(page: str, names: set[str]) -> list[str]:
    """What is wrong with the figures of these names; that an image loads, look_at sees."""
    images, found = Figures(page).images, []
    for name in sorted(names):
        image = images.get(name, {})
        if int(image.get("width") or 0) <= 200:
            found.append(f"{name} is not on the page, or too small")
        if len(image.get("alt") or "") <= 20:
            found.append(f"{name} has no description: {image.get('alt')!r}")
    return found


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter_shows_each_of_its_figures(built: Path, chapter: str):
    names = expected_figures(chapter)
    assert names, f"{chapter} declares no figure"
    assert poor_figures((built / f"{chapter}.html").read_text(encoding="utf8"), names) == []


def test_a_figure_that_is_missing_small_or_without_a_description_is_caught():
    said = "What is to be seen in it"
    page = f"""<figure id="good"><img width="201" alt="{said}"></figure>
    <figure><p id="good-within"><img width="999" alt="{said}"></p></figure>
    <img width="999" alt="{said}" id="no-figure"><figure id="empty"></figure>
    <figure id="small"><img width="200" alt="{said}"></figure>
    <figure id="silent"><img width="999" alt="figure"></figure>"""
    names = {"good", "good-within", "no-figure", "empty", "small", "silent"}
    caught = {found.split()[0] for found in poor_figures(page, names)}
    assert caught == names - {"good", "good-within"}


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter_offers_the_notebook_that_was_run(
    built: Path, texts: dict[str, Texts], chapter: str
):
    (link,) = {
        str(said["href"])
        for tag, said in texts[chapter].elements
        if tag == "a" and "btn-download-source-button" in (said.get("class") or "").split()
    }
    file = (built / f"{chapter}.html").parent / unquote(link)
    assert file.name == notebook_of(chapter).name
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    assert file.read_bytes() == (BOOK / f"{chapter}.ipynb").read_bytes()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error"]
    for place in (str(ROOT), sys.prefix):
        assert place not in file.read_text(encoding="utf8"), "it names a folder of this machine"


def test_what_a_chapter_offers_is_downloaded_by_a_click(
    site: str, contexts: dict[str, BrowserContext], tmp_path: Path
):
    """One chapter for all: the button of each is the same, but for its link."""
    chapter = CHAPTERS[0]
    page = contexts["light"].new_page()
    page.goto(f"{site}/{chapter}.html", wait_until="load")
    with page.expect_download() as download:
        page.locator("a.btn-download-source-button").evaluate("link => link.click()")
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    page.close()
    assert file.name == notebook_of(chapter).name
    assert file.read_bytes() == (BOOK / f"{chapter}.ipynb").read_bytes()


def test_search_finds_a_word_without_a_server_behind_it(
    site: str, contexts: dict[str, BrowserContext]
):
    page = contexts["light"].new_page()
    page.goto(f"{site}/search.html?q=Chernoff", wait_until="load")
    first = page.locator("#search-results li a").first
    first.wait_for(timeout=10_000)
    assert page.locator("#search-results li").count() > 2
    page.close()


@pytest.mark.parametrize(
    ("name", "view"), [("index", "light"), ("index", "dark"), (CHAPTERS[0], "light")]
)
def test_pages_open_from_the_disk_without_a_server(
    built: Path, contexts: dict[str, BrowserContext], name: str, view: str
):
    """And in either scheme at once, where the other pages are turned from one into the other."""
    assert look_at(contexts[view], (built / f"{name}.html").as_uri(), [view]) == []


def test_the_claims_that_matter_most_show_the_verdicts_of_their_checks(
    site: str, contexts: dict[str, BrowserContext]
):
    page = contexts["light"].new_page()
    page.goto(f"{site}/claims.html", wait_until="load")
    rows = page.locator("table.qs-claims:not(.qs-register) tbody tr")
    verdicts = rows.locator("td:nth-child(2) .verdict").all_inner_texts()
    count, links = rows.count(), rows.locator("td:nth-child(3) a.internal").count()
    page.close()
    assert len(verdicts) == count > 10
    assert set(verdicts) <= VERDICTS
    assert links >= count


def test_landing_page_shows_a_cell_as_it_was_executed(
    site: str, contexts: dict[str, BrowserContext]
):
    (cell,) = [
        cell
        for cell in nbformat.read(BOOK / "chapters/your_two_models.ipynb", as_version=4).cells
        if cell.id == "five-lines"
    ]
    (printed,) = [out.text for out in cell.outputs if out.get("name") == "stdout"]
    page = contexts["light"].new_page()
    page.goto(f"{site}/index.html", wait_until="load")
    code = page.locator(".qs-excerpt .cell_input pre").text_content()
    output = page.locator(".qs-excerpt .cell_output pre").text_content()
    page.close()
    assert code.strip() == cell.source.strip()
    assert output.strip() == printed.strip() != ""


def test_landing_page_draws_q_star_before_anything_else(texts: dict[str, Texts]):
    images = [a for tag, a in texts["index"].elements if tag == "img" and "_images" in a["src"]]
    assert "start-q-star" in images[0]["src"]


def test_landing_page_leads_every_reader_somewhere(built: Path, texts: dict[str, Texts]):
    """To practice, theory and doubt; it says how to install, and how to cite."""
    page = (built / "index.html").read_text(encoding="utf8")
    article = page[page.index("<article") : page.index("</article>")]
    for name in (*CHAPTERS, "claims", "api", "notation"):
        assert f'href="{name}.html' in article, name
    for text in ("pip install", "@misc{qstar"):
        assert text in texts["index"].text, text


def test_landing_page_counts_the_verdicts_of_all_claims(
    site: str, contexts: dict[str, BrowserContext]
):
    counts = Counter(d.verdict for d in claims.read_decisions(BOOK / "chapters").values())
    page = contexts["light"].new_page()
    page.goto(f"{site}/index.html", wait_until="load")
    items = page.locator("ul.qs-counts li").all_inner_texts()
    assert items == [f"{counts[verdict]} {verdict}" for verdict in claims.VERDICTS]
    page.get_by_role("link", name="refuted", exact=True).first.click()
    page.get_by_text(f"{counts['refuted']} of {counts.total()} claims").wait_for()
    page.close()


def test_the_claims_that_matter_most_are_claims_of_the_register():
    _, register = claims.read_claims(ROOT / "data" / "claims.yaml")
    selection = (BOOK / "claims.md").read_text(encoding="utf8")
    shown = re.findall(r"::claim-([a-z0-9-]+)", selection)
    assert 10 < len(shown) == len(set(shown)) < 40
    assert set(shown) <= {claim.id for claim in register}


def test_the_filter_of_the_register_shows_the_claims_that_fit(
    site: str, contexts: dict[str, BrowserContext]
):
    _, register = claims.read_claims(ROOT / "data" / "claims.yaml")
    page = contexts["light"].new_page()
    page.goto(f"{site}/claims.html", wait_until="load")
    shown = page.locator("table.qs-register tbody tr:visible")
    assert shown.count() == len(register)
    page.get_by_label("Verdict").select_option("refuted")
    page.get_by_label("Chapter").select_option("exact-sampling")
    fit = {c.key for c in register if (c.verdict, c.notebook) == ("refuted", "exact_sampling")}
    assert {row.get_attribute("id") for row in shown.all()} == fit
    assert page.get_by_role("status").inner_text() == f"{len(fit)} of {len(register)} claims"
    page.get_by_label("Kind").select_option("formula")
    assert {row.get_attribute("id") for row in shown.all()} == {
        c.key for c in register if c.key in fit and c.kind == "formula"
    }
    page.get_by_role("button", name="Show all").click()
    page.get_by_text(f"{len(register)} of {len(register)} claims").wait_for()
    page.close()


def test_without_scripts_the_register_is_the_whole_table(site: str, browser: Browser):
    _, register = claims.read_claims(ROOT / "data" / "claims.yaml")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{site}/claims.html", wait_until="load")
    assert page.locator("table.qs-register tbody tr:visible").count() == len(register)
    assert page.locator("form.qs-filter").count() == 0
    context.close()


def test_no_cell_covers_what_it_decides(site: str, contexts: dict[str, BrowserContext]) -> None:
    page = contexts["phone"].new_page()
    page.goto(f"{site}/chapters/high_dimension.html", wait_until="load")
    for view in VIEWS:
        turn(page, view)
        gaps = page.evaluate(
            """() => [...document.querySelectorAll(".qs-decides")].map((line) =>
              line.nextElementSibling.getBoundingClientRect().top -
              line.getBoundingClientRect().bottom)"""
        )
        assert gaps
        assert min(gaps) >= 0, view
    page.close()


def test_a_claim_and_its_deciding_cell_link_to_each_other(built: Path):
    """Row to cell, cell to row, and the verdict in the prose to the row as well."""
    _, register = claims.read_claims(ROOT / "data" / "claims.yaml")
    table = anchors(built / "claims.html")
    folder = built / "chapters"
    chapters = {c.notebook: anchors(folder / f"{c.notebook}.html") for c in register}
    for claim in register:
        cell = f"decides-{claim.cell}".replace("_", "-").lower()
        assert claim.key in table.identifiers
        assert f"chapters/{claim.notebook}.html#{cell}" in table.links, claim.id
        assert cell in chapters[claim.notebook].identifiers, claim.id
        assert f"../claims.html#{claim.key}" in chapters[claim.notebook].links, claim.id


def test_an_address_with_a_chapter_s_old_number_leads_to_the_chapter(built: Path, browser: Browser):
    moved = SETTINGS["redirects"]
    assert {f"chapters/{new[: -len('.html')]}" for new in moved.values()} <= set(CHAPTERS)
    page = browser.new_page()
    for old, new in moved.items():
        page.goto(f"{(built / old).as_uri()}.html#place")
        page.wait_for_url(f"{(built / 'chapters' / new).as_uri()}#place")
    page.close()


def test_every_notebook_is_a_chapter():
    notebooks = {file.stem for file in (ROOT / "notebooks").glob("*.ipynb")}
    assert notebooks == {Path(chapter).name for chapter in CHAPTERS}, "see book/_toc.yml"


def test_every_public_module_is_documented():
    modules = set()
    for folder in (ROOT / "qstar", BOOK / "qstar_book"):
        for file in folder.rglob("[a-z]*.py"):
            modules.add(".".join(file.relative_to(folder.parent).with_suffix("").parts))
    modules |= {"qstar.families", "qstar_book.figures"}  # folders that hold functions themselves
    behind = {
        "qstar.arguments",
        "qstar.face",
        "qstar.gaussian_axes",
        "qstar.result",
        "qstar.rows",
        "qstar.solve",
    }  # or re-exported
    behind |= {name for name in modules if name.startswith("qstar_book.sphinx.")}
    pages = "\n".join(page.read_text(encoding="utf8") for page in BOOK.glob("api*.md"))
    documented = set(re.findall(r"automodule:: ([\w.]+)", pages))
    assert documented == modules - behind, "say `automodule::` in a book/api_*.md"


def test_every_public_name_is_documented(built: Path):
    import qstar

    page = anchors(built / "api.html").identifiers
    assert {f"qstar.{name}" for name in qstar.__all__} <= page


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("Shape (*batch, vocab).", r"Shape (\*batch, vocab)."),
        ("From (*batch) to (*positions, 2).", r"From (\*batch) to (\*positions, 2)."),
        ("It is resampled *before* the step.", "It is resampled *before* the step."),
        ("**Twice** `*given` and 2 * x.", "**Twice** `*given` and 2 * x."),
    ],
)
def test_the_star_of_a_shape_is_no_emphasis(written: str, read: str):
    lines = [written]
    markup._docstring_for_people(None, "function", "f", None, None, lines)
    assert lines == [read]


@pytest.mark.parametrize(
    ("tex", "letters"),
    [
        (r"\alpha^\star", "α*"),
        (r"\mathrm{KL}(\pi_\theta\|\pi_t)", "KL(π_θ‖π_t)"),
        (r"\alpha=\tfrac12", "α=1/2"),
        (r"-\log Z(\alpha)", "-log Z(α)"),
    ],
)
def test_a_short_formula_has_a_name_in_letters(tex: str, letters: str):
    assert page_extension.plain_maths(tex) == letters


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("as M, so", "as [M,] so"),
        ("(M) and", "[(M)] and"),
        ("(M so", "[(M] so"),
        ("the M so", "the M so"),
        ("M-th", "[M-]th"),
        ("「M」。", "[「M」。]"),
    ],
)
def test_a_formula_keeps_its_punctuation(written: str, kept: str):
    maths = "<math><mi>x</mi></math>"
    together = page_extension._keep_maths_with_its_punctuation
    box = kept.replace("[", '<span class="qs-together">').replace("]", "</span>")
    assert together(written.replace("M", maths)) == box.replace("M", maths)


def test_a_straight_quotation_mark_in_chinese_opens_as_well():
    said = page_extension._say_the_language("<p>α 反映”强度”更大, ”so” (KL)</p>")
    assert said == '<p>α <span lang="zh">反映“强度”更大</span>, ”so” (KL)</p>'


def test_a_style_sheet_keeps_what_a_page_may_use():
    css = """/* a note */ .used{color:red} .gone,.used .gone, p.used:not(.gone){color:blue}
    @media (min-width: 5px){.gone{x:y} #there{content:"a}b"}} @media print{.gone{x:y}}
    :is(.a,.b) p{x:y} .sm\\:used{x:y} @font-face{font-family:"Font Awesome 6"}"""
    kept = light.used_rules(css, {"used", "there", "sm:used"})
    assert kept == (
        ".used{color:red}p.used:not(.gone){color:blue}@media (min-width: 5px)"
        '{#there{content:"a}b"}}'
        ":is(.a,.b) p{x:y}.sm\\:used{x:y}"
    )


def test_a_figure_loses_only_what_is_not_seen():
    svg = """<?xml version="1.0"?><!DOCTYPE svg PUBLIC "a"><svg width="1.25pt">
    <metadata>m</metadata>
    <path d="M 12.345678 -0.001 L 5 6.5"/><g transform="translate(1.23456 2) scale(0.015625)"/>
    <image href="data:image/png;base64,ab/1.23456"/></svg>"""
    assert light.slim(svg).split("\n") == [
        '<svg width="1.25pt">',
        '<path d="M 12.35 -0 L 5 6.5"/><g transform="translate(1.23 2) scale(0.015625)"/>',
        '<image href="data:image/png;base64,ab/1.23456"/></svg>',
        "",
    ]


def test_a_line_of_a_figure_keeps_the_corners_that_are_seen():
    x = np.linspace(0, 200, 2001)
    curve = np.stack([x, 100 * np.exp(-((x - 70) ** 2))], -1)  # a peak of two points' width
    kept = light.fewer_points(curve)
    assert len(kept) < 100
    start, step = kept[:-1], np.diff(kept, axis=0)
    off = curve[:, None] - start
    along = np.clip((off * step).sum(-1) / (step**2).sum(-1), 0, 1)[..., None]
    assert np.linalg.norm(off - along * step, axis=-1).min(-1).max() <= light.CLOSE_ENOUGH
    path = "M 0 0\nL 1 0.001\nL 2 0\nL 3 0\nL 3 5\nz"
    assert light.slim(f'<path d="{path}"/>') == '<path d="M 0 0\nL 3 0\nL 3 5\nz"/>\n'
    odd = '<path d="M 0 0\nL 1 0\nL 2 0\nL 3 0\nL 3 1e-05"/>\n'
    assert "L 3 1e-05" in light.slim(odd)


def test_a_cloud_of_points_is_one_group():
    def cloud(*points: str) -> str:
        return "".join(f'<g clip-path="url(#{c})">\n<use x="{x}"/>\n</g>\n' for c, x in points)

    assert light.slim(cloud("a1", "a2", "b3", "b4", "b3")) == (
        '<g clip-path="url(#a)">\n<use x="1"/>\n<use x="2"/>\n</g>\n'
        '<g clip-path="url(#b)">\n<use x="4"/>\n<use x="3"/>\n</g>\n'
    )


def test_an_icon_that_the_theme_lacks_is_said():
    icons = light.icon_paths('x={bars:[448,512,["navicon"],"f0c9","M0 96"]}')
    page = '<i class="fa-solid fa-bars fa-lg" data-mode="dark" title="x"></i>'
    assert light.with_icons(page, icons) == (
        '<svg class="svg-inline--fa fa-bars fa-lg" data-mode="dark" aria-hidden="true" '
        'viewBox="0 0 448 512"><path fill="currentColor" d="M0 96"/></svg>'
    )
    with pytest.raises(KeyError, match="rocket"):
        light.with_icons('<i class="fas fa-rocket"></i>', icons)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_says_when_and_with_what_it_was_computed(built: Path, chapter: str):
    page = (built / f"{chapter}.html").read_text(encoding="utf8")
    (said,) = re.findall(r'<p class="qs-computed">(.*?)</p>', page)
    facts = nbformat.read(BOOK / f"{chapter}.ipynb", as_version=4).metadata["qstar"]
    assert re.match(r"Computed on \d{4}-\d\d-\d\d with Python ", said)
    assert f"NumPy {facts['packages']['numpy']}" in said


def test_the_book_is_cited_as_its_file_says():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf8"))
    entry = provenance.bibtex(citation)
    assert f"Version {citation['version']}" in entry
    assert citation["title"] in entry
    assert "url" not in provenance.bibtex(citation | {"url": ""})
    assert "{https://x.y/}" in provenance.bibtex(citation | {"url": "https://x.y/"})


@pytest.fixture
def small_book(tmp_path: Path) -> Path:
    """A book of two pages with the real book's configuration; `[tool.qstar]` is to be written."""
    book = tmp_path / "book"
    for folder in ("_static", "_templates"):
        shutil.copytree(BOOK / folder, book / folder)
    for part in ("_config.yml", "references.bib"):
        shutil.copy(BOOK / part, book / part)
    (book / "_toc.yml").write_text(
        "format: jb-book\nroot: index\nchapters:\n- file: chapters/01_x\n"
    )
    (book / "index.md").write_text("# A book\n")
    cells = [nbformat.v4.new_markdown_cell("# A chapter"), nbformat.v4.new_code_cell("1 + 1")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    notebook.metadata["language_info"] = {"name": "python"}
    (book / "chapters").mkdir()
    nbformat.write(notebook, book / "chapters" / "01_x.ipynb")
    (tmp_path / "pyproject.toml").write_text('[tool.qstar]\nrepository = ""\n')
    return book


def build(book: Path) -> subprocess.CompletedProcess[str]:
    tool = Path(sys.executable).with_name("jupyter-book")
    return run(tool, "build", book, "-W", "-n", "--keep-going", "-q", cwd=book.parent)


def outward_links(book: Path) -> list[str]:
    page = Anchors(book / "_build" / "html" / "chapters" / "01_x.html")
    return [link for link in page.links if urlsplit(link).scheme in ("http", "https")]


def test_without_an_address_no_button_leads_to_a_repository(small_book: Path):
    done = build(small_book)
    assert done.returncode == 0, done.stderr
    forbidden = re.compile("github|colab|mybinder|gitlab")
    assert [link for link in outward_links(small_book) if forbidden.search(link)] == []
    assert not (small_book / "_build" / "html" / "sitemap.xml").exists()


def test_with_an_address_every_button_leads_to_the_notebook(small_book: Path):
    settings = '[tool.qstar]\nrepository = "https://github.com/someone/something"\n'
    (small_book.parent / "pyproject.toml").write_text(settings)
    done = build(small_book)
    assert done.returncode == 0, done.stderr
    links = outward_links(small_book)
    repository, file = "github.com/someone/something", "notebooks/01_x.ipynb"
    colab = "https://colab.research.google.com/github/someone/something"
    binder = "https://mybinder.org/v2/gh/someone/something"
    assert {
        f"https://{repository}",
        f"https://{repository}/edit/main/{file}",
        f"https://{repository}/blob/main/{file}?plain=1",
        f"{colab}/blob/main/{file}",
        f"{binder}/main?urlpath=lab/tree/{file}",
    } <= set(links)
    assert [link for link in links if "book/chapters" in link] == []
    pages = small_book / "_build" / "html"
    address = "https://someone.github.io/something/"
    head = (pages / "chapters" / "01_x.html").read_text()
    assert f'<link rel="canonical" href="{address}chapters/01_x.html" />' in head
    assert re.findall("<loc>(.*?)</loc>", (pages / "sitemap.xml").read_text()) == [
        address,
        f"{address}chapters/01_x.html",
        f"{address}zh/",  # its first page is one of those that are translated
    ]


def test_a_warning_fails_the_build_again_when_it_is_run_again(small_book: Path):
    (small_book / "index.md").write_text("# A book\n\n{ref}`nowhere`\n")
    for _ in range(2):
        done = build(small_book)
        assert done.returncode != 0
        assert "nowhere" in done.stderr
