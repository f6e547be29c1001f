"""The Chinese edition: complete, with the numbers of the English one, and as sound in a browser."""

import base64
import io
import re
import sys
from collections import Counter
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from babel.messages.catalog import Catalog
from built_pages import BOOK, ROOT, once, run
from fontTools.ttLib import TTFont
from playwright.sync_api import Browser, BrowserContext, Route
from test_book import IDEOGRAPH, PAGES, WEIGH, Texts, look_at

from qstar_book import translation
from qstar_book.sphinx import edition

FONTS = BOOK / "_static" / "fonts"
QUOTED, REST = FONTS / "chinese-quoted.woff2", FONTS / "chinese.woff2"
CSS = BOOK / "_static" / "chinese.css"
TRANSLATED = translation.translated_pages(ROOT)
CHINESE = [*TRANSLATED, "search"]
WANTED = {
    "index",
    "notation",
    "claims",
    *(
        f"chapters/{name}"
        for name in ("your_two_models", "kl_symmetry", "gaussians", "speculative_decoding")
    ),
}


def test_these_pages_at_least_are_translated():
    assert set(TRANSLATED) >= WANTED
    assert set(TRANSLATED) <= set(PAGES)


EXTRACT = """
import pathlib, sys
from qstar_book import translation
sys.exit(not translation.extract(*map(pathlib.Path, sys.argv[1:])))
"""


# --- Complete ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def templates(built: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Catalog]:
    def extract() -> str:
        folder = tmp_path_factory.mktemp("gettext")
        done = run(sys.executable, "-c", EXTRACT, ROOT, folder)  # Sphinx likes a process of its own
        assert done.returncode == 0, done.stderr
        return str(folder)

    return translation.read_templates(Path(once(tmp_path_factory, "templates", extract)))


@pytest.mark.parametrize("name", [*TRANSLATED, edition.CATALOG, edition.SCRIPTS])
def test_a_translation_keeps_up_with_its_original(templates: dict[str, Catalog], name: str):
    """Mended by `qstar-book translate`, and by a translator."""
    ours = translation.catalogs(ROOT)
    assert len(templates[name]) > 3
    assert translation.behind(name, ours.get(name), templates[name]) == []


def test_no_catalogue_is_of_a_page_that_is_not_translated(templates: dict[str, Catalog]):
    assert set(translation.catalogs(ROOT)) == set(templates)


def test_a_translation_that_is_behind_is_caught():
    template, ours = Catalog(), Catalog()
    for text in ("It is kept.", "It is new.", "It has changed.", "It is empty."):
        template.add(text)
    ours.add("It is kept.", "它保留了。")
    ours.add("It has changed.", "它从前是这样。", flags=["fuzzy"])
    ours.add("It is gone.", "它消失了。")
    ours.add("It is empty.", "")
    assert translation.behind("p", ours, template) == [
        "p: not translated: It is new.",
        "p: doubtful: It has changed.",
        "p: not translated: It is empty.",
        "p: no longer said: It is gone.",
    ]
    assert translation.behind("p", None, template) == ["p: no catalogue"]


# --- The same numbers ----------------------------------------------------------------------------


class Blocks(HTMLParser):
    """The paragraphs, cells, titles and the like of a page's article, each with its text."""

    BLOCKS = frozenset(
        {"p", "li", "td", "th", "dt", "dd", "figcaption", "caption", "summary", "pre"}
    )

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.open: list[list[str]] = []
        self.left_out: list[str] = []  # the tags within a part that is not compared
        article = re.search(r"<article\b.*?</article>", page, re.DOTALL)
        assert article is not None
        self.feed(article[0])

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = set((dict(attributes).get("class") or "").split())
        if self.left_out or tag == "script" or names & {"qs-english", "qs-tip"}:
            self.left_out += [tag] if tag not in Texts.VOID else []
        elif tag in self.BLOCKS or re.fullmatch(r"h\d", tag):
            self.open.append([tag])

    def handle_endtag(self, tag: str) -> None:
        if self.left_out:
            self.left_out.pop()
        elif self.open and tag == self.open[-1][0]:
            name, *texts = self.open.pop()
            if text := " ".join("".join(texts).split()):
                self.found.append((name, text))

    def handle_data(self, data: str) -> None:
        if self.open and not self.left_out:
            self.open[-1].append(data)


NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def numbers_of(page: str) -> list[tuple[str, Counter[str], str]]:
    """Of each block that says a number: what it is, its numbers, and its text."""
    found = [(tag, Counter(NUMBER.findall(text)), text) for tag, text in Blocks(page).found]
    return [one for one in found if one[1]]


def other_numbers(english: str, chinese: str) -> list[str]:
    """Where a page and its translation do not say the same numbers."""
    here, there = numbers_of(english), numbers_of(chinese)
    found = [f"{a[2]} | {b[2]}" for a, b in zip(here, there, strict=False) if a[:2] != b[:2]]
    return found + [one[2] for one in [*here[len(there) :], *there[len(here) :]]]


