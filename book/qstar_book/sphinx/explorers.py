"""Explorers in a page, by one directive, and their scripts on the pages that have one.

    :::{explorer} gaussians
    :::

Without scripts the reader sees the explorer's picture instead.
"""

import html
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

from qstar_book.sphinx.explorer_data import EXPLORERS

ALL = re.compile(r"(^|/)_static/(qstar-core|explorer)\b[^/]*\.(js|css)")


class ExplorerDirective(SphinxDirective):
    """An explorer, with its data and, for readers without scripts, its picture."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        if name not in EXPLORERS:
            raise self.error(f"no explorer {name!r}: expected one of {', '.join(EXPLORERS)}")
        explorer = EXPLORERS[name]
        try:
            data = explorer.data(Path(self.env.srcdir).parent)
        except (OSError, ValueError) as error:
            raise self.error(f"explorer {name}: {error}") from error
        folder = Path(self.env.app.outdir) / self.env.app.builder.imagedir
        folder.mkdir(parents=True, exist_ok=True)
        picture = folder / f"explorer-{name}.png"
        explorer.picture(data).savefig(picture, dpi=170)
        page = (Path(self.env.app.outdir) / self.env.docname).parent
        text = markup(name, data, os.path.relpath(picture, page))
        return [nodes.raw("", text, format="html")]


def markup(name: str, data: Mapping[str, Any], picture: str) -> str:
    """An explorer in HTML: its data, and the picture that stands for it where no script runs."""
    # In a script nothing but "</" ends it.
    given = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    return (
        f'<div class="qs-explorer" id="explorer-{name}" data-explorer="{name}">'
        f'<script type="application/json">{given}</script>'
        f'<noscript><figure><img src="{html.escape(picture)}" '
        f'alt="{html.escape(str(EXPLORERS[name].alt))}"/></figure></noscript></div>'
    )


def _load_scripts(
    app: Sphinx, pagename: str, templatename: str, context: dict, doctree: nodes.document | None
) -> None:
    """Jupyter Book loads every script on every page: ours only where they are used, in order."""
    used = set(re.findall(r'data-explorer="([\w-]+)"', context.get("body", "")))
    order = ["qstar-core.js", "explorer.js", *(f"explorer-{name}.js" for name in sorted(used))]

    def name(file: object) -> str:
        return str(getattr(file, "filename", file) or "")

    for key in ("script_files", "css_files"):
        files = list(context.get(key, []))
        ours = [file for file in files if ALL.search(name(file))]
        kept = [file for file in files if not ALL.search(name(file))]
        if used and key == "css_files":
            kept += ours
        elif used:
            named = {Path(name(file)).name: file for file in ours}
            kept += [named[script] for script in order]
        context[key] = kept


def setup(app: Sphinx) -> ExtensionMetadata:
    app.add_directive("explorer", ExplorerDirective)
    app.connect("html-page-context", _load_scripts, priority=850)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
