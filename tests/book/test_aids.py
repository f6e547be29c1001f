"""Reading aids, in a book of a few pages: theorems, exercises, words, references, downloads."""

import base64
import csv
import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nbformat
import numpy as np
import pytest
from matplotlib.image import imread, imsave
from playwright.sync_api import Browser, Page

from qstar_book.sphinx import downloads, glossary, light, markup, pages

BOOK = Path(__file__).resolve().parents[2] / "book"
TOOL = Path(sys.executable).with_name("jupyter-book")
SVG = '<svg xmlns="http://www.w3.org/2000/svg" height="75pt" width="150pt" viewBox="0 0 150 75"/>\n'

INDEX = """# A book

{prf:ref}`thm-one` and {prf:ref}`that lemma <lem-two>`; {ref}`thm-one`; {prf:ref}`ex-a-one`.

```{theorem-list}
```
"""
WORDS = """# Words

```{glossary}
Chernoff point
balanced point
  The point $q^\\star$ of the {term}`path`. It is one.

  A second paragraph.

path
  All of them.
```

```{word-index}
```

```{bibliography}
```
"""
FIRST = """# The first

Words enough for a first paragraph, with the {term}`balanced point` and {cite:t}`chernoff1952`.

```{prf:theorem} A name, $q^\\star$
:label: thm-one
What holds.
```

```{prf:proof}
Why.
```

```{exercise} Try
:label: ex-a-one
Do it.
```

```{solution} ex-a-one
:class: dropdown
Done.
```
"""
SECOND = """# The second

```{prf:definition} A word
:label: def-two
It means this.
```

```{prf:lemma}
:label: lem-two
By {prf:ref}`def-two`.
```

```{prf:proof} thm-one
The other proof.
```

| head | two, $x$ |
|---|---|
| 1 | a, b |
"""


def png() -> bytes:
    """One pixel of a red through which half of the ground is seen."""
    file = io.BytesIO()
    imsave(file, np.array([[[1.0, 0, 0, 0.5]]]), format="png")
    return file.getvalue()


def figure() -> nbformat.NotebookNode:
    picture = {"image/svg+xml": SVG, "image/png": base64.b64encode(png()).decode()}
    cell = nbformat.v4.new_code_cell("draw()", outputs=[nbformat.v4.new_output("display_data")])
    cell.outputs[0].data = picture
    cell.metadata = {
        "mystnb": {"figure": {"name": "fig-x", "caption": "What."}, "image": {"alt": "A figure"}}
    }
    return cell


def make_book(root: Path, *, second: str = SECOND) -> Path:
    book = root / "book"
    for folder in ("_static", "_templates"):
        shutil.copytree(BOOK / folder, book / folder)
    for part in ("_config.yml", "references.bib"):
        shutil.copy(BOOK / part, book / part)
    (root / "pyproject.toml").write_text('[tool.qstar]\nrepository = ""\n')
    parts = ("One", "chapters/a"), ("Two", "chapters/b")
    (book / "_toc.yml").write_text(
        "format: jb-book\nroot: index\nparts:\n"
        + "".join(
            f"- caption: {name}\n  numbered: true\n  chapters:\n  - file: {file}\n"
            for name, file in parts
        )
        + "- caption: Rest\n  chapters:\n  - file: words\n"
    )
    (book / "index.md").write_text(INDEX, encoding="utf8")
    (book / "words.md").write_text(WORDS, encoding="utf8")
    new = nbformat.v4
    check = new.new_code_cell("assert 2 > 1", metadata={"tags": ["solution"]})
    chapters = {
        "a": [new.new_markdown_cell(FIRST), check, new.new_markdown_cell("After."), figure()],
        "b": [new.new_markdown_cell(second), new.new_code_cell("1")],
    }
    (book / "chapters").mkdir()
    for name, cells in chapters.items():
        notebook = new.new_notebook(cells=cells)
        notebook.metadata = {
            "kernelspec": {"name": "python3", "display_name": "Python 3"},
            "language_info": {"name": "python"},
        }
        nbformat.write(notebook, book / "chapters" / f"{name}.ipynb")
    return book


