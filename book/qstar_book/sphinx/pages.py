"""The last touch on each page: what a reader, a screen reader or a search engine misses in it.

The theme's templates and MyST-NB's cells leave these to be done in the finished HTML of a page.
Each `_function` is one of them; `_finish` lists them.
"""

import html
import itertools
import math
import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.locale import get_translation
from sphinx.search.en import SearchEnglish
from sphinx.util.typing import ExtensionMetadata

from .edition import CATALOG, is_translation
from .maths import MATHS

_ = get_translation(CATALOG)

IDEOGRAPHS = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WIDE = f"\u3001-\u303f\uff01-\uffef{IDEOGRAPHS}"  # with their punctuation
CHINESE = re.compile(rf"[{WIDE}](?:[“”\s·…]*[{WIDE}])*")
IDEOGRAPH = re.compile(f"[{IDEOGRAPHS}]")
WORD = re.compile(rf"[{IDEOGRAPHS}]+|[^\W{IDEOGRAPHS}]+")

# What is not text of the page: scripts, formulas, comments and tags.
NOT_TEXT = re.compile(r"<(script|style|math)\b.*?</\1>|<!--.*?-->|<[^>]*>", re.DOTALL)
OPENING = r"(?:&quot;|[(\[“‘「])?"
CLOSING = r"""(?:&quot;|&\#x27;|[.,;:!?)\]”’'」。，、；：%…–—-])+"""
GREEK = {"alpha": "α", "gamma": "γ", "pi": "π", "theta": "θ", "mu": "μ", "Sigma": "Σ", "ell": "ℓ"}
SIGNS = {"star": "*", "infty": "∞", "|": "‖", "Vert": "‖", "approx": "≈", "le": "≤", "ge": "≥"}


def plain_maths(tex: str) -> str:
    r"""A short formula in letters, where none is typeset: `\alpha^\star` is α*."""
    plain = re.sub(r"\\tfrac\s*(\w)\s*(\w)", r"\1/\2", tex)
    plain = re.sub(r"\\(log|min|max|exp)\b", r"\1", plain)
    plain = re.sub(r"\\([A-Za-z]+|\|)\s*", lambda name: (GREEK | SIGNS).get(name[1], ""), plain)
    return re.sub(r"\\.|[\^{}$]", "", plain).strip()


def plain_text(node: nodes.Element) -> str:
    """The text of a node, its formulas in letters."""
    return "".join(
        plain_maths(text) if isinstance(text.parent, nodes.math) else str(text)
        for text in node.findall(nodes.Text)
    )


def without_tex(title: str) -> str:
    """A title for the window and for links to it, where no mathematics is typeset."""
    plain = title.replace(r"\alpha", "α").replace(r"\star", "*")
    return re.sub(r"\\[()]|[\^{}$]", "", plain)


class ChineseInEnglish(SearchEnglish):
    """English words, and Chinese by its characters and pairs of them: it has no spaces.

    A query is split in the same way, so that a page is found by any part of a sentence in it.
    """

    js_splitter_code = f"""
function splitQuery(query) {{
  const parts = query.match(/[{IDEOGRAPHS}]+|[^{IDEOGRAPHS}]+/gu) ?? [];
  return parts.flatMap((part) => {{
    if (!/[{IDEOGRAPHS}]/u.test(part))
      return part.split(/[^\\p{{Letter}}\\p{{Number}}_\\p{{Emoji_Presentation}}]+/gu);
    const signs = [...part];
    return signs.length < 2 ? signs : signs.slice(1).map((sign, at) => signs[at] + sign);
  }}).filter((term) => term);
}}
"""

    def split(self, input: str) -> list[str]:
        found = []
        for word in WORD.findall(input):
            found.append(word)
            if re.match(f"[{IDEOGRAPHS}]", word):
                found[-1:] = [*word, *map("".join, itertools.pairwise(word))]
        return found


def _say_the_language(body: str, *, chinese: bool = False) -> str:
    """Chinese is marked as Chinese, but in a Chinese page: a screen reader would spell it out."""

    def mark(text: str) -> str:
        # A straight quotation mark after a Chinese character was taken for a closing one.
        text = re.sub(rf"(?<=[{WIDE}])”([^“”]*)”", r"“\1”", text)
        if chinese:
            return text
        return CHINESE.sub(
            lambda run: (
                f'<span lang="zh">{run[0]}</span>'
                if re.search(f"[{IDEOGRAPHS}]", run[0])
                else run[0]
            ),
            text,
        )

    parts, end = [], 0
    for other in NOT_TEXT.finditer(body):
        parts += [mark(body[end : other.start()]), other[0]]
        end = other.end()
    return "".join([*parts, mark(body[end:])])


def _keep_maths_with_its_punctuation(body: str) -> str:
    """A formula is a box to the browser, which may put the full stop behind it on a new line."""

    def keep(found: re.Match[str]) -> str:
        alone = found[0].startswith("<") and found[0].endswith(">")
        return found[0] if alone else f'<span class="qs-together">{found[0]}</span>'

    return re.sub(f"{OPENING}{MATHS}(?:{CLOSING})?", keep, body)