@pytest.mark.parametrize("name", TRANSLATED)
def test_every_number_is_that_of_the_english_page(built: Path, name: str):
    english = (built / f"{name}.html").read_text(encoding="utf8")
    chinese = (built / edition.FOLDER / f"{name}.html").read_text(encoding="utf8")
    assert sum(sum(numbers.values()) for _, numbers, _ in numbers_of(english)) > 10
    assert other_numbers(english, chinese) == []


def test_another_number_is_caught():
    english = "<article><p>It is 0.5 of 12.</p><ul><li><p>Two</p></li></ul><p>And 3</p></article>"
    chinese = "<article><p>它是 12 的 0.5。</p><ul><li><p>二</p></li></ul><p>还有 3</p></article>"
    assert other_numbers(english, chinese) == []
    assert other_numbers(english, chinese.replace("0.5", "0.6")) == [
        "It is 0.5 of 12. | 它是 12 的 0.6。"
    ]
    assert other_numbers(english, chinese.replace("<p>还有 3</p>", "")) == ["And 3"]
    assert len(other_numbers(english, chinese.replace("二", "2"))) == 2


# --- In a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def chinese_texts(built: Path) -> dict[str, Texts]:
    folder = built / edition.FOLDER
    return {name: Texts((folder / f"{name}.html").read_text(encoding="utf8")) for name in CHINESE}


@pytest.mark.parametrize("name", CHINESE)
def test_a_chinese_page_is_light_and_sound_in_light_in_dark_and_on_a_phone(
    site: str,
    contexts: dict[str, BrowserContext],
    name: str,
):
    url = f"{site}/{edition.FOLDER}/{name}.html"
    most_scripts = 700_000 if name == "search" else 300_000
    assert look_at(contexts["phone"], url, most_scripts=most_scripts) == []


def test_a_chinese_page_opens_from_the_disk_without_a_server(
    built: Path,
    contexts: dict[str, BrowserContext],
):
    page = built / edition.FOLDER / f"{TRANSLATED[1]}.html"
    assert look_at(contexts["dark"], page.as_uri(), ["dark"]) == []


def test_no_chinese_page_is_wider_than_the_smallest_phone(site: str, browser: Browser):
    page = browser.new_page(viewport={"width": 320, "height": 640})
    for name in CHINESE:
        page.goto(f"{site}/{edition.FOLDER}/{name}.html", wait_until="load")
        assert page.evaluate("document.documentElement.scrollWidth") <= 320, name
    page.close()


@pytest.mark.parametrize("name", CHINESE)
def test_a_chinese_page_says_that_it_is_chinese(chinese_texts: dict[str, Texts], name: str):
    page = chinese_texts[name]
    (html,) = [attributes for tag, attributes in page.elements if tag == "html"]
    assert html["lang"] == "zh-CN"
    assert len(IDEOGRAPH.findall(page.title)) > 3
    said = [text for language, text in page.found if language == "en" and IDEOGRAPH.search(text)]
    assert said == []


@pytest.mark.parametrize("name", TRANSLATED)
def test_each_page_of_both_editions_leads_to_the_other(built: Path, name: str):
    editions = {"en": built / f"{name}.html", "zh-CN": built / edition.FOLDER / f"{name}.html"}
    for file in editions.values():
        page = Texts(file.read_text(encoding="utf8"))
        alternates = {
            str(a["hreflang"]): (file.parent / str(a["href"])).resolve()
            for tag, a in page.elements
            if tag == "link" and a.get("rel") == "alternate" and a.get("hreflang")
        }
        assert alternates == {language: there.resolve() for language, there in editions.items()}
        (link,) = [a for tag, a in page.elements if "qs-edition" in (a.get("class") or "").split()]
        there = editions[str(link["lang"])]
        assert there != file
        assert (file.parent / str(link["href"])).resolve() == there.resolve()


def test_a_page_without_a_translation_offers_none(built: Path):
    for name in set(PAGES) - set(TRANSLATED):
        assert "qs-edition" not in (built / f"{name}.html").read_text(encoding="utf8"), name


def test_the_switch_leads_to_the_same_place(site: str, contexts: dict[str, BrowserContext]):
    page = contexts["light"].new_page()
    page.goto(f"{site}/notation.html#symbols", wait_until="load")
    page.get_by_role("link", name="中文").click()
    page.wait_for_url(f"{site}/{edition.FOLDER}/notation.html#symbols")
    assert page.locator("#symbols").count() == 1
    page.get_by_role("link", name="English", exact=True).click()
    page.wait_for_url(f"{site}/notation.html#symbols")
    page.close()


HAN = re.compile("[\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef]")


def shown_in(files: Iterable[Path]) -> set[str]:
    pages = (Texts(file.read_text(encoding="utf8")) for file in files)
    return {sign for page in pages for _, text in page.found for sign in HAN.findall(text)}


