"""Draw the figure of the README, q* between two parents: `make figure`."""

import io
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from qstar import gaussian
from qstar_book import figures

FILE = Path(__file__).resolve().parents[1] / "book" / "q_star.svg"
PLAIN: dict[Any, Any] = {"svg.hashsalt": "q*", "svg.fonttype": "path", "path.simplify": False}


def drawn() -> str:
    """The picture as SVG, the same in every run; its paths to a hundredth of a point."""
    pair = gaussian.solve_pair("", gaussian.Gaussian(-2.0, 0.6), gaussian.Gaussian(2.0, 2.5))
    x = np.linspace(-6, 7, 131)
    bells = pair.policy, pair.teacher, pair.q_star
    densities = np.exp([bell.log_density(x[:, None]) for bell in bells])
    with figures.in_style(), mpl.rc_context(PLAIN):
        fig, file = Figure(figsize=(4.6, 2.7)), io.StringIO()
        figures.balanced(pair, x, densities, ax=fig.subplots())
        about = {"Date": None, "Creator": None}
        # White, for where it is shown the page may be dark.
        fig.savefig(file, format="svg", metadata=about, facecolor="white")
    paths = re.sub(
        r'(?<= d=")[^"]*',
        lambda path: re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.2f}", path[0]),
        file.getvalue(),
    )
    return "".join(line.rstrip() + "\n" for line in paths.splitlines())


def main() -> None:
    FILE.write_text(drawn(), encoding="utf8")


if __name__ == "__main__":
    main()
