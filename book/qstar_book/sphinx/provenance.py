"""Where a page comes from, and how to cite it: the footer, the citation, the map of the site."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import nbformat
import yaml
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.locale import get_translation
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

from .edition import CATALOG, FOLDER, is_translation

_ = get_translation(CATALOG)

SHOWN = {"numpy": "NumPy", "scipy": "SciPy", "torch": "torch", "transformers": "transformers"}
"""Package -> how the footer writes it."""


def bibtex(citation: dict[str, Any]) -> str:
    """The entry for a bibliography, of what CITATION.cff says."""
    authors = " and ".join(
        "{" + one["name"] + "}" if "name" in one else f"{one['family-names']}, {one['given-names']}"
        for one in citation["authors"]
    )
    fields = {"author": authors, "title": citation["title"]}
    if released := str(citation.get("date-released", ""))[:4]:
        fields["year"] = released
    fields["note"] = f"Version {citation['version']}"
    if address := citation.get("url") or citation.get("repository-code"):
        fields["url"] = address
    lines = ",\n".join(f"  {name:<6} = {{{text}}}" for name, text in fields.items())
    return f"@misc{{qstar,\n{lines}\n}}"


class HowToCite(SphinxDirective):
    """The BibTeX entry of the book, from `CITATION.cff`.

    :::{how-to-cite}
    :::
    """

    def run(self) -> list[nodes.Node]:
        file = Path(self.env.srcdir).parent / "CITATION.cff"
        if not file.is_file():
            return []
        text = bibtex(yaml.safe_load(file.read_text(encoding="utf8")))
        return [nodes.literal_block(text, text, language="bibtex")]


def computed(chapter: Path) -> str:
    """The sentence of an executed chapter: on which day, with what, from which commit."""
    facts = nbformat.read(chapter, as_version=4).metadata.get("qstar", {})
    if not facts:
        return ""
    versions = [f"Python {facts['python']}"]
    for name, shown in SHOWN.items():
        if version := facts["packages"].get(name):
            versions.append(f"{shown} {version}")
    record = chapter.parent / ".runner" / f"{chapter.stem}.json"
    run = json.loads(record.read_bytes()).get("run", {}) if record.is_file() else {}
    day = _(" on {}").format(run["day"]) if run.get("day") else ""
    commit = _(", from commit {}").format(run["commit"]) if run.get("commit") else ""
    words = _("Computed{day} with {versions}{commit}.")
    return words.format(day=day, versions=", ".join(versions), commit=commit)


def public_address(repository: str) -> str:
    """Where the pages of a GitHub repository are served; '' without one."""
    match = re.fullmatch(r"https://github\.com/([\w-]+)/([\w.-]+)", repository)
    if match is None:
        return ""
    host = f"{match[1].lower()}.github.io"
    return f"https://{host}/" if match[2].lower() == host else f"https://{host}/{match[2]}/"


def repository(app: Sphinx) -> str:
    """The repository's public address, from `[tool.qstar] repository`; '' while it has none."""
    pyproject = Path(app.confdir).parent / "pyproject.toml"
    settings = tomllib.loads(pyproject.read_text(encoding="utf8"))
    return settings.get("tool", {}).get("qstar", {}).get("repository", "").strip().rstrip("/")


def _address(app: Sphinx) -> str:
    return public_address(repository(app))


def _say_where_from(
    app: Sphinx, pagename: str, templatename: str, context: dict, doctree: nodes.document | None
) -> None:
    chapter = Path(app.srcdir) / f"{pagename}.ipynb"
    said = computed(chapter) if chapter.is_file() else ""
    if said:
        said = f'<p class="qs-computed">{said}</p> '
    licence = _("Text and figures: CC BY 4.0. Code: MIT.")
    context["theme_extra_footer"] = f"{said}{licence}"
    if doctree and (address := _address(app)):
        address += f"{FOLDER}/" if is_translation(app.config) else ""
        page = f"{address}{'' if pagename == app.config.root_doc else pagename + '.html'}"
        tags = f'\n    <link rel="canonical" href="{page}" />'
        tags += f'\n    <meta property="og:url" content="{page}" />'
        context["metatags"] = context.get("metatags", "") + tags


def _map_the_site(app: Sphinx, exception: Exception | None) -> None:
    """`sitemap.xml`, once the pages have a public address."""
    address = _address(app) if exception is None and app.builder.format == "html" else ""
    if not address or is_translation(app.config):
        return
    names = sorted(app.env.found_docs, key=lambda name: (name != "index", name))
    names += [f"{FOLDER}/{name}" for name in app.config.translated_pages if name in names]
    pages = [f"{name}.html".removesuffix("index.html") for name in names]
    urls = "".join(f"<url><loc>{address}{page}</loc></url>" for page in pages)
    head = '<?xml version="1.0" encoding="UTF-8"?>\n'
    space = 'xmlns="http://www.sitemaps.org/schemas/sitemap/0.9"'
    (Path(app.outdir) / "sitemap.xml").write_text(f"{head}<urlset {space}>{urls}</urlset>\n")


def setup(app: Sphinx) -> ExtensionMetadata:
    app.add_directive("how-to-cite", HowToCite)
    app.connect("html-page-context", _say_where_from, priority=810)
    app.connect("build-finished", _map_the_site)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
