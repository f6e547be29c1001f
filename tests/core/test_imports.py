"""The shape of the house: who may import whom, and what `import qstar` may cost."""

import ast
import importlib
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

import qstar
import qstar_book
from qstar_book import figures

ROOTS = {"qstar": Path(qstar.__file__).parent, "qstar_book": Path(qstar_book.__file__).parent}


def name_of(root, path):
    parts = (root, *path.relative_to(ROOTS[root]).with_suffix("").parts)
    return ".".join(parts[:-1] if path.stem == "__init__" else parts)


SOURCES = {
    name_of(root, path): path for root in ROOTS for path in sorted(ROOTS[root].rglob("*.py"))
}
CORE = {name for name in SOURCES if name.count(".") <= 1 and SOURCES[name].stem != "__init__"}
# Folder -> what its files may import besides their neighbours; arrows go down only.
ALLOWED = {
    "qstar": {"qstar.families"},  # the face dispatches to them
    "qstar.families": {"qstar"},
    "qstar.theory": {"qstar"},
    "qstar.sampling": {"qstar"},
    "qstar.decoding": {"qstar", "qstar.sampling"},
    "qstar.adapters": {"qstar", "qstar.sampling", "qstar.decoding"},
    "qstar_book": {"qstar", "qstar.adapters"},
    "qstar_book.experiments": {
        "qstar",
        "qstar.adapters",
        "qstar.decoding",
        "qstar.theory",
        "qstar_book",
        "qstar_book.records",
    },
    "qstar_book.figures": {"qstar", "qstar.theory"},
    "qstar_book.records": {
        "qstar",
        "qstar.families",
        "qstar.theory",
        "qstar.sampling",
        "qstar.decoding",
        "qstar.adapters",
        "qstar_book",
    },
    "qstar_book.sphinx": {
        "qstar",
        "qstar.decoding",
        "qstar_book",
        "qstar_book.figures",
        "qstar_book.records",
    },
}
WITH_TORCH = (
    "qstar._quiet",
    "qstar.rows_torch",
    "qstar.rows_triton",
    "qstar.solve_torch",
    "qstar.solve_torch_row",
    "qstar.sampling.",
    "qstar.decoding.",
    "qstar.adapters.",
)
NUMPY_TOO = {"qstar.decoding.costs", "qstar.decoding.planner"}  # among those
FRAMEWORKS = {"torch", "transformers", "matplotlib", "tqdm", "triton"}


def imports(module):
    """(our modules, top-level names of other packages) that a module imports, at any depth."""
    path, ours, others = SOURCES[module], set(), set()
    package = module.split(".") if path.stem == "__init__" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            targets = [f"{base}.{alias.name}" for alias in node.names]
            targets = [name if name in SOURCES else base for name in targets]
        else:
            continue
        ours |= {name for name in targets if name in SOURCES}
        others |= {name.split(".")[0] for name in targets if name.split(".")[0] not in ROOTS}
    return ours, others


def folder(module):
    return module if SOURCES[module].stem == "__init__" else module.rpartition(".")[0]


@pytest.mark.parametrize("module", SOURCES)
def test_modules_import_only_the_folders_below_theirs(module):
    own = folder(module)
    assert own in ALLOWED, f"say in ALLOWED what the new folder {own} may import"
    reached = {folder(name) for name in imports(module)[0]} - {own}
    assert reached <= ALLOWED[own], f"{module} imports {reached - ALLOWED[own]}"


def test_no_two_modules_need_each_other():
    order = {name: imports(name)[0] - {name} for name in SOURCES}
    order["qstar"] -= CORE  # the face; `from .. import rows_torch` names the folder above
    list(TopologicalSorter(order).static_order())  # raises CycleError


NUMPY_ONLY = [
    name
    for name in SOURCES
    if name in NUMPY_TOO or not name.startswith(("qstar_book", *WITH_TORCH))
]


@pytest.mark.parametrize("module", NUMPY_ONLY)
def test_numpy_modules_import_no_framework(module):
    assert not imports(module)[1] & FRAMEWORKS


def test_a_module_of_the_figures_imports_none_that_imports_it():
    """The style sheet comes first."""
    assert not {m for m in imports("qstar_book.figures.style")[0] if "figures" in m}


def test_every_function_of_a_figures_module_is_called_by_its_name_in_the_package():
    """A figure that its module keeps to itself would be looked for in vain."""
    for path in sorted((ROOTS["qstar_book"] / "figures").glob("*.py")):
        if path.stem in ("__init__", "style"):
            continue
        tree = ast.parse(path.read_text(encoding="utf8"))
        names = [
            node.name
            for node in tree.body
            if isinstance(node, ast.FunctionDef)
            and not node.name.startswith("_")
            and isinstance(node.returns, ast.Name)
            and node.returns.id in ("Axes", "Figure", "str")
        ]
        missing = [name for name in names if name not in figures.__all__]
        assert missing == [], f"name them in figures/__init__.py, from {path.name}"
    assert all(getattr(figures, name) is not None for name in figures.__all__)
    assert {*figures.__all__} <= {*dir(figures)}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        figures.nothing  # noqa: B018


def test_importing_qstar_loads_no_framework():
    probe = "import sys, qstar; qstar.gaussian; print(*{frameworks} & set(sys.modules))"
    command = [sys.executable, "-c", probe.replace("{frameworks}", repr(FRAMEWORKS))]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_every_part_of_the_package_resolves_lazily_and_nothing_else_does():
    parts = {name for name in dir(qstar) if name not in qstar.__all__}
    public = {n[6:] for n in SOURCES if n.startswith("qstar.") and n.count(".") == 1}
    assert parts == {name for name in public if not name.startswith("_")}
    for name in parts:
        if name == "rows_triton" and find_spec("triton") is None:
            continue  # which comes with torch's builds for accelerators
        assert getattr(qstar, name) is importlib.import_module(f"qstar.{name}")
    for name in qstar.__all__:
        assert getattr(qstar, name) is not None
    for name in ("nonsense", "data", "__wrapped__"):
        assert not hasattr(qstar, name)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        qstar.nonsense  # noqa: B018


def test_the_picture_of_the_house_is_the_house():
    root = Path(__file__).parents[2]
    spec = importlib.util.spec_from_file_location("architecture", root / ".ci" / "architecture.py")
    architecture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(architecture)
    page = (root / "CONTRIBUTING.md").read_text(encoding="utf8")
    assert architecture.drawn(page) == page, "make architecture"
    arrows = {tuple(x.strip().split(" --> ")) for x in page.splitlines() if " --> " in x}
    graph = {upper: {low for up, low in arrows if up == upper} for upper, _ in arrows}
    assert ("qstar_adapters", "qstar_decoding") in arrows
    assert ("qstar_decoding", "qstar_adapters") not in arrows
    list(TopologicalSorter(graph).static_order())  # no cycle


def test_no_module_imports_transformers_before_it_is_kept_quiet():
    """Else a notebook shows a warning of tqdm, with a folder of the machine in it."""
    for path in sorted(ROOTS["qstar"].rglob("*.py")):
        text = path.read_text(encoding="utf8")
        loud = re.search(r"^(from|import) transformers", text, re.MULTILINE)
        quiet = re.search(r"^from \.\.? import _quiet", text, re.MULTILINE)
        assert not loud or (quiet and quiet.start() < loud.start()), path
