"""Theorems, proofs, exercises and their solutions, in the syntax of sphinx-proof and -exercise.

They are counted by chapter and have an address; a solution is folded without a script. Written here
because those packages give all boxes of a page one `id`, which is no HTML, and bring styles and
scripts that no page needs.

    ```{prf:theorem} Mirrored variance
    :label: thm-mirrored-variance
    What holds.
    ```
    ```{prf:proof}
    Why.
    ```
    ```{prf:proof} thm-mirrored-variance
    The same, further below: it says of what.
    ```
    By {prf:ref}`thm-mirrored-variance` ...

    ```{exercise} A short title
    :label: ex-symmetry-pair
    What to do.
    ```
    ```{solution} ex-symmetry-pair
    How.
    ```

A code cell with the tag `solution`, right after a solution, is folded into it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.builders import Builder
from sphinx.domains import Domain
from sphinx.domains.std import StandardDomain
from sphinx.environment import BuildEnvironment
from sphinx.locale import _ as words
from sphinx.locale import get_translation
from sphinx.roles import XRefRole
from sphinx.transforms import SphinxTransform
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode
from sphinx.util.typing import ExtensionMetadata
from sphinx.writers.html5 import HTML5Translator

from .edition import CATALOG
from .pages import plain_text

_ = get_translation(CATALOG)
KINDS = {
    "theorem": _("Theorem"),
    "lemma": _("Lemma"),
    "proposition": _("Proposition"),
    "corollary": _("Corollary"),
    "definition": _("Definition"),
    "example": _("Example"),
    "remark": _("Remark"),
}
"""What shares one count: after Lemma 3.1 comes Theorem 3.2."""


class theorem(nodes.Part, nodes.Element):  # noqa: N801
    """A box that is counted; its first child is its title."""


class exercise(nodes.Part, nodes.Element):  # noqa: N801
    """The same, with a count of its own."""


class box_title(nodes.Part, nodes.TextElement):  # noqa: N801
    """The name of a box, which comes after its number."""


class proof(nodes.Part, nodes.Element):  # noqa: N801
    pass


class solution(nodes.Part, nodes.Element):  # noqa: N801
    """What is folded; `of` is the label of its exercise."""


class theorem_list(nodes.General, nodes.Element):  # noqa: N801
    pass


@dataclass(frozen=True)
class Entry:
    """Where a box stands, and what it is called."""

    page: str
    kind: str
    name: str

    @property
    def figtype(self) -> str:
        return "exercise" if self.kind == "exercise" else "theorem"

    @property
    def word(self) -> str:
        return str(_("Exercise") if self.kind == "exercise" else KINDS[self.kind])


class _Box(SphinxDirective):
    has_content = True
    optional_arguments = 1
    final_argument_whitespace = True
    option_spec = {  # noqa: RUF012
        "label": directives.unchanged_required,
        "class": directives.class_option,
    }

    def title(self) -> nodes.TextElement:
        text = self.arguments[0] if self.arguments else ""
        parsed, said = self.state.inline_text(text, self.lineno)
        title = box_title(text, "", *parsed, *said)
        self.set_source_info(title)
        return title

    def fill(self, box: nodes.Element, kind: str) -> list[nodes.Node]:
        box["classes"] += self.options.get("class", [])
        self.set_source_info(box)
        self.state.nested_parse(self.content, self.content_offset, box)
        if not self.content:
            raise self.error(f"a {kind} that says nothing")
        return [box]


class CountedDirective(_Box):
    def run(self) -> list[nodes.Node]:
        kind = self.name.removeprefix("prf:")
        label = self.options.get("label")
        if not label:
            raise self.error(f"a {kind} needs a :label:, by which it is linked")
        node = (exercise if kind == "exercise" else theorem)("", self.title(), kind=kind)
        node["ids"] = [label]
        self.env.get_domain("prf").note(label, kind, node)  # type: ignore[attr-defined]
        self.state.document.note_explicit_target(node)
        return self.fill(node, kind)


class ProofDirective(_Box):
    """Of what stands before it, or of the label that is its argument."""

    final_argument_whitespace = False

    def run(self) -> list[nodes.Node]:
        of = self.arguments[0] if self.arguments else ""
        return self.fill(proof("", of=of), "proof")


class SolutionDirective(_Box):
    required_arguments = 1
    optional_arguments = 0
    final_argument_whitespace = False

    def run(self) -> list[nodes.Node]:
        return self.fill(solution("", of=self.arguments[0]), "solution")


class TheoremListDirective(SphinxDirective):
    """All theorems, lemmas and their like, chapter by chapter."""

    def run(self) -> list[nodes.Node]:
        return [theorem_list()]


class ProofDomain(Domain):
    """What sphinx-proof calls by this name: `{prf:theorem}`, `{prf:proof}`, `{prf:ref}`."""

    name = "prf"
    label = "Theorems"
    roles = {"ref": XRefRole(innernodeclass=nodes.inline)}  # noqa: RUF012
    directives = {**dict.fromkeys(KINDS, CountedDirective), "proof": ProofDirective}  # noqa: RUF012
    initial_data = {"boxes": {}}  # noqa: RUF012
    data_version = 1

    @property
    def boxes(self) -> dict[str, Entry]:
        """Label -> its box."""
        found: dict[str, Entry] = self.data["boxes"]
        return found

    def note(self, label: str, kind: str, node: nodes.Element) -> None:
        if label in self.boxes:
            other = self.boxes[label].page
            logging.getLogger(__name__).warning(
                f"two boxes are labelled {label!r}, the other in {other}", location=node
            )
        self.boxes[label] = Entry(self.env.docname, kind, "")

    def clear_doc(self, docname: str) -> None:
        for label in [one for one, entry in self.boxes.items() if entry.page == docname]:
            del self.boxes[label]

    def merge_domaindata(self, docnames: set[str], otherdata: dict[str, Any]) -> None:  # type: ignore[override]
        self.boxes.update(
            {n: entry for n, entry in otherdata["boxes"].items() if entry.page in docnames}
        )

    def called(self, label: str) -> str:
        """Such as: Theorem 3.2."""
        entry = self.boxes[label]
        counts = self.env.toc_fignumbers.get(entry.page, {}).get(entry.figtype, {})
        number = ".".join(map(str, counts.get(label, ())))
        return f"{entry.word} {number}".strip()

    def get_enumerable_node_type(self, node: nodes.Node) -> str | None:
        if isinstance(node, theorem):
            return "theorem"
        return "exercise" if isinstance(node, exercise) else None

    def resolve_xref(
        self,
        env: BuildEnvironment,
        fromdocname: str,
        builder: Builder,
        typ: str,
        target: str,
        node: pending_xref,
        contnode: nodes.Element,
    ) -> nodes.reference | None:
        if target not in self.boxes:
            return None
        text = contnode if node["refexplicit"] else nodes.inline("", self.called(target))
        return make_refnode(builder, fromdocname, self.boxes[target].page, target, text)

    def resolve_any_xref(self, *_: object) -> list[tuple[str, nodes.reference]]:  # type: ignore[override]
        return []


class _FoldCells(SphinxTransform):
    """The code cells with the tag `solution` go into the solution before them."""

    default_priority = 400

    def apply(self, **kwargs: object) -> None:
        for node in list(self.document.findall(solution)):
            while (after := _next(node)) is not None and "tag_solution" in after["classes"]:
                after.parent.remove(after)
                node += after


def _next(node: nodes.Element) -> nodes.Element | None:
    at = node.parent.index(node) + 1
    after = node.parent[at] if at < len(node.parent) else None
    return after if isinstance(after, nodes.Element) else None


class _ListTheorems(SphinxPostTransform):
    """Chapters in the order of the book, and in each what it proves in the order of its numbers."""

    default_priority = 5

    def run(self, **kwargs: object) -> None:
        for node in list(self.document.findall(theorem_list)):
            node.replace_self(list(self._chapters()))

    def _chapters(self) -> Iterator[nodes.Node]:
        domain: ProofDomain = self.env.get_domain("prf")  # type: ignore[assignment]
        numbered: dict[tuple[int, ...], tuple[str, Entry]] = {}
        for label, entry in domain.boxes.items():
            if entry.figtype == "theorem":
                counts = self.env.toc_fignumbers.get(entry.page, {}).get("theorem", {})
                numbered[counts.get(label, ())] = label, entry
        listed = nodes.bullet_list(classes=["qs-theorems"])
        for _number, (label, entry) in sorted(numbered.items()):
            called = domain.called(label) + (f": {entry.name}" if entry.name else "")
            link = make_refnode(
                self.app.builder, self.env.docname, entry.page, label, nodes.inline("", called)
            )
            listed += nodes.list_item("", nodes.paragraph("", "", link))
        if listed.children:
            yield listed


def _note_names(app: Sphinx, document: nodes.document) -> None:
    """What a box is called, in the language of the page; by `{ref}` it is linked with its name."""
    std: StandardDomain = app.env.get_domain("std")  # type: ignore[assignment]
    domain: ProofDomain = app.env.get_domain("prf")  # type: ignore[assignment]
    for node in document.findall(lambda one: isinstance(one, theorem | exercise)):
        label, name = node["ids"][0], plain_text(node[0])
        domain.boxes[label] = replace(domain.boxes[label], name=name)
        std.anonlabels[label] = app.env.docname, label
        if name:
            std.labels[label] = app.env.docname, label, name


def _called(translator: HTML5Translator, node: nodes.Element, label: str) -> str:
    domain: ProofDomain = translator.builder.env.get_domain("prf")  # type: ignore[assignment]
    if label in domain.boxes:
        return domain.called(label)
    logging.getLogger(__name__).warning(f"no box is labelled {label!r}", location=node)
    return label


def _visit_counted(translator: HTML5Translator, node: nodes.Element) -> None:
    kind = node["kind"]
    translator.body.append(translator.starttag(node, "div", CLASS=f"qs-box qs-{kind}"))


def _visit_title(translator: HTML5Translator, node: nodes.Element) -> None:
    called = _called(translator, node.parent, node.parent["ids"][0])
    translator.body.append('<p class="qs-box-title">')
    translator.body.append(f'<span class="caption-number">{translator.encode(called)}</span> ')


def _depart_title(translator: HTML5Translator, node: nodes.Element) -> None:
    translator.add_permalink_ref(node.parent, str(words("Link to this")))
    translator.body.append("</p>\n")


def _visit_proof(translator: HTML5Translator, node: nodes.Element) -> None:
    translator.body.append(translator.starttag(node, "div", CLASS="qs-proof"))
    said = str(_("Proof"))
    if node["of"]:
        said = str(_("Proof of %s")) % _called(translator, node, node["of"])
    translator.body.append(f'<p class="qs-proof-title">{translator.encode(said)}.</p>')


def _close_div(translator: HTML5Translator, node: nodes.Element) -> None:
    translator.body.append("</div>\n")


def _visit_solution(translator: HTML5Translator, node: nodes.Element) -> None:
    said = str(_("Solution of %s")) % _called(translator, node, node["of"])
    node["ids"] = [f"solution-{node['of']}"]
    translator.body.append(translator.starttag(node, "details", CLASS="qs-solution"))
    translator.body.append(f"<summary>{translator.encode(said)}</summary>\n")


def _depart_solution(translator: HTML5Translator, node: nodes.Element) -> None:
    translator.body.append("</details>\n")


def setup(app: Sphinx) -> ExtensionMetadata:
    app.add_domain(ProofDomain)
    app.add_node(theorem, html=(_visit_counted, _close_div))
    app.add_node(exercise, html=(_visit_counted, _close_div))
    app.add_node(box_title, html=(_visit_title, _depart_title))
    app.add_node(proof, html=(_visit_proof, _close_div))
    app.add_node(solution, html=(_visit_solution, _depart_solution))
    app.add_node(theorem_list)
    app.add_directive("exercise", CountedDirective)
    app.add_directive("solution", SolutionDirective)
    app.add_directive("theorem-list", TheoremListDirective)
    app.add_transform(_FoldCells)
    app.add_post_transform(_ListTheorems)
    app.connect("doctree-read", _note_names)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
