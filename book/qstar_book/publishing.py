"""What a chapter tells the book: the numbers that its prose shows, and the verdicts it reaches.

Nothing else of the book is imported here, so that a chapter hangs on these few lines alone.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from myst_nb import glue

VERDICTS = ("confirmed", "corrected", "refuted", "qualified", "not measured")
"""What can be said of a claim."""


def publish(values: Mapping[str, float | int | str | bool | Figure]) -> None:
    """Let prose show values: each under its key, which is unique in the book.

    Args:
        values: Plain Python values by key, such as {"ch3-row2-alpha": 0.353}; or figures, for other
            pages to show.

    Raises:
        TypeError: A value is no plain float, int, string or bool, and no figure.
    """
    for key, value in values.items():
        if type(value) not in (float, int, str, bool, Figure):
            raise TypeError(
                f"{key} must be a plain float, int, str or bool: got {type(value).__name__}. "
                f"Convert it, float(value)."
            )
        glue(key, value, display=False)


def cells_of(
    key: str, head: Sequence[str], rows: Sequence[Sequence[Any]], *, labels: int = 1
) -> dict[str, str]:
    """The cells of a table that is drawn as HTML, each under a key of its own, for `publish`: so
    that they are guarded as the numbers of prose are.

    Args:
        key: What their keys begin with.
        head: The headings of the columns.
        rows: As long as `head`.
        labels: How many of the first columns tell one row from the others.
    """

    def name(*parts: Any) -> str:
        said = " ".join(map(str, parts)).replace("*", " star").lower()
        return "-".join([key, *re.findall(r"[a-z0-9.]+", said)])

    return {
        name(*row[:labels], heading): str(cell)
        for row in rows
        for heading, cell in zip(head[labels:], row[labels:], strict=True)
    }


def decide(claim: str, verdict: str) -> None:
    """Say what became of a claim of the source, by its name in `data/claims.yaml`.

    Raises:
        ValueError: The verdict is none of `VERDICTS`.
    """
    if verdict not in VERDICTS:
        raise ValueError(f"{claim}: a verdict is one of {', '.join(VERDICTS)}: got {verdict!r}.")
    glue(f"claim-{claim}", verdict, display=False)
