"""At the end of each page: the works that it cites, from the one bibliography of the book."""

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.locale import get_translation
from sphinx.util.typing import ExtensionMetadata
from sphinxcontrib.bibtex.domain import BibtexDomain
from sphinxcontrib.bibtex.transforms import node_text_transform

from .edition import CATALOG

_ = get_translation(CATALOG)


def _list_what_is_cited(app: Sphinx, document: nodes.document, page: str) -> None:
    domain: BibtexDomain = app.env.get_domain("cite")  # type: ignore[assignment]
    refs = [ref for ref in domain.citation_refs if ref.docname == page]
    keys = {target.key for ref in refs for target in ref.targets}
    if not keys or any(bibliography.docname == page for bibliography in domain.bibliographies):
        return
    listed = nodes.bullet_list(classes=["qs-cited"])
    places = {}
    for work in domain.citations:
        if work.key in keys:
            said = domain.backend.paragraph(work.formatted_entry)
            item = nodes.list_item("", said, ids=[f"cited-{nodes.make_id(work.key)}"])
            node_text_transform(item)
            listed += item
            there = app.builder.get_relative_uri(page, work.bibliography_key.docname)
            places[f"{there}#{work.citation_id}"] = item["ids"][0]
    # A section would be given the number of the chapter.
    words = _("References")
    title = nodes.raw("", f'<h2 id="references">{words}</h2>', format="html")
    for link in document.findall(nodes.reference):  # they lead to the list on this page
        if place := places.get(link.get("refuri", "")):
            del link["refuri"]
            link["refid"] = place
    top = next(iter(document.findall(nodes.section)), None)
    if top is not None and listed.children:
        top += [title, listed]


def setup(app: Sphinx) -> ExtensionMetadata:
    app.connect("doctree-resolved", _list_what_is_cited)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
