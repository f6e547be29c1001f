"""Write the repository's public address into README.md and CITATION.cff: `make address`.

The address stands in one place, `[tool.qstar] repository` in pyproject.toml, and is empty while
there is none: then no block holds a link. Text outside the marked blocks is never touched.
"""

import re
import tomllib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GITHUB = re.compile(r"https://github\.com/([A-Za-z0-9-]+)/([A-Za-z0-9._-]+)")
BLOCK = re.compile(
    r"(?P<begin>^[^\n]*address: begin[^\n]*\n).*?(?P<end>^[^\n]*address: end)", re.M | re.S
)


def repository() -> str:
    """The setting; a `ValueError` if it is neither empty nor a GitHub repository's address."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))
    address = settings["tool"]["qstar"]["repository"]
    if address and (not GITHUB.fullmatch(address) or address.endswith(".git")):
        raise ValueError(
            'pyproject.toml: [tool.qstar] repository must be "" or "https://github.com/OWNER/NAME"'
            f' without a "/" or ".git" at the end, not {address!r}'
        )
    return address


def pages(address: str) -> str:
    """Where GitHub Pages serves the book of this repository."""
    match = GITHUB.fullmatch(address)
    assert match is not None
    owner, name = match.groups()
    host = f"{owner.lower()}.github.io"
    return f"https://{host}/" if name.lower() == host else f"https://{host}/{name}/"


def readme_block(address: str) -> str:
    """Where to read, run without installing, and clone; the notebooks are those of this tree."""
    if not address:
        return ""
    path = address.removeprefix("https://github.com/")
    name = path.split("/")[1]
    colab = f"https://colab.research.google.com/github/{path}/blob/main/notebooks"
    binder = f"https://mybinder.org/v2/gh/{path}/main?labpath=notebooks"
    rows = "\n".join(
        f"| [{notebook.stem}](notebooks/{notebook.name}) | [Colab]({colab}/{notebook.name})"
        f" | [Binder]({binder}%2F{notebook.name}) |"
        for notebook in sorted((ROOT / "notebooks").glob("*.ipynb"))
    )
    return f"""
Read the book at <{pages(address)}>. Get it: `git clone {address} && cd {name}`.

| run a chapter without installing | | |
|---|---|---|
{rows}

In Colab, run this cell first: `%pip install "qstar[gguf,book] @ git+{address}"`.

"""


def citation_block(address: str) -> str:
    if not address:
        return ""
    return f'repository-code: "{address}"\nurl: "{pages(address)}"\n'


FILES: dict[str, Callable[[str], str]] = {
    "README.md": readme_block,
    "CITATION.cff": citation_block,
}


def filled(text: str, block: str) -> str:
    """The text with the contents of its one marked block replaced."""
    result, count = BLOCK.subn(lambda match: match["begin"] + block + match["end"], text)
    if count != 1:
        raise ValueError(f'expected one "address: begin" ... "address: end" block, found {count}')
    return result


def main() -> None:
    address = repository()
    for name, block in FILES.items():
        file = ROOT / name
        file.write_text(filled(file.read_text(encoding="utf8"), block(address)), encoding="utf8")
    print(f"README.md and CITATION.cff now hold {address or 'no address'}.")


if __name__ == "__main__":
    main()
