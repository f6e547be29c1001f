"""What a page shows beside its figures, as HTML."""

import html
from collections.abc import Mapping

from .style import COLOURS


def texts(parts: Mapping[str, tuple[str, str]]) -> str:
    """HTML of texts beside each other, which stand below each other where the page is narrow.

    Args:
        parts: Heading -> (party, text); the party ("policy", "teacher", "q*") gives the colour.
    """
    cells = [
        f'<div style="flex:1 1 14em;min-width:0;border-top:4px {border} {COLOURS[party]};'
        f'padding:.3em 0 .6em"><strong>{html.escape(heading)}</strong><br>'
        f'<span style="white-space:pre-wrap;overflow-wrap:anywhere">{html.escape(text)}</span>'
        f"</div>"
        for heading, (party, text) in parts.items()
        for border in ("dashed" if party == "teacher" else "solid",)
    ]
    return f'<div style="display:flex;flex-wrap:wrap;gap:0 1.2em">{"".join(cells)}</div>'
