"""What a word means, shown where one rests on it: by pointer or by keyboard.

Each link of the role `{term}` gets the first sentence or two of its entry in the glossary, hidden
until it is needed. On a screen without a pointer the link leads to the glossary, as it does
everywhere when it is followed.
"""

import html
import itertools
import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.builders.html import StandaloneHTMLBuilder
from sphinx.util.typing import ExtensionMetadata

LINK = re.compile(
    r'<a class="reference internal" href="[^"]*#(?P<term>term-[^"]+)">'
    r'<span class="xref std std-term">.*?</span></a>',
    re.DOTALL,
)


def plain(markup: str) -> str:
    """HTML without its links: what is shown within a link's tip leads nowhere."""
    return re.sub(r"</?a\b[^>]*>", "", markup).strip()


def meanings(builder: StandaloneHTMLBuilder, page: str) -> dict[str, str]:
    """Of each entry of a page's glossary, by its place: the first paragraph, as HTML."""
    document = builder.env.get_and_resolve_doctree(page, builder)
    found: dict[str, str] = {}
    for item in document.findall(nodes.definition_list_item):
        terms = [place for term in item.findall(nodes.term) for place in term["ids"]]
        first = next(item.findall(nodes.paragraph), None)
        if first is not None and any(place.startswith("term-") for place in terms):
            shown = builder.render_partial(first)["fragment"].strip()
            text = plain(re.sub(r"^<p\b[^>]*>|</p>$", "", shown))
            found |= dict.fromkeys(terms, text)
    return found


def with_tips(body: str, known: dict[str, str]) -> str:
    """The page with what each linked word means behind it."""
    numbers = itertools.count(1)

    def tip(link: re.Match[str]) -> str:
        meaning = known.get(html.unescape(link["term"]))
        if not meaning:
            return link[0]
        name = f"tip-{next(numbers)}"
        described = link[0].replace("<a ", f'<a aria-describedby="{name}" ', 1)
        return (
            f'<span class="qs-word">{described}'
            f'<span class="qs-tip" role="tooltip" id="{name}">{meaning}</span></span>'
        )

    return LINK.sub(tip, body)


def _show_meanings(
    app: Sphinx, pagename: str, templatename: str, context: dict, doctree: nodes.document | None
) -> None:
    body = context.get("body", "")
    if not doctree or "std-term" not in body or not isinstance(app.builder, StandaloneHTMLBuilder):
        return
    objects = app.env.get_domain("std").get_objects()
    pages = {page for _, _, kind, page, _, _ in objects if kind == "term"}
    known: dict[str, str] = {}
    for page in sorted(pages):
        cache = app.env.temp_data.setdefault("qstar-meanings", {})
        if page not in cache:
            cache[page] = meanings(app.builder, page)
        known |= cache[page]
    if pagename not in pages:  # on its own page the whole entry is in sight
        context["body"] = with_tips(body, known)


def setup(app: Sphinx) -> ExtensionMetadata:
    app.connect("html-page-context", _show_meanings, priority=700)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
