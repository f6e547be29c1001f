"""What the book needs beyond Jupyter Book: honest links, badges, one figure.

Loaded by `_config.yml` as a local Sphinx extension. Each `_function` below is one repair or one
addition; `setup` lists when they run.
"""

import ast
import dataclasses
import inspect
import io
import os
import re
import textwrap
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from myst_nb.ext.glue.crossref import PendingGlueReference, read_glue_cache
from myst_nb.ext.glue.utils import create_pending_glue_ref
from sphinx.addnodes import pending_xref, translatable
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.environment import BuildEnvironment
from sphinx.ext.autodoc.preserve_defaults import update_defvalue
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode
from sphinx.util.typing import ExtensionMetadata

from qstar_book import figures
from qstar_book.publishing import VERDICTS
from qstar_book.sphinx.pages import without_tex
from qstar_book.sphinx.provenance import repository
from qstar_book.sphinx.verdicts import WORDS

BRANCH = "main"


class described(nodes.Element, translatable):  # noqa: N801
    """What a figure shows, for readers who cannot see it; gettext finds it here."""

    def preserve_original_messages(self) -> None: ...

    def extract_original_messages(self) -> list[str]:
        return [self["alt"]]

    def apply_translated_message(self, original: str, translated: str) -> None:
        self["alt"] = translated


class _Shown(SphinxDirective):
    """A figure, a caption and alternative text."""

    required_arguments = 1
    has_content = True
    option_spec = {"alt": directives.unchanged_required, "name": directives.unchanged}  # noqa: RUF012

    def around(self, picture: nodes.Element) -> list[nodes.Node]:
        if "alt" not in self.options:
            raise self.error(f"{self.name} needs :alt:, a description for readers who cannot see")
        alt = described("", alt=self.options["alt"])
        figure = nodes.figure("", alt, picture, classes=["pasted-figure"])
        self.set_source_info(alt)
        self.set_source_info(figure)
        self.add_name(figure)
        caption = nodes.Element()
        self.state.nested_parse(self.content, self.content_offset, caption)
        if caption.children:
            said = nodes.caption("", "", *caption[0].children)
            said.source, said.line = caption[0].source, caption[0].line
            said.rawsource = caption[0].rawsource  # what is translated
            figure += said
        return [figure]


class PastedFigure(_Shown):
    """A figure that a chapter glued, shown on another page, with a caption and alternative text.

    MyST-NB pastes an image across documents, but bare: `{glue:figure}` works only at home.

        :::{pasted-figure} chapters/kl_symmetry.ipynb::ch1-kl-crossing
        :alt: What a reader who cannot see it must know.
        The caption.
        :::
    """

    def run(self) -> list[nodes.Node]:
        chapter, _, key = self.arguments[0].partition("::")
        source = self.get_source_info()[0]
        return self.around(
            create_pending_glue_ref(self.state.document, source, self.lineno, chapter, key)
        )


class drawn(nodes.General, nodes.Element):  # noqa: N801
    """A figure to be drawn by the function of this name."""


class DrawnFigure(_Shown):
    """A figure that needs no data, from a function of `qstar_book.figures` without arguments."""

    def run(self) -> list[nodes.Node]:
        return self.around(drawn("", name=self.arguments[0]))


class _PasteFigures(SphinxPostTransform):
    """Put the image in, and its file beside the page: MyST-NB (priority 5) writes no file."""

    default_priority = 4

    def run(self, **kwargs: object) -> None:
        for figure in self.document.findall(nodes.figure):
            for said in list(figure.findall(described)):
                figure["alt"] = said["alt"]
                figure.remove(said)
            for pending in list(figure.findall(PendingGlueReference)):
                folder = self.env.mystnb_config.output_folder  # type: ignore[attr-defined]
                glued = read_glue_cache(folder, pending.refdoc)
                shown = glued.get(pending.key, {}).get("data", {})
                if "image/svg+xml" in shown:  # else MyST-NB warns of it
                    self.put(figure, pending, pending.key, shown["image/svg+xml"])
            for picture in list(figure.findall(drawn)):
                self.put(figure, picture, picture["name"], draw(picture["name"]))

    def put(self, figure: nodes.figure, place: nodes.Element, name: str, svg: str) -> None:
        file = Path(self.app.outdir) / self.app.builder.imagedir / f"{name}.svg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(svg, encoding="utf8")
        page = (Path(self.app.outdir) / self.env.docname).parent
        uri = os.path.relpath(file, page)
        place.replace_self(nodes.image(uri=uri, candidates={"*": uri}, alt=figure["alt"]))


