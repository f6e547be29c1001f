"""The shape of the chapters, and that no number in their prose was typed by hand.

What counts as typed: a decimal, a power of ten or a percentage in the prose of a notebook, in a
caption or in a page of the book. Whole numbers are free. So is what stands

- in a glue role, in a code span or in a fenced block: it is code or was computed;
- in 「」, in a block quotation or in italic quotation marks, *"0.5"*: it quotes the source;
- in mathematics, if it has at most two significant digits: it is a parameter or an exponent;
- in the source itself, to its last digit (`PRINTED`): then it is a quotation.
"""

import ast
import json
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = sorted((ROOT / "book").glob("*.md"))
LONGEST_CELL = 24
# fmt: off
PRINTED = {  # every decimal and percentage that stands in the source
    "0.500", "8.000", "0.388", "0.636", "1.614", "1.125", "0.298", "1.775", "11.292", "0.344",
    "2.886", "10.614", "0.3", "0.5", "0.7", "1.4", "1.6", "1.43", "1.54", "1.59",
    "40%", "50%", "60%",
}
# fmt: on
MACHINE_PATH = re.compile(r"(?<![\w.])/(home|Users|root|work|tmp|opt|mnt|var|usr)/|\b[A-Z]:\\\\?\w")


def cells(path, kind):
    notebook = json.loads(path.read_text(encoding="utf8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def tagged(path, tag):
    return [c for c in cells(path, "code") if tag in c["metadata"].get("tags", [])]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return request.param


def test_a_notebook_is_valid_and_says_what_runs_it(notebook):
    node = nbformat.read(notebook, as_version=nbformat.NO_CONVERT)
    nbformat.validate(node)
    assert (node.nbformat, node.nbformat_minor) == (4, 5)
    assert node.metadata.kernelspec.name == "python3"
    assert node.metadata.language_info.name == "python"
    names = [cell.id for cell in node.cells]
    assert len(set(names)) == len(names)


def test_outputs_are_not_committed(notebook):
    for cell in cells(notebook, "code"):
        assert (cell["outputs"], cell["execution_count"]) == ([], None), cell["id"]


def test_a_notebook_opens_with_its_label_title_and_claim(notebook):
    first = json.loads(notebook.read_text(encoding="utf8"))["cells"][0]
    assert first["cell_type"] == "markdown"
    label, title, *rest = source(first).splitlines()
    assert re.fullmatch(r"\(ch-[a-z0-9-]+\)=", label)
    assert re.match(r"# \S", title)
    assert next(line for line in rest if line).startswith("**Claim.**")


def test_labels_of_chapters_are_unique():
    labels = [re.findall(r"^\((ch-[^)]+)\)=", source(c), re.M)
              for path in NOTEBOOKS for c in cells(path, "markdown")]  # fmt: skip
    flat = [label for found in labels for label in found]
    assert len(set(flat)) == len(flat)


def test_parameters_are_literals_in_one_cell(notebook):
    (cell,) = tagged(notebook, "parameters")
    for statement in ast.parse(source(cell)).body:
        assert isinstance(statement, ast.Assign | ast.AnnAssign), ast.unparse(statement)
        ast.literal_eval(statement.value)  # so that --set can tell a wrong type
    assert cells(notebook, "code")[0] == cell, "parameters come before any other code"


def test_the_last_code_cell_asserts_the_claim_and_prints_the_margin(notebook):
    last = cells(notebook, "code")[-1]
    assert tagged(notebook, "claim") == [last]
    nodes = list(ast.walk(ast.parse(source(last))))
    assert any(isinstance(node, ast.Assert) for node in nodes)
    calls = [n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    assert "print" in calls


def test_code_cells_are_short_and_what_they_define_is_explained(notebook):
    for cell in cells(notebook, "code"):
        text = source(cell)
        assert text.strip(), f"{cell['id']} is empty"
        nodes = list(ast.walk(ast.parse(text)))
        imports = any(isinstance(node, ast.Import | ast.ImportFrom) for node in nodes)
        long = len(text.splitlines()) > LONGEST_CELL and not imports
        assert not long, f"{cell['id']} is long:\n{text}"
        for node in nodes:
            assert not isinstance(node, ast.ClassDef), f"{node.name} deserves a place in qstar/"
            if isinstance(node, ast.FunctionDef):
                assert ast.get_docstring(node), f"{cell['id']}: what is {node.name}?"


def test_no_lambda_returns_a_tuple(notebook):
    """A function of a few lines has a name and can say what it returns."""
    for cell in cells(notebook, "code"):
        for node in ast.walk(ast.parse(source(cell))):
            if isinstance(node, ast.Lambda):
                assert not isinstance(node.body, ast.Tuple), cell["id"]


def test_what_is_published_is_folded_away(notebook):
    """Nobody reads a page for its plumbing: where a cell only publishes it is hidden."""
    for cell in cells(notebook, "code"):
        body = ast.parse(source(cell)).body
        tells = [
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Call)
            and getattr(node.value.func, "id", "") in ("publish", "decide")
            for node in body
        ]
        if all(tells):
            assert {"hide-cell", "hide-input"} & set(cell["metadata"].get("tags", [])), cell["id"]


def test_a_notebook_names_no_folder_of_a_machine(notebook):
    for cell in [*cells(notebook, "code"), *cells(notebook, "markdown")]:
        assert not MACHINE_PATH.search(source(cell)), source(cell)


# --- No number is typed --------------------------------------------------------------------------

NOT_PROSE = re.compile(
    r"""
      ^(?P<fence>```+|~~~+).*?^(?P=fence)\s*$   # a fenced block
    | (?P<ticks>`+).+?(?P=ticks)                # a code span, or what a role is given
    | ^\s*>.*?$                                 # a block quotation
    | 「.*?」                                    # the source, in its own marks
    | \*["“].*?["”]\*                           # or in italic quotation marks
    | ^\([\w-]+\)=$                             # a label
    | ^:[\w-]+:                                 # the name of an option
    | \]\([^)]*\)                               # where a link leads
    | <[^>\s][^>]*>                             # a tag of HTML
    """,
    re.MULTILINE | re.DOTALL | re.VERBOSE,
)
MATHEMATICS = re.compile(r"\$\$.*?\$\$|\$[^$]+\$", re.DOTALL)
DECIMAL = r"\d*[.]\d+"
TYPED = re.compile(rf"(?:\d+|{DECIMAL})\s?%|{DECIMAL}(?:e[-+]?\d+)?|\d+e[-+]?\d+")


def typed_numbers(prose):
    """The numbers in a piece of MyST Markdown that look like results and are not glued."""
    prose = NOT_PROSE.sub(" ", prose)
    in_formulas = (
        number for formula in MATHEMATICS.findall(prose) for number in re.findall(DECIMAL, formula)
    )
    long = [number for number in in_formulas if len(number.replace(".", "").lstrip("0")) > 2]
    found = long + TYPED.findall(MATHEMATICS.sub(" ", prose))
    return [number for number in found if number not in PRINTED]


@pytest.mark.parametrize(
    ("prose", "found"),
    [
        ("α* is 0.387 here", ["0.387"]),
        ("the source prints 0.388", []),
        ("it fell by 26.4 % or 30%", ["26.4 %", "30%"]),
        ("the gap is 1e-9 nats", ["1e-9"]),
        (r"so $\alpha^\star=0.387$", ["0.387"]),
        ("α* is {glue:text}`ch3-alpha:.3f` here", []),
        ("`solve(x, 0.387)` and ``0.6`` and five of 15 rows", []),
        (r"with $\sigma=0.5$ and $10^{-12}$ and $\tfrac12$", []),
        ('「α* 在 0.387 附近」 and *"0.387"*', []),
        ("> about 0.387\n\nis right", []),
        ("```python\nx = 0.387\n```\nafter", []),
        ("```python\nx = 0.387\n```\nafter 0.4", ["0.4"]),
        ("[here](https://example.org/0.387)", []),
    ],
)
def test_a_typed_number_is_told_from_a_quoted_or_glued_one(prose, found):
    assert typed_numbers(prose) == found


def captions(notebook):
    for cell in cells(notebook, "code"):
        shown = cell["metadata"].get("mystnb", {})
        yield shown.get("figure", {}).get("caption", "")
        yield shown.get("image", {}).get("alt", "")


def test_no_number_in_a_chapter_is_typed(notebook):
    prose = [source(cell) for cell in cells(notebook, "markdown")]
    found = [
        (typed, text) for text in [*prose, *captions(notebook)] for typed in typed_numbers(text)
    ]
    assert [number for number, _ in found] == [], "glue or quote: " + "; ".join(
        f"{number} in {line.strip()!r}"
        for number, text in found
        for line in text.splitlines()
        if number in line
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_no_number_on_a_page_is_typed(page):
    text = page.read_text(encoding="utf8")
    assert typed_numbers(text) == [], "glue them, or quote the source"
