"""Which files of our packages a notebook's code imports, directly and through others.

Read from the source alone, each file once a process, so that it takes milliseconds and no kernel:
what an executed chapter depends on, and what therefore makes it out of date.
"""

import ast
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

LAZY = "_ON_FIRST_USE"
"""The dictionary of a package that says where a name of its face is loaded from on first use."""


def imported_files(code: str, packages: Sequence[Path]) -> dict[str, Path]:
    """The modules that some code needs, with their files, in order of their names.

    Args:
        code: Python; lines of IPython's own (`%`, `!`) are passed over. What cannot be read is
            taken to import everything.
        packages: The folders of the packages that count as ours.
    """
    modules = {
        ".".join(_parts(file, package)): file
        for package in packages
        for file in sorted(package.rglob("*.py"))
    }
    plain = "\n".join(line for line in code.splitlines() if not line.startswith(("%", "!")))
    try:
        waiting = list(_named(plain, modules, package=[]))
    except SyntaxError:
        return modules
    if "scipy.stats" in plain:  # a frozen one is handed to the families by the face
        waiting += [name for name in modules if name == "qstar.families"]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        file = modules[name]
        parts = name.split(".")
        here = parts if file.stem == "__init__" else parts[:-1]
        waiting += _named(file.read_text(encoding="utf8"), modules, package=here)
    return {name: modules[name] for name in sorted(found)}


def _parts(file: Path, package: Path) -> tuple[str, ...]:
    parts = (package.name, *file.relative_to(package).with_suffix("").parts)
    return parts[:-1] if file.stem == "__init__" else parts


def _named(source: str, modules: Mapping[str, Path], *, package: list[str]) -> Iterator[str]:
    """The modules of ours that a program names: in imports at any depth, and by dots."""
    for level, name in _dotted(source):
        above = package[: len(package) - level + 1] if level else []
        yield from _with_parents([*above, *name.split(".")], modules)


@functools.cache
def _dotted(source: str) -> frozenset[tuple[int, str]]:
    """Each dotted name in a program, and how many dots before it make it a relative import.

    What is imported under a name of its own is followed under it: after `from qstar_book import
    figures`, `figures.simplex` is `qstar_book.figures.simplex`.
    """
    found, called = set(), {}
    nodes = list(ast.walk(ast.parse(source)))
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.add((0, alias.name))
                if alias.asname:
                    called[alias.asname] = 0, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = f"{node.module}." if node.module else ""
            for alias in node.names:
                found.add((node.level, base + alias.name))
                called[alias.asname or alias.name] = node.level, base + alias.name
    for node in nodes:
        if isinstance(node, ast.Attribute) and (chain := _chain(node)):
            root, _, rest = chain.partition(".")
            level, name = called.get(root, (0, root))
            found |= {(0, chain), (level, f"{name}.{rest}")}
    return frozenset(found)


def _chain(node: ast.expr) -> str:
    """`a.b.c` as it stands; empty for the attribute of anything else than a name."""
    if isinstance(node, ast.Attribute):
        above = _chain(node.value)
        return above and f"{above}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _with_parents(parts: list[str], modules: Mapping[str, Path]) -> Iterator[str]:
    """The longest prefix of a dotted name that is a module, its packages, and what it is lazily."""
    known = [".".join(parts[: n + 1]) for n in range(len(parts))]
    known = [prefix for prefix in known if prefix in modules]
    yield from known
    if known and len(known) < len(parts) and modules[known[-1]].stem == "__init__":
        package, wanted = known[-1], parts[len(known)]
        if wanted in (lazy := _lazy(modules[package].read_text(encoding="utf8"))):
            yield from _with_parents((package + lazy[wanted]).split("."), modules)


@functools.cache
def _lazy(source: str) -> dict[str, str]:
    """What a package loads on first use: name to relative module."""
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == LAZY for target in targets):
            assert isinstance(node, ast.Assign)
            table: dict[str, str] = ast.literal_eval(node.value)
            return table
    return {}