def build(book: Path) -> subprocess.CompletedProcess[str]:
    command = [TOOL, "build", book, "-W", "-n", "--keep-going", "-q"]
    return subprocess.run(command, cwd=book.parent, capture_output=True, text=True)


@pytest.fixture(scope="session")
def aids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages of a small book that has all of them."""
    book = make_book(tmp_path_factory.mktemp("aids"))
    done = build(book)
    assert done.returncode == 0, done.stderr
    return book / "_build" / "html"


@pytest.fixture
def first(aids: Path, browser: Browser) -> Page:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    page = context.new_page()
    page.goto((aids / "chapters" / "a.html").as_uri())
    yield page
    context.close()


def article(page: Path) -> str:
    text = page.read_text(encoding="utf8")
    return text[text.index("<article") : text.index("</article>")]


def links(page: Path) -> dict[str, str]:
    """Text -> address, of what an article links within the book."""
    found = re.findall(r'<a class="reference internal" href="([^"]*)">(.*?)</a>', article(page))
    return {re.sub("<[^>]*>", "", text): address for address, text in found}


def test_theorems_are_counted_by_chapter_and_linked_by_number(aids: Path):
    assert links(aids / "index.html") == {
        "Theorem 1.1": "chapters/a.html#thm-one",
        "that lemma": "chapters/b.html#lem-two",
        "A name, q*": "chapters/a.html#thm-one",
        "Exercise 1.1": "chapters/a.html#ex-a-one",
        "Theorem 1.1: A name, q*": "chapters/a.html#thm-one",
        "Definition 2.1: A word": "chapters/b.html#def-two",
        "Lemma 2.2": "chapters/b.html#lem-two",
    }
    second = article(aids / "chapters" / "b.html")
    assert "Proof of Theorem 1.1." in second
    assert links(aids / "chapters" / "b.html")["Definition 2.1"] == "#def-two"


def test_no_two_places_of_a_page_have_one_name(aids: Path):
    for page in [aids / "words.html", *(aids / "chapters").glob("?.html")]:
        names = Counter(re.findall(r'\bid="([^"]*)"', article(page)))
        assert [name for name, times in names.items() if times > 1] == [], page


WRONG = {
    "thm-none": "{prf:ref}`thm-none`",
    "ex-none": "```{solution} ex-none\nHow.\n```",
    "needs a :label:": "```{prf:lemma} No label\nHow.\n```",
    "thm-one": "```{prf:lemma} Again\n:label: thm-one\nHow.\n```",
}


@pytest.fixture(scope="session")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """The build of a book in which all of these are."""
    text = "\n\n".join(["# B", *WRONG.values()])
    return build(make_book(tmp_path_factory.mktemp("wrong"), second=text))


@pytest.mark.parametrize("said", WRONG)
def test_a_box_that_is_not_there_or_twice_fails_the_build(
    wrong: subprocess.CompletedProcess[str], said: str
):
    assert wrong.returncode != 0
    told = [line for line in wrong.stderr.splitlines() if re.search("WARNING|ERROR", line)]
    assert [line for line in told if said in line and "b.ipynb" in line], wrong.stderr


def test_a_solution_is_folded_with_its_check_and_open_on_paper(first: Page):
    solution = first.locator("details.qs-solution")
    inside = solution.get_by_text("Done.")
    assert not inside.is_visible()
    assert solution.locator(".cell_input").count() == 1
    assert first.locator("article .cell_input").count() == 2
    solution.locator("summary").click()
    assert inside.is_visible()
    first.emulate_media(media="print")
    first.reload()
    assert solution.get_attribute("open") is None
    shown = "(box) => box.checkVisibility({ contentVisibilityAuto: true }) && box.offsetHeight > 0"
    assert inside.evaluate(shown)


def test_a_word_says_what_it_means_to_pointer_and_keyboard(first: Page):
    tip = first.get_by_role("tooltip")
    link = first.get_by_role("link", name="balanced point")
    assert tip.count() == 0
    link.hover()
    said = " ".join(tip.inner_text().split())
    assert said.startswith("The point")
    assert said.endswith("of the path. It is one.")
    assert "second" not in tip.inner_text()
    assert tip.locator("a").count() == 0
    first.keyboard.press("Escape")
    assert tip.count() == 0
    first.mouse.move(0, 0)
    link.focus()
    assert tip.is_visible()
    described = link.get_attribute("aria-describedby")
    assert first.locator(f"#{described}").count() == 1
    assert first.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_finger_follows_the_link_to_the_word(aids: Path, browser: Browser):
    phone = {"width": 375, "height": 800}
    context = browser.new_context(viewport=phone, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto((aids / "chapters" / "a.html").as_uri())
    page.get_by_role("link", name="balanced point").tap()
    page.wait_for_url(re.compile(r"words\.html#term-balanced-point$"))
    context.close()


def test_only_known_words_get_a_tip():
    link = (
        '<a class="reference internal" href="w.html#term-{}"><span class="xref std std-term">'
        "w</span></a>"
    )
    page = link.format("a") + link.format("b")
    assert glossary.with_tips(page, {"term-c": "x"}) == page
    assert glossary.with_tips(page, {"term-b": "x"}).count("tooltip") == 1
    assert glossary.plain('a <a href="x">b</a>') == "a b"


def test_a_page_ends_with_what_it_cites_and_links_lead_there(aids: Path):
    page = article(aids / "chapters" / "a.html")
    assert len(re.findall("<h2[^>]*>References</h2>", page)) == 1
    assert "A measure of asymptotic efficiency" in page
    assert re.search(r'<a class="reference internal" href="#cited-chernoff1952"', page)
    assert "Leviathan" not in page
    assert ">References</h2>" not in article(aids / "chapters" / "b.html")


def test_the_index_leads_to_words_and_theorems(aids: Path):
    found = links(aids / "words.html")
    assert found["path"] == "#term-path"
    assert found["A word (Definition 2.1)"] == "chapters/b.html#def-two"
    assert "Try (Exercise 1.1)" not in found


def test_figures_tables_and_numbers_can_be_taken_away(aids: Path):
    first, second = (article(aids / "chapters" / f"{name}.html") for name in "ab")
    got = dict(re.findall(r'<a href="([^"]*)" download="([^"]*)">', first))
    assert sorted(got.values()) == ["a-x.png", "a-x.svg", "a.ipynb", "a.json"]
    files = {name: (aids / "chapters" / address).resolve() for address, name in got.items()}
    (pixel,) = imread(files["a-x.png"])[0]
    assert pixel[:3] == pytest.approx([1, 0.5, 0.5], abs=0.01)
    assert "<svg" in files["a-x.svg"].read_text()
    assert json.loads(files["a.json"].read_text()) == {}
    assert 'download="b-table-1.csv"' in second
    with (aids / "_downloads" / "b-table-1.csv").open(newline="", encoding="utf8") as file:
        assert list(csv.reader(file)) == [["head", "two, x"], ["1", "a, b"]]


def test_a_table_of_html_is_read_as_its_text():
    table = "<table><tr><th>a</th><td>1&lt;2 <b>x</b></td></tr><tr><td>\n</td></tr></table>"
    assert downloads.rows_of(table) == [["a", "1<2 x"], [""]]


@pytest.mark.parametrize("name", ["range", "training-range"])
def test_a_download_names_its_chapter_once(name: str):
    assert downloads.file_name("training", name) == "training-range"


def test_a_page_is_light_or_dark_before_its_first_line(aids: Path):
    for page in ("index.html", "chapters/a.html"):
        head = (aids / page).read_text(encoding="utf8").partition("<body")[0]
        assert light.THEME_AT_ONCE in head
        assert light.THEME_LATER not in head


def test_the_first_entry_is_open_where_its_section_is_in_sight():
    entry = (
        '<ul class="nav section-nav flex-column">\n<li class="toc-h2 nav-item toc-entry">'
        '<a class="reference internal nav-link" href="#x">x</a></li></ul>'
    )
    near, far = (f"{entry}<h1>A</h1><p>{'word ' * words}</p><h2>B</h2>" for words in (9, 900))
    assert light.light_page(near, {}, searches=True).count("active") == 2
    assert light.light_page(far, {}, searches=True) == far


def test_the_map_of_related_ideas_is_legible_on_a_phone():
    _, _, least = pages.svg_size(markup.draw("related_map"))
    assert least <= 327
