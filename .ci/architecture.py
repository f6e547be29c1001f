"""Draw which folder imports which into CONTRIBUTING.md: `make architecture`.

The picture is read from the imports of the code, as Mermaid, which GitHub and most editors draw.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (ROOT / "qstar", ROOT / "book" / "qstar_book")
BEGIN, END = "```mermaid\n", "```\n"


def folder_of(file: Path, package: Path) -> str:
    """The folder of a file, from its package on, by dots."""
    return ".".join((package.name, *file.relative_to(package).parts[:-1]))


def sources() -> dict[Path, str]:
    """Every file of the packages that holds code, with its folder."""
    return {
        file: folder_of(file, package)
        for package in PACKAGES
        for file in sorted(package.rglob("*.py"))
    }


def named(file: Path, folder: str) -> set[str]:
    """The modules that a file imports, at any depth, by their whole names."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = folder.split(".")
            above = above[: len(above) - node.level + 1] if node.level else []
            base = [*above, *(node.module.split(".") if node.module else [])]
            found |= {".".join([*base, alias.name]) for alias in node.names}
    return found


def picture() -> str:
    """The folders with their files, and an arrow for each folder that imports from another."""
    files = sources()
    folders = sorted(set(files.values()))
    arrows = set()
    for file, folder in files.items():
        for name in named(file, folder):
            inside = [other for other in folders if f"{name}.".startswith(f"{other}.")]
            if inside and max(inside, key=len) != folder:
                arrows.add((folder, max(inside, key=len)))
    lines = ["graph TD"]
    for folder in folders:
        own = [f.stem for f, where in files.items() if where == folder and f.stem[0] != "_"]
        shown = "<br/>".join(", ".join(own[i : i + 4]) for i in range(0, len(own), 4))
        lines.append(f'    {folder.replace(".", "_")}["<b>{folder}</b><br/>{shown}"]')
    for upper, lower in sorted(arrows):
        lines.append(f"    {upper.replace('.', '_')} --> {lower.replace('.', '_')}")
    return "\n".join(lines) + "\n"


def drawn(text: str) -> str:
    """A page with the picture in place of the one that it has."""
    before, rest = text.split(BEGIN, 1)
    return before + BEGIN + picture() + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    page = ROOT / "CONTRIBUTING.md"
    page.write_text(drawn(page.read_text(encoding="utf8")), encoding="utf8")
