"""Which files of our packages a notebook's code imports, directly and through others.

Read from the source alone, so that it takes milliseconds and no kernel: what an executed chapter
depends on, and what therefore makes it out of date.
"""

import ast
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
        waiting = list(_named(ast.parse(plain), modules, package=[]))
    except SyntaxError:
        return modules
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        file = modules[name]
        parts = name.split(".")
        here = parts if file.stem == "__init__" else parts[:-1]
        tree = ast.parse(file.read_text(encoding="utf8"))
        waiting += _named(tree, modules, package=here)
    return {name: modules[name] for name in sorted(found)}


def _parts(file: Path, package: Path) -> tuple[str, ...]:
    parts = (package.name, *file.relative_to(package).with_suffix("").parts)
    return parts[:-1] if file.stem == "__init__" else parts


def _named(tree: ast.AST, modules: Mapping[str, Path], *, package: list[str]) -> Iterator[str]:
    """The modules of ours that a program names: in imports at any depth, and by dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = [*above, *([node.module] if node.module else [])]
            dotted = [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Attribute):
            dotted = [ast.unparse(node)]
        else:
            continue
        for name in dotted:
            yield from _with_parents(name, modules)


def _with_parents(name: str, modules: Mapping[str, Path]) -> Iterator[str]:
    """The longest prefix of a dotted name that is a module, its packages, and what it is lazily."""
    parts = name.split(".")
    known = [".".join(parts[: n + 1]) for n in range(len(parts))]
    known = [prefix for prefix in known if prefix in modules]
    yield from known
    if known and len(known) < len(parts):
        package, wanted = known[-1], parts[len(known)]
        if wanted in (lazy := _lazy(modules[package])):
            yield from _with_parents(package + lazy[wanted], modules)


def _lazy(file: Path) -> dict[str, str]:
    """What a package loads on first use: name to relative module."""
    if file.stem != "__init__":
        return {}
    for node in ast.parse(file.read_text(encoding="utf8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == LAZY for target in targets):
            assert isinstance(node, ast.Assign)
            table: dict[str, str] = ast.literal_eval(node.value)
            return table
    return {}