def test_every_chinese_character_that_is_shown_is_in_the_fonts(built: Path):
    """Those that English pages quote are in a font of their own, the others in the other."""
    quoted, rest = ({chr(c) for c in TTFont(font).getBestCmap()} for font in (QUOTED, REST))
    files = set(built.rglob("*.html"))
    chinese = {file for file in files if built / edition.FOLDER in file.parents}
    in_english = shown_in(files - chinese)
    used = in_english | shown_in(chinese)
    assert len(used) > 700
    assert used - quoted - rest == set()
    assert in_english - quoted == set()
    assert quoted & rest == set()
    assert set("“”‘’—…") <= quoted
    assert len(quoted | rest) < len(used) + 300  # and little else
    assert QUOTED.stat().st_size <= 100_000
    assert REST.stat().st_size <= 200_000
    assert (FONTS / "OFL-chinese.txt").is_file()
    css = CSS.read_text(encoding="utf8")
    (said,) = re.findall(r"chinese-quoted\.woff2[^}]*unicode-range: ([^;]*);", css)
    ends = [[int(end, 16) for end in run[2:].split("-")] for run in said.split(", ")]
    assert {chr(c) for run in ends for c in range(run[0], run[-1] + 1)} == quoted


def test_every_character_of_the_fonts_has_a_square_of_its_width():
    (data,) = re.findall(r"data:font/woff2;base64,([^\"]+)", CSS.read_text(encoding="utf8"))
    squares = TTFont(io.BytesIO(base64.b64decode(data)))
    shapes = {code: name for table in squares["cmap"].tables for code, name in table.cmap.items()}
    for file in (QUOTED, REST):
        font = TTFont(file)
        for code, name in font.getBestCmap().items():
            width = font["hmtx"][name][0] / font["head"].unitsPerEm
            own = squares["hmtx"][shapes[code]][0] / squares["head"].unitsPerEm
            assert own == width, chr(code)


SHIFT = """async () => {
  await new Promise((quiet) => requestIdleCallback(() => setTimeout(quiet, 100)));
  return window.shift;
}"""


def shift_of_late_fonts(context: BrowserContext, url: str, size: str) -> float:
    """How far a page moves when its Chinese fonts come after all else, with squares till then.

    Args:
        context: Of the browser.
        url: Of the page.
        size: Of the squares.
    """
    page = context.new_page()
    late: list[Route] = []
    face = 'font-family: "qstar squares";'

    def style(route: Route) -> None:
        answer = route.fetch()
        css = answer.text().replace(face, f"{face} size-adjust: {size};")
        route.fulfill(response=answer, body=css)

    page.route("**/*.woff2", lambda route: late.append(route))
    page.route("**/chinese.css*", style)
    page.goto(url, wait_until="domcontentloaded")
    page.wait_for_function("performance.getEntriesByType('paint').length")
    before: float = page.evaluate(SHIFT)  # of scripts that ran after a first paint, say
    assert late
    for route in late:
        route.continue_()
    after: float = page.evaluate(WEIGH)[-1]  # waits for the fonts
    page.close()
    return after - before


@pytest.mark.parametrize("name", [f"{edition.FOLDER}/claims", "chapters/what_alpha_means"])
def test_no_line_moves_when_the_chinese_fonts_come_late(
    site: str, contexts: dict[str, BrowserContext], name: str
):
    url = f"{site}/{name}.html"
    assert shift_of_late_fonts(contexts["light"], url, "100%") <= 0.01
    assert shift_of_late_fonts(contexts["light"], url, "150%") > 0.015


def test_chinese_is_shown_in_the_font_of_the_book(site: str, contexts: dict[str, BrowserContext]):
    page = contexts["light"].new_page()
    loaded = """async () => {
      await document.fonts.ready;
      return [...document.fonts].filter((face) => face.status === "loaded")
        .map((face) => face.family.replaceAll('"', ""));
    }"""
    page.goto(f"{site}/{edition.FOLDER}/index.html", wait_until="load")
    assert "qstar chinese" in page.evaluate(loaded)
    page.goto(f"{site}/bibliography.html", wait_until="load")
    assert "qstar chinese" not in page.evaluate(loaded)
    page.close()


QUERIES = ["几何平均", "交集", "投机采样", "教师", "Chernoff"]


def test_search_finds_chinese_within_runs_of_it(
    built: Path,
    contexts: dict[str, BrowserContext],
    chinese_texts: dict[str, Texts],
):
    """From the disk, without a server behind it."""
    page = contexts["light"].new_page()
    page.goto((built / edition.FOLDER / "search.html").as_uri(), wait_until="load")
    found = page.evaluate(
        """(queries) => queries.map((query) =>
          Search._performSearch(...Search._parseQuery(query)).map((result) => result[0]))""",
        QUERIES,
    )
    for query, pages in zip(QUERIES, found, strict=True):
        holding = {name for name in TRANSLATED if query in chinese_texts[name].text}
        assert holding, query
        assert holding <= set(pages) <= set(TRANSLATED), query
    page.goto(f"{(built / edition.FOLDER / 'search.html').as_uri()}?q=几何平均", wait_until="load")
    link = page.locator("#search-results li a").first
    link.wait_for(timeout=10_000)
    target = str(link.get_attribute("href")).partition("#")[0].partition("?")[0]
    page.close()
    assert (built / edition.FOLDER / target).is_file()
