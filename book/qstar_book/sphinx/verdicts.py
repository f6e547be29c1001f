"""The claims register as a page, and links between its rows and the cells that decide them.

`data/claims.yaml` says what the source claims; what is shown as its verdict is what the executed
chapter glued. Where the two differ the build warns, and so fails.
"""

import functools
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import nbformat
from docutils import nodes
from myst_nb.ext.glue.roles import PasteTextRole
from sphinx.application import Sphinx
from sphinx.locale import get_translation
from sphinx.transforms import SphinxTransform
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

from qstar_book.claims import PREFIX, VERDICTS, Claim, Decision, read_claims, read_decisions
from qstar_book.sphinx.edition import CATALOG, is_translation
from qstar_book.sphinx.pages import without_tex

PAGE = "claims"
_ = get_translation(CATALOG)
MEANINGS = {
    "confirmed": _("True as stated; of a question, answered here by a computed check."),
    "corrected": _("The quantity is right, its value is not: here is the right one."),
    "refuted": _("A computed counterexample stands in the chapter."),
    "qualified": _("True under conditions the source does not state; a question answered in part."),
    "not measured": _("Nothing here decides it; the row says what would."),
}
WORDS = {
    "confirmed": _("confirmed"),
    "corrected": _("corrected"),
    "refuted": _("refuted"),
    "qualified": _("qualified"),
    "not measured": _("not measured"),
    "statement": _("statement"),
    "number": _("number"),
    "formula": _("formula"),
    "algorithm": _("algorithm"),
    "figure": _("figure"),
    "future direction": _("future direction"),
}
"""Verdicts and kinds as the language of the book says them."""
MARKUP = re.compile(r"\$\$(?P<block>.+?)\$\$|\$(?P<math>.+?)\$|`(?P<code>.+?)`", re.DOTALL)


@functools.lru_cache
def _register(book: Path) -> tuple[tuple[Claim, ...], dict[str, Decision]]:
    """The claims, and what the chapters of this build decided."""
    _, claims = read_claims(book.parent / "data" / "claims.yaml")
    return claims, read_decisions(book / "chapters")


class ClaimsRegister(SphinxDirective):
    """One row per claim, in the order of the source."""

    def run(self) -> list[nodes.Node]:
        claims, decisions = _register(Path(self.env.srcdir))
        body = nodes.tbody()
        for claim in sorted(claims, key=lambda claim: claim.lines[0]):
            decision = decisions.get(claim.id)
            verdict = decision.verdict if decision else "undecided"
            if verdict != claim.verdict:
                self.state.document.reporter.warning(
                    f"claim {claim.id}: the register says {claim.verdict}, its chapter {verdict}",
                    line=self.lineno,
                )
            body += self._row(claim, verdict)
        heads = (_("The source says"), _("Verdict"), _("What holds, and where"))
        head = nodes.thead("", nodes.row("", *(_entry(nodes.Text(str(text))) for text in heads)))
        columns = [nodes.colspec(colwidth=width) for width in (35, 20, 45)]
        group = nodes.tgroup("", *columns, head, body, cols=3)
        table = nodes.table("", group, classes=["qs-claims", "qs-register", "colwidths-given"])
        self.set_source_info(table)
        return [table]

    def _row(self, claim: Claim, verdict: str) -> nodes.row:
        said = nodes.paragraph("", "", *_as_written(claim), classes=["qs-original"])
        original: list[nodes.Node] = [said]
        if not is_translation(self.config):  # whose readers read the source itself
            original.append(self._paragraph(claim.english, "qs-english"))
        kind = nodes.paragraph("", WORDS[claim.kind], classes=["qs-kind"])
        lines = ", ".join(map(str, claim.lines))
        words = _("lines {} of the source") if len(claim.lines) > 1 else _("line {} of the source")
        where = nodes.paragraph("", "", classes=["qs-where"])
        where += nodes.inline("", "", claim_cell=(claim.notebook, claim.cell))
        where += nodes.Text(f" · {words.format(lines)}")
        return nodes.row(
            "",
            nodes.entry("", *original),
            nodes.entry("", nodes.paragraph("", "", badge(verdict)), kind),
            nodes.entry("", self._paragraph(claim.statement), where),
            ids=[claim.key],
            classes=[
                f"of-verdict-{nodes.make_id(verdict)}",
                f"of-kind-{nodes.make_id(claim.kind)}",
                f"of-chapter-{claim.notebook.replace('_', '-')}",
            ],
        )

    def _paragraph(self, text: str, *classes: str) -> nodes.paragraph:
        inline, messages = self.state.inline_text(text, self.lineno)
        paragraph = nodes.paragraph(text, "", *inline, *messages, classes=list(classes))
        self.set_source_info(paragraph)
        paragraph["translatable"] = "qs-english" not in classes
        return paragraph


class ClaimsCount(SphinxDirective):
    """How many claims met each verdict, counted in the executed chapters."""

    def run(self) -> list[nodes.Node]:
        claims, decisions = _register(Path(self.env.srcdir))
        counts = Counter(decisions[claim.id].verdict for claim in claims if claim.id in decisions)
        items = []
        for verdict in VERDICTS:
            number = nodes.strong("", str(counts[verdict]), classes=["qs-number"])
            link = nodes.inline(
                "", "", badge(verdict), claim_row=f"verdict-{nodes.make_id(verdict)}"
            )
            items.append(
                nodes.list_item("", nodes.paragraph("", "", number, nodes.Text(" "), link))
            )
        return [nodes.bullet_list("", *items, classes=["qs-counts"])]


