"""What a page shows of elsewhere: an executed cell of a chapter, and how to cite the book."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
import yaml
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata


class ExecutedCell(SphinxDirective):
    """The cell of this id, as the chapter was executed.

    ```{executed-cell} chapters/your_two_models.ipynb::five-lines
    ```
    """

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        chapter, _, name = self.arguments[0].partition("::")
        file = Path(self.env.srcdir) / chapter
        self.env.note_dependency(str(file))
        if not file.exists():
            raise self.error(f"{chapter} has not been executed: run `qstar-book run`")
        cells = [c for c in nbformat.read(file, as_version=4).cells if c.get("id") == name]
        if not cells or cells[0].cell_type != "code":
            raise self.error(f"{chapter} has no code cell {name!r}")
        printed = "".join(
            output.text
            for output in cells[0].outputs
            if output.output_type == "stream" and output.name == "stdout"
        )
        if not printed:
            raise self.error(f"cell {name!r} of {chapter} printed nothing")
        parts = (("cell_input", cells[0].source, "python"), ("cell_output", printed, "none"))
        shown = [
            nodes.container("", nodes.literal_block(text, text, language=language), classes=[part])
            for part, text, language in parts
        ]
        return [nodes.container("", *shown, classes=["cell", "qs-excerpt"])]


def bibtex(citation: Mapping[str, Any]) -> str:
    """A CITATION.cff as an entry of BibTeX."""
    fields = {
        "author": " and ".join(f"{{{author['name']}}}" for author in citation["authors"]),
        "title": citation["title"],
        "note": f"Version {citation['version']}",
        "url": citation.get("repository-code", citation.get("url")),
    }
    said = [f"  {name:6} = {{{value}}}" for name, value in fields.items() if value]
    return "@misc{qstar,\n" + ",\n".join(said) + "\n}"


class CitationBibtex(SphinxDirective):
    """The entry of BibTeX that `CITATION.cff` makes."""

    def run(self) -> list[nodes.Node]:
        file = Path(self.env.srcdir).parent / "CITATION.cff"
        self.env.note_dependency(str(file))
        entry = bibtex(yaml.safe_load(file.read_text(encoding="utf8")))
        return [nodes.literal_block(entry, entry, language="bibtex")]


def setup(app: Sphinx) -> ExtensionMetadata:
    app.add_directive("citation-bibtex", CitationBibtex)
    app.add_directive("executed-cell", ExecutedCell)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