def _wrap_code(body: str) -> str:
    """Each line of code is a box, so that what does not fit continues below, further in."""

    def lines(code: re.Match[str]) -> str:
        wrapped = []
        for line in code[2].splitlines(keepends=True):
            text = html.unescape(re.sub("<[^>]*>", "", line)).rstrip("\n")
            indent = len(text) - len(text.lstrip(" "))
            style = f' style="--indent: {indent}"' if indent else ""
            wrapped.append(f'<span class="qs-line"{style}>{line}</span>')
        return f"{code[1]}{''.join(wrapped)}{code[3]}"

    return re.sub(r'(<div class="highlight"><pre>)(.*?)(</pre>)', lines, body, flags=re.DOTALL)


def _let_names_break(body: str) -> str:
    """A long name in the text may go on in a new line after an underscore or a full stop."""
    return re.sub(
        r'(?<=<span class="pre">)[^<\s]{16,}(?=</span>)',
        lambda name: re.sub(r"(?<=[a-z\d)])[_.]+(?=\w)", r"\g<0><wbr>", name[0]),
        body,
    )


def _no_empty_heads(body: str) -> str:
    """A cell of a table's head that says nothing heads nothing."""
    return re.sub(r"<th\b([^>]*)>(\s*(?:<p>\s*</p>)?\s*)</th>", r"<td\1>\2</td>", body)


def svg_size(svg: str) -> tuple[int, int, int]:
    """Of a figure: width and height in CSS pixels, and the width at which its letters are legible.

    Letters of 9 CSS pixels are. Matplotlib says a text's size by its scale, in hundredths of its
    units, which are points; indices are smaller, and do not count.
    """
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert box is not None, "not a figure of Matplotlib"
    width, height = float(box[1]), float(box[2])
    sizes = [float(size) * 100 for size in re.findall(r"scale\(([\d.]+) -[\d.]+\)", svg)]
    least = 9 * width / min(sizes) if sizes else 0
    return round(width * 4 / 3), round(height * 4 / 3), math.ceil(least)


def _size_the_images(app: Sphinx, body: str) -> str:
    """An image says how large it is, so that the text below it does not jump when it comes.

    Where a phone would shrink its letters too far it stays wider and scrolls in its box.
    """
    files = {name: Path(app.srcdir) / source for source, name in app.builder.images.items()}

    def size(image: re.Match[str]) -> str:
        name = image["file"]
        file = files.get(name, Path(app.outdir) / app.builder.imagedir / name)
        if "width=" in image[0] or not file.is_file():
            return image[0]
        width, height, least = svg_size(file.read_text(encoding="utf8"))
        said = f'width="{width}" height="{height}" style="min-width: {min(least, width)}px"'
        return f'<span class="qs-figure">{image["tag"]} {said}{image["end"]}</span>'

    pattern = rf'(?P<tag><img\b[^>]*src="[^"]*{app.builder.imagedir}/(?P<file>[^"/]+\.svg)"[^>]*?)'
    return re.sub(pattern + r"(?P<end>\s*/?>)", size, body)


def _description(doctree: nodes.document) -> str:
    """The first paragraph, or what of it fits beside a search result."""
    for paragraph in doctree.findall(nodes.paragraph):
        if isinstance(paragraph.parent, nodes.section | nodes.container):
            text = plain_text(paragraph).removeprefix(_("Claim.")).strip()
            if IDEOGRAPH.search(text):
                whole = re.sub("[^，。；：]*$", "", text[:120]).rstrip("，；：")
                return text if len(text) <= 120 else f"{whole}…"
            words = text.split()
            short = ""
            for word in words:
                if len(short) + len(word) > 190:
                    return short.rstrip(",;:") + " …"
                short = f"{short} {word}".strip()
            return short
    return ""


STYLE_OF_CODE = re.compile(r"<style>pre \{ line-height.*?</style>", re.DOTALL)
"""What IPython's `Code` brings: the book's own colours are for light and dark."""


def _finish(
    app: Sphinx, pagename: str, templatename: str, context: dict, doctree: nodes.document | None
) -> None:
    body = _size_the_images(app, STYLE_OF_CODE.sub("", context.get("body", "")))
    body = _no_empty_heads(body)
    body = _let_names_break(_wrap_code(body))
    body = _keep_maths_with_its_punctuation(body)
    context["body"] = _say_the_language(body, chinese=is_translation(app.config))
    # docutils writes <meta name="viewport">, and so does Sphinx.
    metatags = re.sub(r'<meta name="viewport"[^>]*>', "", context.get("metatags", ""))
    if doctree and (words := _description(doctree)):
        said = {
            'name="description"': words,
            'property="og:description"': words,
            'property="og:title"': re.sub("<[^>]*>", "", context["title"]),
            'property="og:type"': "article",
        }
        for name, text in said.items():
            metatags += f'\n    <meta {name} content="{html.escape(html.unescape(text))}" />'
    context["metatags"] = metatags


def setup(app: Sphinx) -> ExtensionMetadata:
    app.add_search_language(ChineseInEnglish)
    app.connect("html-page-context", _finish, priority=800)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