class ClaimsLegend(SphinxDirective):
    """What each verdict means; links that count verdicts lead here, and set the filter."""

    def run(self) -> list[nodes.Node]:
        items = [
            nodes.definition_list_item(
                "",
                nodes.term("", "", badge(verdict), ids=[_legend_id(verdict)]),
                nodes.definition("", nodes.paragraph("", str(meaning))),
            )
            for verdict, meaning in MEANINGS.items()
        ]
        return [nodes.definition_list("", *items, classes=["qs-legend"])]


def badge(verdict: str) -> nodes.inline:
    """A verdict as the book shows it."""
    words = str(WORDS.get(verdict, verdict))
    return nodes.inline("", words, classes=["verdict", f"verdict-{nodes.make_id(verdict)}"])


def _entry(*children: nodes.Node) -> nodes.entry:
    return nodes.entry("", nodes.paragraph("", "", *children))


def _as_written(claim: Claim) -> list[nodes.Node]:
    """The source's words, its mathematics set and its other markup taken off."""
    text = claim.original.strip("#*| \n").replace("**", "")
    if claim.kind == "formula" and "$" not in text:
        return [nodes.math("", text)]
    found: list[nodes.Node] = []
    end = 0
    for part in MARKUP.finditer(text):
        found.append(nodes.Text(text[end : part.start()]))
        formula = part["block"] or part["math"]
        found.append(nodes.math("", formula) if formula else nodes.literal("", part["code"]))
        end = part.end()
    found.append(nodes.Text(text[end:].replace(" | ", " · ")))
    return [node for node in found if node.astext()]


class _ClaimText(PasteTextRole):
    """`{glue:text}`: a claim's verdict leads to its row of the register."""

    text: str

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        if "::" not in self.text and "nb_renderer" not in self.document:
            # A translated paragraph is parsed by itself, away from its chapter.
            env = self.document.settings.env
            typed = "" if ":" in self.text else ":s"
            self.text = f"/{env.doc2path(env.docname, base=False)}::{self.text}{typed}"
        pasted, messages = super().run()
        key = self.text.rpartition("::")[2].partition(":")[0]
        if key.startswith(PREFIX) and pasted:
            pasted = [nodes.inline("", "", *pasted, claim_row=key)]
        return pasted, messages


class _CellsThatDecide(SphinxTransform):
    """Above each deciding cell of a chapter: which claims it decides, with links to their rows."""

    default_priority = 400

    def apply(self, **kwargs: object) -> None:
        file = Path(self.env.doc2path(self.env.docname))
        if file.suffix != ".ipynb" or PAGE not in self.env.found_docs:
            return
        claims, _decisions = _register(Path(self.env.srcdir))
        decided: dict[str, list[Claim]] = {}
        for claim in claims:
            if claim.notebook == file.stem:
                decided.setdefault(claim.cell, []).append(claim)
        if not decided:
            return
        ids = [cell.get("id") for cell in nbformat.read(file, as_version=4).cells]
        for cell in list(self.document.findall(nodes.container)):
            if cell.get("nb_element") != "cell_code" or ids[cell["cell_index"]] not in decided:
                continue
            name = ids[cell["cell_index"]]
            line = nodes.paragraph(
                "", _("Decides:") + " ", ids=[_anchor(name)], classes=["qs-decides"]
            )
            for claim in decided[name]:
                line += nodes.inline("", "", nodes.literal("", claim.id), claim_row=claim.key)
                line += nodes.Text(" ")
            cell.parent.insert(cell.parent.index(cell), line)


def _legend_id(verdict: str) -> str:
    return f"verdict-{nodes.make_id(verdict)}"


def _anchor(cell: str) -> str:
    return nodes.make_id(f"decides-{cell}")


class _LinksOfClaims(SphinxPostTransform):
    """Turn what the classes above marked into links, once the addresses of pages are known."""

    default_priority = 7

    def run(self, **kwargs: object) -> None:
        if PAGE not in self.env.found_docs:  # nowhere to lead to
            return
        claims, _decisions = _register(Path(self.env.srcdir))
        known = {claim.key for claim in claims} | {_legend_id(verdict) for verdict in VERDICTS}
        for node in list(self.document.findall(nodes.inline)):
            if row := node.get("claim_row"):
                if row in known:
                    self._link(node, PAGE, row, node.children, "claim-link")
            elif place := node.get("claim_cell"):
                notebook, cell = place
                page = f"chapters/{notebook}"
                title = self.env.titles[page].astext() if page in self.env.titles else page
                self._link(node, page, _anchor(cell), [nodes.Text(without_tex(title))], "cell-link")

    def _link(
        self, node: nodes.Node, page: str, anchor: str, children: Sequence[nodes.Node], name: str
    ) -> None:
        uri = self.app.builder.get_relative_uri(self.env.docname, page)
        uri = "" if page == self.env.docname else uri
        node.replace_self(
            nodes.reference(
                "", "", *children, internal=True, refuri=f"{uri}#{anchor}", classes=[name]
            )
        )


def _use_our_role(app: Sphinx) -> None:
    app.add_role_to_domain("glue", "text", _ClaimText(), override=True)
    app.env.get_domain("glue").roles["text"] = _ClaimText()  # one that was read has its roles


def setup(app: Sphinx) -> ExtensionMetadata:
    _register.cache_clear()
    app.add_directive("claims-register", ClaimsRegister)
    app.add_directive("claims-count", ClaimsCount)
    app.add_directive("claims-legend", ClaimsLegend)
    app.add_transform(_CellsThatDecide)
    app.add_post_transform(_LinksOfClaims)
    app.connect("builder-inited", _use_our_role)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
