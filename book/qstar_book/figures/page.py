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


def messages(parts: Mapping[str, str]) -> str:
    """HTML of what was done and, below each, the message it met.

    Args:
        parts: What was done -> the message, of which the name of the error is the beginning.
    """
    items = []
    for done, message in parts.items():
        kind, _, said = message.partition(": ")
        items.append(
            f'<dt style="margin-top:.8em">{html.escape(done)}</dt>'
            f'<dd style="margin-left:1.2em"><code>{html.escape(kind)}</code> '
            f"{html.escape(said)}</dd>"
        )
    return f"<dl>{''.join(items)}</dl>"