def draw(name: str) -> str:
    """The SVG of a figure function without arguments."""
    with figures.in_style():
        file = io.StringIO()
        getattr(figures, name)().savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


class _Verdicts(SphinxPostTransform):
    """Show a glued verdict as a badge; anything else under a verdict's key is a warning."""

    default_priority = 6

    def run(self, **kwargs: object) -> None:
        for node in self.document.findall(nodes.inline):
            if "pasted-text" in node["classes"] and node.astext() in VERDICTS:
                verdict = node.astext()
                node["classes"] += ["verdict", f"verdict-{verdict.replace(' ', '-')}"]
                node.children = []
                node += nodes.Text(str(WORDS[verdict]))


class _JoinFoldedCells(SphinxPostTransform):
    """One bar for folded cells that follow each other, before MyST-NB folds each (priority 199)."""

    default_priority = 198
    formats = ("html",)

    def run(self, **kwargs: object) -> None:
        first: nodes.container | None = None
        for cell in list(self.document.findall(nodes.container)):
            if cell.get("nb_element") != "cell_code" or cell.get("hide_mode") != "all":
                continue
            if first is not None and cell.parent is first.parent:
                at = first.parent.index(first)
                if first.parent.index(cell) == at + 1:
                    cell.parent.remove(cell)
                    del cell["hide_mode"]
                    first += cell
                    continue
            first = cell


def _point_to_the_repository(app: Sphinx, config: Config) -> None:
    """With an address: launch, source and edit buttons. Without one: none of them, anywhere."""
    place = repository(app)
    config.html_theme_options |= {
        "repository_url": place,
        "repository_branch": BRANCH,
        "path_to_docs": "book",
        "navbar_persistent": [],  # one search field is enough
        "primary_sidebar_end": [],  # no advertisement's place
        "use_repository_button": bool(place),
        "use_source_button": bool(place),
        "use_edit_page_button": bool(place),
        "use_issues_button": bool(place),
        "launch_buttons": {
            "notebook_interface": "jupyterlab",
            "colab_url": "https://colab.research.google.com",
            "binderhub_url": "https://mybinder.org",
        }
        if place
        else {},
    }


def _mend_markup(
    app: Sphinx, pagename: str, templatename: str, context: dict, doctree: nodes.document | None
) -> None:
    """What Sphinx writes and neither HTML nor ARIA allows: lists without their items."""
    body = context.get("body", "")
    body = body.replace('<div role="list" class="citation-list">', '<div class="citation-list">')
    body = body.replace(' role="doc-biblioentry"', "")
    body = re.sub(  # a signature on several lines: a definition list that defines nothing
        r"<dl>\s*((?:<dd>.*?</dd>\s*)+)</dl>",
        lambda lines: re.sub(
            r"<dd>(.*?)</dd>", r'<span class="sig-line">\1</span>', lines.group(1), flags=re.DOTALL
        ),
        body,
        flags=re.DOTALL,
    )
    context["body"] = body
    context["title"] = without_tex(context.get("title", ""))


def _link_to_the_sources(
    app: Sphinx, pagename: str, templatename: str, context: dict, doctree: nodes.document | None
) -> None:
    """Repository links of a chapter lead to notebooks/: book/chapters/ is not in the repository."""
    buttons = list(context.get("header_buttons", []))
    for button in buttons:
        buttons.extend(button.get("buttons", []))
        if "url" in button:
            button["url"] = button["url"].replace("book/chapters/", "notebooks/")


def _drop_thebe(app: Sphinx, config: Config) -> None:
    """Jupyter Book loads sphinx-thebe always; it names a host and declares one `const` twice."""
    for listeners in app.events.listeners.values():
        listeners[:] = [one for one in listeners if one.handler.__module__ != "sphinx_thebe"]
    app.registry.css_files[:] = [
        (name, options) for name, options in app.registry.css_files if name != "sphinx-thebe.css"
    ]


def _plain_titles_in_links(app: Sphinx, env: BuildEnvironment) -> None:
    """Sphinx puts the title's TeX, without its delimiters, into the text of a link."""
    labels = env.domains["std"].data["labels"]
    for name, (docname, identifier, title) in labels.items():
        labels[name] = (docname, identifier, without_tex(title))


