"""The Chinese edition: translated pages in a folder of the English ones, whose files they share.

`qstar_book.translation` builds it while the English pages are written, from what their build has
read: only the pages that `_config.yml` lists under `translated_pages` are read and written again,
with the catalogues of `book/locale`. Their links lead to the English page of every other, and their
figures, styles and scripts are those of the English edition.
"""

import functools
import gc
import html
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import glossary, toctree
from sphinx.application import Sphinx
from sphinx.builders.gettext import MessageCatalogBuilder
from sphinx.builders.html import StandaloneHTMLBuilder
from sphinx.config import Config
from sphinx.environment import CONFIG_OK, BuildEnvironment
from sphinx.environment.collectors.toctree import TocTreeCollector
from sphinx.locale import get_translation, get_translator, init
from sphinx.transforms import GlossarySorter, SphinxTransform
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.fileutil import copy_asset_file
from sphinx.util.i18n import docname_to_domain
from sphinx.util.osutil import ensuredir
from sphinx.util.typing import ExtensionMetadata

from ..translation import FOLDER, LANGUAGE, READ

CATALOG, SCRIPTS = "qstar", "scripts"
"""The catalogues of what our extensions and our scripts say; each page has one of its own."""

WORDS = "words.js"
OWN = ("documentation_options.js", "language_data.js", "translations.js", WORDS)
"""What an edition has of its own in `_static`."""

FILES = ("_static", "_images", "_sources", "_downloads")
SHARED = re.compile(rf"""(?<=["'])((?:\.\./|\./)*)({"|".join(FILES)})/([^"'?#]*)""")
TO_ENGLISH = re.compile(
    r'<a(?P<tag>(?![^>]*hreflang)[^>]*\bhref="(?:\.\./)*\.\./(?!_)[^"]*"[^>]*)>(?P<text>.*?)</a>',
    re.DOTALL,
)
NAMES = {"en": "English", "zh-CN": "中文"}

_ = get_translation(CATALOG)


def is_translation(config: Config) -> bool:
    return bool(config.language == LANGUAGE)


class EditionBuilder(StandaloneHTMLBuilder):
    """Writes pages beside those that it leads to, and copies nothing that those have."""

    name = "html"

    @functools.cached_property
    def _elsewhere(self) -> set[str]:
        return self.env.found_docs - set(self.config.translated_pages)

    def get_target_uri(self, docname: str, typ: str | None = None) -> str:
        uri = super().get_target_uri(docname, typ)
        return f"../{uri}" if docname in self._elsewhere else uri

    def copy_static_files(self) -> None:
        static = Path(self.outdir) / "_static"
        ensuredir(static)
        context = {**self.globalcontext, **self.indexer.context_for_searchtool()}  # type: ignore[union-attr]
        for folder in self.theme.get_theme_dirs():
            for name in OWN:
                template = Path(folder) / "static" / f"{name}.jinja"
                if template.is_file():
                    copy_asset_file(str(template), str(static), context, self.templates)
        self.copy_translation_js()
        words = get_translator(SCRIPTS)._catalog  # type: ignore[attr-defined]
        said = {text: words[text] for text in words if text}
        text = json.dumps(said, ensure_ascii=False, separators=(",", ":"))
        (static / WORDS).write_text(f"globalThis.qstarWords = {text};\n", encoding="utf8")

    def load_indexer(self, docnames: Iterable[str]) -> None: ...  # it indexes its own pages
    def copy_image_files(self) -> None: ...
    def copy_download_files(self) -> None: ...
    def copy_extra_files(self) -> None: ...
    def write_buildinfo(self) -> None: ...
    def dump_inventory(self) -> None: ...


class MessagesBuilder(MessageCatalogBuilder):
    """The messages of the pages as they were read, whether or not references lead somewhere."""

    name = "gettext"
    imagedir = "_images"

    def _write_serial(self, docnames: Iterable[str]) -> None:
        for docname in sorted(set(docnames) & set(self.config.translated_pages)):
            document = self.env.get_doctree(docname)
            for formula in document.findall(nodes.math_block):
                formula["translatable"] = r"\text" in formula.astext()
            self.write_doc(docname, document)


class _CellsOfTables(SphinxTransform):
    """Within a directive the text of a table does not say where it is from, as gettext wants."""

    default_priority = 5

    def apply(self, **kwargs: object) -> None:
        for table in self.document.findall(nodes.table):
            for text in table.findall(nodes.paragraph):
                if text.rawsource and text.source is None:
                    text.source, text.line = self.document["source"], table.line or 0


class _TranslateCaptions(SphinxTransform):
    """The captions of the parts come from `_toc.yml`, after Sphinx has translated the page."""

    default_priority = 110

    def apply(self, **kwargs: object) -> None:
        for tree in self.document.findall(toctree):
            if caption := tree.get("caption"):
                tree["caption"] = _(caption)


class _SortAsInEnglish(SphinxTransform):
    """The glossary keeps the order of the English page: code points are no order for Chinese."""

    default_priority = 18

    def apply(self, **kwargs: object) -> None:
        GlossarySorter(self.document).apply()
        for listed in self.document.findall(glossary):
            listed["sorted"] = False


class _LatinEmphasis(SphinxPostTransform):
    """Emphasis of Latin words ("et al.") stays italic: dots are for Chinese."""

    default_priority = 900

    def run(self, **kwargs: object) -> None:
        for said in self.document.findall(nodes.emphasis):
            if not re.search("[\u3400-\u9fff]", said.astext()):
                said["classes"].append("qs-latin")


