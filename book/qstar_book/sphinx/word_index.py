"""The index: words of the glossary, theorems by their names, `{index}` entries, and functions.

Sphinx's own index is no page of the book: it has no place in its contents, and lists each function
of each module.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode
from sphinx.util.typing import ExtensionMetadata

from .theorems import ProofDomain

LEFT_OUT = ("api_book", "api_records", "api_experiments")
"""The pages whose functions are the book's own, and not for readers."""


class word_index(nodes.General, nodes.Element):  # noqa: N801
    pass


class WordIndex(SphinxDirective):
    """Words and theorems; with `functions` as its argument the functions."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        return [word_index(code=self.arguments == ["functions"])]


@dataclass(frozen=True, order=True)
class Word:
    """A line of the index, in the order of the letters of its name.

    Attributes:
        letters: The name in small letters.
        name: What is shown.
        module: Of a function, where it lives.
        code: Whether it is the name of a function.
    """

    letters: str
    name: str
    module: str = ""
    code: bool = False

    @property
    def letter(self) -> str:
        return next((sign for sign in self.letters if sign.isalpha()), "").upper()


def word(name: str) -> Word:
    return Word(name.casefold(), name)


def entries(env: BuildEnvironment) -> Iterator[tuple[Word, tuple[str, str]]]:
    """What is in the index, and where it is explained: a page, and a place on it."""
    for page, listed in env.get_domain("index").entries.items():  # type: ignore[attr-defined]
        if not page.startswith("api"):
            for kind, words, place, *_ in listed:
                if kind == "single":
                    yield word(words.replace("; ", ", ")), (page, place)
    proofs: ProofDomain = env.get_domain("prf")  # type: ignore[assignment]
    for label, box in proofs.boxes.items():
        if box.name and box.kind != "exercise":
            yield word(f"{box.name} ({proofs.called(label)})"), (box.page, label)
    for full, entry in env.get_domain("py").objects.items():  # type: ignore[attr-defined]
        if entry.objtype in ("function", "class") and entry.docname not in LEFT_OUT:
            module, _, name = full.rpartition(".")
            yield Word(name.casefold(), name, module, True), (entry.docname, entry.node_id)


class _WriteIndex(SphinxPostTransform):
    default_priority = 5

    def run(self, **kwargs: object) -> None:
        for node in list(self.document.findall(word_index)):
            node.replace_self(list(self._letters(code=node["code"])))

    def _letters(self, *, code: bool) -> Iterator[nodes.Node]:
        places: dict[Word, list[tuple[str, str]]] = defaultdict(list)
        for one, place in entries(self.env):
            if one.code == code and place not in places[one]:
                places[one].append(place)
        words_in_order = sorted(places, key=lambda one: (one.letter, one))
        for letter, words in itertools.groupby(words_in_order, key=lambda one: one.letter):
            yield nodes.rubric("", letter, classes=["qs-letter"])
            lines = (nodes.list_item("", self._line(one, places[one])) for one in words)
            yield nodes.bullet_list("", *lines, classes=["qs-index"])

    def _line(self, one: Word, places: list[tuple[str, str]]) -> nodes.paragraph:
        line = nodes.paragraph()
        for number, (page, place) in enumerate(places, 1):
            shown = nodes.inline("", str(number))
            if number == 1:
                shown = (nodes.literal if one.code else nodes.inline)("", one.name)
            else:
                line += nodes.Text(", ")
            line += make_refnode(self.app.builder, self.env.docname, page, place, shown)
        if one.module:
            line += nodes.Text(f" ({one.module})")
        return line


def setup(app: Sphinx) -> ExtensionMetadata:
    app.add_node(word_index)
    app.add_directive("word-index", WordIndex)
    app.add_post_transform(_WriteIndex)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