def _forget_a_build_with_warnings(app: Sphinx, exception: Exception | None) -> None:
    """Sphinx reads only changed pages: without this, `-W` passes when it is simply run again."""
    if exception is not None or app._warncount:
        (Path(app.doctreedir) / "environment.pickle").unlink(missing_ok=True)


def _signature_as_written(
    app: Sphinx, what: str, name: str, obj: object, *_: object
) -> tuple[str, str | None] | None:
    """Show a function as its source declares it: defaults and types by their names."""
    if what == "class" and dataclasses.is_dataclass(obj):
        names = [field.name for field in dataclasses.fields(obj)]
        return (f"({', '.join(names)})" if len(names) < 5 else ""), None
    if what not in ("function", "method"):
        return None
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(obj)))  # type: ignore[arg-type]
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    if what == "method" and not isinstance(obj, staticmethod):
        (function.args.posonlyargs or function.args.args).pop(0)  # self
    returns = ast.unparse(function.returns) if function.returns else None
    return f"({ast.unparse(function.args)})", returns


def _docstring_for_people(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """What a person reads and docutils misreads.

    `Source: ...` is a field, | is a bar, w_ is a name, the shape (*batch, vocab) begins with a
    star, and what is indented after an empty line, below a paragraph, is code or a formula.
    """
    star = r"(?<![\w*])\*(?=\w)(?![^*]*\w\*)"  # that opens nothing: *this* is emphasis
    markup = re.compile(rf"(`[^`]*`)|\||(?<=\w)_(?!\w)|{star}")  # outside code
    written, lines[:] = list(lines), []
    in_source = in_literal = False
    paragraph = ""  # the last line of one
    for line, before in zip(written, ["", *written], strict=False):
        indented = line.startswith(" ")
        in_source = bool(line) and (in_source or line.startswith("Source: "))
        in_literal = in_literal and (not line or indented)
        if indented and not before and paragraph and not in_literal:
            in_literal = True
            if not paragraph.endswith("::"):
                lines += ["::", ""]
        if line and not indented:
            paragraph = line
        elif indented and before == paragraph:
            paragraph = ""  # a section such as "Args:", and what is in it
        if not in_literal:
            line = markup.sub(lambda sign: sign[1] or "\\" + sign[0], line)
        if in_source:
            line = f":{line}" if line.startswith("Source: ") else f"    {line.lstrip()}"
        lines.append(line)


def _resolve_types(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.TextElement
) -> nodes.Element | None:
    """Our own types are linked from every module; those of other packages are plain text.

    A name that claims to be ours and is not documented stays unresolved, and so a warning.
    """
    target = re.sub("^(NDArray|Tensor)(?=Balance$)", "", node.get("reftarget", ""))
    if node.get("reftype") != "class" or target.startswith("qstar"):
        return None
    for name, entry in env.domains["py"].data["objects"].items():
        if name.startswith("qstar.") and name.rpartition(".")[2] == target.rpartition(".")[2]:
            return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, text)
    return text


def _defaults_as_written(app: Sphinx, documented: Any, bound_method: bool) -> None:
    """Defaults as the source says them; but where a signature was made, the source has not all."""
    if not hasattr(documented, "__signature__"):
        app.config.autodoc_preserve_defaults = True
        update_defvalue(app, documented, bound_method)
        app.config.autodoc_preserve_defaults = False  # else the environment is out of date


def setup(app: Sphinx) -> ExtensionMetadata:
    app.add_directive("pasted-figure", PastedFigure)
    app.add_directive("drawn-figure", DrawnFigure)
    app.add_post_transform(_PasteFigures)
    app.add_post_transform(_Verdicts)
    app.add_post_transform(_JoinFoldedCells)
    app.connect("config-inited", _drop_thebe)
    app.connect("config-inited", _point_to_the_repository)
    app.connect("env-updated", _plain_titles_in_links)
    app.connect("html-page-context", _mend_markup)
    app.connect("html-page-context", _link_to_the_sources, priority=900)
    app.setup_extension("sphinx.ext.autodoc")  # whose events these are, whoever comes first
    app.connect("autodoc-before-process-signature", _defaults_as_written)
    app.connect("autodoc-process-signature", _signature_as_written)
    app.connect("autodoc-process-docstring", _docstring_for_people, priority=400)
    app.connect("missing-reference", _resolve_types)
    app.connect("build-finished", _forget_a_build_with_warnings)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
