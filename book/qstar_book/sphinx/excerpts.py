"""What a page shows of elsewhere: an executed cell of a chapter."""

from pathlib import Path

import nbformat
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


def setup(app: Sphinx) -> ExtensionMetadata:
    app.add_directive("executed-cell", ExecutedCell)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
