"""The shape of the package: who may import whom, and what `import qstar` may cost."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

import qstar
from qstar import figures

PACKAGE = Path(qstar.__file__).parent
SOURCES = {path.stem: [path] for path in PACKAGE.glob("[a-z]*.py")} | {
    path.parent.name: sorted(path.parent.glob("*.py")) for path in PACKAGE.glob("*/__init__.py")
}
ALLOWED = {  # module -> the sibling modules it may import; arrows go down only; grow it on purpose
    "result": set(),
    "geometric": set(),
    "solve": {"geometric", "result"},
    "gaussian": {"result"},
    "batched": {"geometric", "result"},
    "models": set(),
    "speculative": {"costs"},
    "laws": set(),
    "acceptance": {"geometric"},
    "bounds": {"geometric"},
    "compromise": {"geometric"},
    "judge": {"costs", "geometric"},
    "costs": set(),
    "packed": set(),
    "product": {"batched"},
    "distributions": {"gaussian"},
    "exponential": {"distributions", "result"},
    "densities": {"distributions", "gaussian", "geometric", "result", "solve"},
    "families": {
        "densities",
        "distributions",
        "exponential",
        "gaussian",
        "geometric",
        "result",
        "solve",
    },
    "montecarlo": {"result"},
    "experts": {"gaussian", "geometric"},
    "sequences": {"geometric", "result", "solve"},
    "answers": {"benchmark", "experiments", "models", "montecarlo", "reader", "sequences"},
    "comparison": {"batched", "result"},
    "reader": set(),
    "shaping": {"costs", "speculative"},
    "schemes": {"costs"},
    "decode": {
        "batched",
        "comparison",
        "costs",
        "models",
        "reader",
        "result",
        "schemes",
        "shaping",
        "speculative",
    },
    "hook": {"comparison", "costs", "decode", "shaping", "speculative"},
    "text": {"decode", "models", "reader"},
    "exactness": {"decode", "geometric", "solve"},
    "decoding_runs": {
        "benchmark",
        "costs",
        "decode",
        "experiments",
        "models",
        "packed",
        "product",
        "reader",
    },
    "experiments": {"comparison", "decode", "models"},
    "rivals": {"compromise", "experiments", "geometric", "models", "solve"},
    "figures": {"gaussian", "judge", "result"},
    "claims": {"published"},
    "published": {"reproduce"},
    "reproduce": set(),
    "benchmark": {"batched", "geometric", "result", "solve"},
    "fused": set(),
    "accelerator": {
        "batched",
        "benchmark",
        "decode",
        "decoding_runs",
        "exactness",
        "experiments",
        "fused",
        "models",
        "reader",
        "torture",
    },
    "torture": {"batched", "geometric", "solve"},
}
NUMPY_ONLY = {
    "result",
    "geometric",
    "solve",
    "gaussian",
    "judge",
    "acceptance",
    "bounds",
    "compromise",
    "costs",
    "distributions",
    "exponential",
    "densities",
    "families",
    "montecarlo",
    "experts",
    "sequences",
}
FRAMEWORKS = {"torch", "transformers", "matplotlib"}


def imports(module):
    """(siblings, top-level names of other packages) that a module imports, at any depth."""
    siblings, others = set(), set()
    nodes = [
        (node, 1 if path.parent == PACKAGE else 2)  # the dots that lead to the package
        for path in SOURCES[module]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8")))
    ]
    for node, dots in nodes:
        if isinstance(node, ast.ImportFrom) and node.level == dots:
            siblings |= {node.module} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            others.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
    return siblings, others


@pytest.mark.parametrize("module", SOURCES)
def test_modules_import_only_the_layers_below_them(module):
    assert module in ALLOWED, f"say in ALLOWED what the new module {module} may import"
    siblings, others = imports(module)
    assert siblings <= ALLOWED[module]
    assert "qstar" not in others, "import siblings relatively"


def test_a_module_of_the_figures_imports_none_that_imports_it():
    """The style sheet comes first; no two modules of figures need each other."""
    order = {}
    for path in SOURCES["figures"]:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf8")))
        order[path.stem] = {
            n.module for n in nodes if isinstance(n, ast.ImportFrom) if n.level == 1
        }
    assert order["style"] == set()
    list(TopologicalSorter(order).static_order())  # raises CycleError


def test_every_function_of_a_figures_module_is_called_by_its_name_in_the_package():
    """A figure that its module keeps to itself would be looked for in vain."""
    for path in SOURCES["figures"]:
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
        assert missing == [], f"re-export them in qstar/figures/__init__.py, from {path.name}"


@pytest.mark.parametrize("module", sorted(NUMPY_ONLY))
def test_numpy_modules_import_no_framework(module):
    assert not imports(module)[1] & FRAMEWORKS


def test_importing_qstar_loads_no_framework():
    probe = "import sys, qstar; qstar.gaussian; print(*{frameworks} & set(sys.modules))"
    command = [sys.executable, "-c", probe.replace("{frameworks}", repr(FRAMEWORKS))]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_every_submodule_resolves_lazily_and_nothing_else_does():
    assert sorted({*SOURCES, *qstar.__all__}) == dir(qstar)
    for name in SOURCES:
        if name == "fused" and find_spec("triton") is None:
            continue  # which comes with torch's builds for accelerators
        assert getattr(qstar, name).__name__ == f"qstar.{name}"
    for name in ("nonsense", "data", "__wrapped__"):
        assert not hasattr(qstar, name)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        qstar.nonsense  # noqa: B018