class _TranslateFormulas(SphinxTransform):
    """Words in a displayed formula, before Sphinx takes their translation for a paragraph."""

    default_priority = 19

    def apply(self, **kwargs: object) -> None:
        domain = docname_to_domain(self.env.docname, self.config.gettext_compact)
        catalog, _known = init(list(self.config.locale_dirs), self.config.language, domain)
        for formula in self.document.findall(nodes.math_block):
            text = formula.rawsource or formula.astext()
            said = catalog.gettext(text)
            if text and said != text:
                formula.rawsource = said
                formula.children = []
                formula += nodes.Text(said)


def shared(page: str) -> str:
    """A translated page, led to the files of the English edition."""

    def lead(found: re.Match[str]) -> str:
        up, folder, name = found.groups()
        own = folder == "_static" and name in OWN
        return found[0] if own else f"{up.removeprefix('./')}../{folder}/{name}"

    return SHARED.sub(lead, page)


def with_languages(page: str) -> str:
    """A translated page whose links to English pages say so."""

    def say(link: re.Match[str]) -> str:
        english = not re.search("[\u3400-\u9fff]", re.sub("<[^>]*>", "", link["text"]))
        said = ' hreflang="en" lang="en"' if english else ' hreflang="en"'
        return f"<a{link['tag']}{said}>{link['text']}</a>"

    return TO_ENGLISH.sub(say, page)


def _switch_languages(
    app: Sphinx, pagename: str, templatename: str, context: dict, doctree: nodes.document | None
) -> None:
    """The way to the same page in the other language, in the head and for the header."""
    if pagename not in app.config.translated_pages:
        return
    up = "../" * pagename.count("/")
    here, there = ("zh-CN", "en") if is_translation(app.config) else ("en", "zh-CN")
    other = f"{up}../{pagename}.html" if there == "en" else f"{up}{FOLDER}/{pagename}.html"
    context["other_edition"] = {"url": other, "language": there, "name": NAMES[there]}
    addresses = {here: f"{pagename.rpartition('/')[2]}.html", there: other}
    tags = "".join(
        f'\n    <link rel="alternate" hreflang="{language}" href="{html.escape(address)}" />'
        for language, address in sorted(addresses.items())
    )
    context["metatags"] = context.get("metatags", "") + tags


def _say_it_in_the_language(app: Sphinx, config: Config) -> None:
    """What is configured in words: the title, and what a folded cell says."""
    header = config.html_theme_options
    header["article_header_end"] = ["language-switch.html", "article-header-buttons.html"]
    if is_translation(config):
        config.html_title = _(config.html_title)
        config.nb_code_prompt_show = _("Show code cell {type}")
        config.nb_code_prompt_hide = _("Hide code cell {type}")
        config.togglebutton_hint = _("Click to show")
        config.togglebutton_hint_hide = _("Click to hide")
        config.redirects = {}


def _keep_the_environment(app: Sphinx) -> None:
    """What the English edition read is read, and counted: only the language has changed."""
    if not is_translation(app.config):
        return
    app.env.config_status = CONFIG_OK
    app.env.config_status_extra = ""
    counted = dict(app.env.toc_fignumbers)  # a page that is read again loses its own

    def count(env: BuildEnvironment) -> list[str]:
        env.toc_fignumbers.update(counted)
        return []

    for listener in app.events.listeners["env-get-updated"]:
        collector = getattr(listener.handler, "__self__", None)
        if isinstance(collector, TocTreeCollector):
            collector.assign_figure_numbers = count  # type: ignore[method-assign]


def _read_again(
    app: Sphinx, env: BuildEnvironment, added: set[str], changed: set[str], removed: set[str]
) -> list[str]:
    return list(app.config.translated_pages) if is_translation(app.config) else []


def _read_only_what_is_translated(app: Sphinx, env: BuildEnvironment, docnames: list[str]) -> None:
    if is_translation(app.config):
        docnames[:] = [name for name in docnames if name in app.config.translated_pages]


def _say_that_all_is_read(app: Sphinx, env: BuildEnvironment) -> None:
    """For who waits to build the other edition from it: the environment is saved by now."""
    if not is_translation(app.config):
        Path(app.doctreedir, READ).touch()


def _share_the_files(app: Sphinx, exception: Exception | None) -> None:
    if exception is not None or app.builder.format != "html" or not is_translation(app.config):
        return
    out = Path(app.outdir)
    for file in out.rglob("*.html"):
        page = shared(with_languages(file.read_text(encoding="utf8")))
        file.write_text(page, encoding="utf8")
    for folder in FILES[1:]:
        shutil.rmtree(out / folder, ignore_errors=True)
    for file in (out / "_static").iterdir():
        if file.name not in OWN:
            file.unlink()


def setup(app: Sphinx) -> ExtensionMetadata:
    gc.disable()  # the trees of a build live to its end: a third faster, in 1.4 GB for 0.8
    app.add_config_value("translated_pages", [], "html", list)
    for folder in app.config.locale_dirs:
        for catalog in (CATALOG, SCRIPTS):
            app.add_message_catalog(catalog, folder)
    app.add_builder(MessagesBuilder, override=True)
    app.add_transform(_CellsOfTables)
    if is_translation(app.config):
        app.add_builder(EditionBuilder, override=True)
        app.add_js_file(WORDS, priority=150)
        app.add_transform(_TranslateCaptions)
        app.add_transform(_SortAsInEnglish)
        app.add_transform(_TranslateFormulas)
        app.add_post_transform(_LatinEmphasis)
    app.connect("config-inited", _say_it_in_the_language, priority=300)
    app.connect("builder-inited", _keep_the_environment)
    app.connect("env-get-outdated", _read_again)
    app.connect("env-before-read-docs", _read_only_what_is_translated)
    app.connect("env-check-consistency", _say_that_all_is_read)
    # Before the theme drops the parts of the header that are empty.
    app.connect("html-page-context", _switch_languages, priority=400)
    app.connect("build-finished", _share_the_files, priority=950)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
