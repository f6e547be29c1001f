"""What the HTML of a page breaks: errors of the parser, and rules of what may stand in what."""

import re
from collections import Counter
from collections.abc import Iterator
from xml.etree.ElementTree import Element

import html5lib


def _tags(names: str) -> frozenset[str]:
    return frozenset(re.split(" ", names))


BLOCKS = _tags(
    "address article aside blockquote details dialog div dl fieldset figcaption figure footer form "
    "h1 h2 h3 h4 h5 h6 header hr main nav ol p pre section table ul"
)
OF_PHRASES = _tags("abbr b button code em h1 h2 h3 h4 h5 h6 i label p span strong")
"""What holds text and no block."""

OPERATED = _tags("a button details input label select summary textarea")
CHILDREN: dict[str, frozenset[str]] = {
    "dl": _tags("dt dd div script template"),
    "ol": _tags("li script template"),
    "ul": _tags("li script template"),
}
THEME = frozenset(
    {
        "p in summary",  # of a hidden cell, by MyST-NB
    }
)
"""Faults of the theme, which the book lives with."""


def html_faults(page: str) -> set[str]:
    """Everything that is not HTML, but for what the theme brings."""
    parser = html5lib.HTMLParser(namespaceHTMLElements=False)
    tree = parser.parse(page)
    found = {f"{code}, line {line}" for (line, _), code, _ in parser.errors}
    places = Counter(box.get("id") for box in tree.iter() if box.get("id") is not None)
    found |= {f"{times} places named {name!r}" for name, times in places.items() if times > 1}
    for name in places:
        if not name or re.search(r"\s", str(name)):
            found.add(f"a place named {name!r}")
    if any(box.tag == "style" for body in tree.iter("body") for box in body.iter()):
        found.add("style in body")
    for box in tree.iter():
        if isinstance(box.tag, str):
            found |= set(_misplaced(box))
    return found - THEME


def _misplaced(box: Element) -> Iterator[str]:
    children = [child.tag for child in box if isinstance(child.tag, str)]
    allowed = CHILDREN.get(box.tag)
    if allowed is not None:
        yield from (f"{tag} in {box.tag}" for tag in children if tag not in allowed)
    if box.tag == "details" and children[:1] != ["summary"]:
        yield "details without a summary"
    inside = [child.tag for child in box.iter() if child is not box and isinstance(child.tag, str)]
    if box.tag in OF_PHRASES:
        yield from (f"{tag} in {box.tag}" for tag in inside if tag in BLOCKS)
    if box.tag == "summary":
        yield from (f"{tag} in summary" for tag in inside if tag in BLOCKS - {"h2", "h3", "h4"})
    if box.tag in {"a", "button", "summary"}:
        yield from (f"{tag} in {box.tag}" for tag in inside if tag in OPERATED)
    if box.tag == "img" and (box.get("alt") is None or not box.get("src")):
        yield "img without alt or src"
