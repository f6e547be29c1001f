"""The shape of the package: who may import whom, and what `import qstar` may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qstar

SOURCES = {path.stem: path for path in Path(qstar.__file__).parent.glob("[a-z]*.py")}
ALLOWED = {  # module -> the sibling modules it may import; arrows go down only; grow it on purpose
    "result": set(),
    "geometric": set(),
    "solve": {"geometric", "result"},
    "gaussian": {"result"},
    "batched": {"result"},
    "models": set(),
    "speculative": set(),
    "laws": set(),
    "acceptance": {"geometric"},
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
    "decode": {"batched", "models", "result"},
    "experiments": {"decode", "models"},
    "figures": {"gaussian", "result"},
    "published": {"reproduce"},
    "reproduce": set(),
    "benchmark": {"batched", "geometric", "result", "solve"},
}
NUMPY_ONLY = {
    "result",
    "geometric",
    "solve",
    "gaussian",
    "acceptance",
    "distributions",
    "exponential",
    "densities",
    "families",
    "montecarlo",
    "experts",
}
FRAMEWORKS = {"torch", "transformers", "matplotlib"}


def imports(path):
    """(siblings, top-level names of other packages) that a module imports, at any depth."""
    siblings, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            siblings |= {node.module} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            others.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
    return siblings, others


@pytest.mark.parametrize("module", SOURCES)
def test_modules_import_only_the_layers_below_them(module):
    assert module in ALLOWED, f"say in ALLOWED what the new module {module} may import"
    siblings, others = imports(SOURCES[module])
    assert siblings <= ALLOWED[module]
    assert "qstar" not in others, "import siblings relatively"


@pytest.mark.parametrize("module", sorted(NUMPY_ONLY))
def test_numpy_modules_import_no_framework(module):
    assert not imports(SOURCES[module])[1] & FRAMEWORKS


def test_importing_qstar_loads_no_framework():
    probe = "import sys, qstar; qstar.gaussian; print(*{frameworks} & set(sys.modules))"
    command = [sys.executable, "-c", probe.replace("{frameworks}", repr(FRAMEWORKS))]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_submodules_resolve_lazily_and_others_do_not():
    assert "gaussian" in dir(qstar)
    assert qstar.gaussian.__name__ == "qstar.gaussian"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        qstar.nonsense  # noqa: B018
