"""The book on paper: all pages in one file, each place and link still what it was."""

import shutil
from pathlib import Path

import pytest
from pypdf import PdfReader

from qstar_book import pdf
from qstar_book.files import RefusedError

HEAD = '<head><title>A book</title><link rel="stylesheet" href="_static/a.css"></head>'


def page(body: str) -> str:
    return f'<html>{HEAD}<body><article class="bd-article">{body}</article>after</body></html>'


FIRST = page(
    '<h1 id="one">One<a class="headerlink" href="#one">#</a></h1><a href="sub/two.html#place">t</a>'
)
SECOND = page(
    '<h1 id="two">Two<a class="headerlink" href="#two">#</a></h1><p id="place">A number: 0.3817</p>'
    '<img loading="lazy" src="../_images/a.svg"><a href="../index.html">up</a>'
    '<a href="https://elsewhere.example/#x">out</a><a href="../claims.json">data</a>'
)
CONTENTS = {"root": "index", "parts": [{"chapters": [{"file": "sub/two", "sections": []}]}]}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "index.html").write_text(FIRST)
    (tmp_path / "sub" / "two.html").write_text(SECOND)
    return tmp_path


def test_pages_come_in_the_order_of_the_contents():
    nested = {"root": "r", "chapters": [{"file": "a", "sections": [{"file": "b"}]}, {"file": "c"}]}
    assert pdf.pages_of(nested) == ["r", "a", "b", "c"]


def test_links_between_pages_lead_to_places_in_the_one_file(site: Path):
    whole = pdf.one_page(site, pdf.pages_of(CONTENTS))
    assert 'href="#sub-two--place"' in whole
    assert 'id="sub-two--place"' in whole
    assert 'href="#index--"' in whole
    assert 'src="_images/a.svg"' in whole
    assert 'href="claims.json"' in whole
    assert 'href="https://elsewhere.example/#x"' in whole
    assert "lazy" not in whole
    assert "after" not in whole
    assert '<li><a href="#index--">One</a></li><li><a href="#sub-two--">Two</a></li>' in whole


def test_a_file_that_is_no_page_of_the_book_is_refused(site: Path):
    (site / "index.html").write_text("<html></html>")
    with pytest.raises(RefusedError, match="no article"):
        pdf.article("index", "<html></html>", ["index"])


def test_without_a_browser_the_command_says_what_to_install(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(RefusedError, match="chromium"):
        pdf.print_page(tmp_path / "a.html", tmp_path / "a.pdf")


@pytest.mark.skipif(not any(map(shutil.which, pdf.BROWSERS)), reason="no browser installed")
def test_each_page_of_the_book_is_in_the_pdf_with_its_numbers(site: Path):
    whole, out = site / "_book.html", site / "book.pdf"
    whole.write_text(pdf.one_page(site, pdf.pages_of(CONTENTS)))
    pdf.print_page(whole, out)
    reader = PdfReader(out)
    texts = [one.extract_text() for one in reader.pages]
    assert pdf.count_pages(out.read_bytes()) == len(texts) == 3  # the cover, and each page
    assert "0.3817" in texts[2]
    titles = [entry.title for entry in reader.outline if not isinstance(entry, list)]
    assert any("Two" in title for title in titles)
    assert not any("after" in text for text in texts)
