"""Formulas as MathML, made when the book is built: no page loads a program to typeset them.

`math-core` translates the TeX. What it cannot read is a warning, and so fails the build. The font
is `_static/fonts/maths.woff2`, a part of STIX Two Math.
"""

import functools
import html
import re

from docutils import nodes
from math_core import LatexError, LatexToMathML
from sphinx.application import Sphinx
from sphinx.locale import _ as words
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number
from sphinx.util.typing import ExtensionMetadata
from sphinx.writers.html5 import HTML5Translator

MATHS = r"<math\b[^>]*>.*?</math>"
"""A formula in a page."""

SMALL = re.compile(r"\\(begin|end)\{smallmatrix\}")
SKIP = re.compile(r"\\\\\s*\[[\d.]+(?:em|ex|pt)\]")
"""A new line with more room above it: translated as one without."""
SMALL_TABLE = '<mtable displaystyle="false" scriptlevel="1"'


@functools.cache
def mathml(tex: str, *, display: bool) -> str:
    """The MathML of a formula in TeX, without delimiters.

    Raises:
        ValueError: The formula has a command that is not known, or is not well formed.
    """
    translate = LatexToMathML().convert_with_local_state
    try:
        done = translate(
            SMALL.sub(r"\\\1{matrix}", SKIP.sub(r"\\\\", tex.strip())), displaystyle=display
        )
    except LatexError as error:
        raise ValueError(f"not TeX that can be translated: {tex.strip()}") from error
    if SMALL.search(tex):
        done = re.sub(r'<mtable displaystyle="false" scriptlevel="0"', SMALL_TABLE, done)
    return str(done)


def _written(translator: HTML5Translator, node: nodes.Element, *, display: bool) -> str:
    parts = [part for part in node.astext().split("\n\n") if part.strip()]
    try:
        return "".join(mathml(part, display=display) for part in parts)
    except ValueError as error:
        logging.getLogger(__name__).warning(str(error), location=node)
        return f"<code>{html.escape(node.astext())}</code>"


def _visit_inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(_written(translator, node, display=False))
    raise nodes.SkipNode


def _visit_block(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(translator.starttag(node, "div", CLASS="math"))
    translator.body.append(f"<div>{_written(translator, node, display=True)}</div>")
    if node["number"]:
        number = get_node_equation_number(translator, node)
        translator.body.append(f'<span class="eqno">({number})')
        translator.add_permalink_ref(node, words("Link to this equation"))
        translator.body.append("</span>")
    translator.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> ExtensionMetadata:
    app.add_html_math_renderer("mathml", (_visit_inline, None), (_visit_block, None))
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
