"""The set-up: one set of pins for everybody, one command line, one public address."""

import ast
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from qstar_book import pages as book_pages
from qstar_book.sphinx.provenance import bibtex
from qstar_book.translation import READ

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf8"))
DATA_FILES = [*(ROOT / "data").glob("*.json"), *(ROOT / "data" / "results").glob("*.json")]
WORKFLOW = ROOT / ".github" / "workflows" / "book.yml"
CITATION = ROOT / "CITATION.cff"
FIGURE = ROOT / "book" / "q_star.svg"
FAKE = "https://github.com/Some-Owner/some.name"
# What only a build of torch with GPU support brings, in versions of its own.
OF_A_GPU_BUILD = ("cuda-", "nvidia-", "triton")


def constraint_lines():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf8").splitlines()
    return [line for line in lines if not line.startswith("#")]


PINS = {canonicalize_name(r.name): r for r in map(Requirement, constraint_lines())}


def requirements(*extras):
    """What pyproject.toml asks for with these extras, its references to itself resolved."""
    lines = [*PYPROJECT["project"]["dependencies"]]
    for extra in extras:
        lines += EXTRAS[extra]
    found = {Requirement(line) for line in lines}
    ours = {requirement for requirement in found if requirement.name == "qstar"}
    nested = {extra for requirement in ours for extra in requirement.extras}
    return (found - ours) | (requirements(*nested) if nested else set())


def needed(requirement, seen):
    """The names of all packages that a requirement brings into this environment."""
    name = canonicalize_name(requirement.name)
    if name.startswith(OF_A_GPU_BUILD) or (name, *requirement.extras) in seen:
        return set()
    seen.add((name, *requirement.extras))
    names = {name}
    for line in importlib.metadata.requires(name) or []:
        child = Requirement(line)
        environments = [default_environment() | {"extra": e} for e in ("", *requirement.extras)]
        if child.marker is None or any(map(child.marker.evaluate, environments)):
            names |= needed(child, seen)
    return names


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, **options)


def load(name):
    """A script of .ci/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- One set of pins -------------------------------------------------------------------------


def test_constraints_are_plain_pins():
    plain = re.compile(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*")
    odd = [line for line in constraint_lines() if not plain.fullmatch(line)]
    assert odd == [], "no host, hash, local version such as +cpu, range or editable line"
    assert not plain.fullmatch("torch==2.13.0+cpu")
    assert not [name for name in PINS if name.startswith(OF_A_GPU_BUILD)]


def test_each_package_is_pinned_once():
    assert len(PINS) == len(constraint_lines())


@pytest.mark.parametrize("requirement", sorted(requirements(*EXTRAS), key=str), ids=str)
def test_every_requirement_is_pinned_within_its_range(requirement):
    pin = PINS[canonicalize_name(requirement.name)]
    (exactly,) = pin.specifier
    assert Version(exactly.version) in requirement.specifier


def test_the_extra_all_is_all_extras():
    assert requirements("all") == requirements(*EXTRAS)


def test_every_package_of_the_environment_is_pinned():
    seen = set()
    names = set().union(*(needed(requirement, seen) for requirement in requirements("all")))
    assert names - PINS.keys() == set()
    assert len(names) > 100


def test_the_environment_holds_the_pinned_versions():
    # Of its own folders: setuptools, once a test has imported it, puts others on the path.
    own = list({sysconfig.get_path(name) for name in ("purelib", "platlib")})
    installed = {
        canonicalize_name(d.metadata["Name"]): d.version
        for d in importlib.metadata.distributions(path=own)
    }
    assert {"numpy", "pytest"} <= installed.keys()
    expected = {name: next(iter(pin.specifier)).version for name, pin in PINS.items()}
    different = {
        name: (installed[name], version)
        for name, version in expected.items()
        if name in installed and Version(installed[name]).public != version
    }
    assert different == {}, "(installed, pinned); `make environment` installs the pins"


def test_conda_installs_what_make_installs():
    """See `test_an_environment_is_made_once` for make."""
    (pip,) = [entry["pip"] for entry in CONDA["dependencies"] if isinstance(entry, dict)]
    assert pip == ["-c constraints.txt", "-e .[all]"]


def test_every_pin_installs_with_the_oldest_python():
    """The first 3.11 as well: Debian's is 3.11.2, and one pin asked for 3.11.5."""
    oldest = PYPROJECT["project"]["requires-python"].removeprefix(">=") + ".0"
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf8")
    asked = {
        name: importlib.metadata.metadata(name).get("Requires-Python") or ""
        for name in re.findall(r"^([\w.-]+)==", pinned, re.MULTILINE)
    }
    assert {name: needs for name, needs in asked.items() if oldest not in SpecifierSet(needs)} == {}
    assert len(asked) > 100


def test_the_python_versions_agree():
    oldest = PYPROJECT["project"]["requires-python"].removeprefix(">=")
    (conda,) = [e for e in CONDA["dependencies"] if isinstance(e, str) and e.startswith("python")]
    workflow = yaml.safe_load(WORKFLOW.read_text(encoding="utf8"))
    steps = [step.get("with", {}) for step in workflow["jobs"]["book"]["steps"]]
    assert conda == f"python ={oldest}"
    (pythons,) = [s["python-version"].split() for s in steps if "python-version" in s]
    assert pythons[-1] == oldest, "the last one that is set up is python3"
    assert all(Version(python) > Version(oldest) for python in pythons[:-1])
    assert PYPROJECT["tool"]["mypy"]["python_version"] == oldest
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    assert Version(".".join(map(str, sys.version_info[:2]))) in SpecifierSet(f">={oldest}")
    assert f"Python ≥ {oldest}" in (ROOT / "README.md").read_text(encoding="utf8")


def python_of(file):
    """The Python that a file holds; of a notebook, its code cells without IPython's commands."""
    text = file.read_text(encoding="utf8")
    if file.suffix == ".py":
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    lines = "\n".join("".join(cell["source"]) for cell in cells).splitlines()
    return "\n".join(line for line in lines if not line.startswith(("%", "!")))


OURS = {"qstar", "qstar_book"} | {path.stem for path in (ROOT / "tests").rglob("*.py")}


def imported(file):
    """The top-level names of other packages that a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(python_of(file))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names - OURS - sys.stdlib_module_names


providers_of_imports = functools.cache(importlib.metadata.packages_distributions)

# tests/families/test_bregman.py skips where these are missing, and says how to install them; and
# qstar_book.records.peers leaves out the ways of packages that are not there.
UNPINNED = {"autograd", "bregman", "flashspec", "genlm", "triton"}  # triton comes with torch's GPU


@pytest.mark.parametrize("folder", ["qstar", "tests", "notebooks", "book/qstar_book", ".ci"])
def test_every_import_is_declared(folder):
    declared = {canonicalize_name(requirement.name) for requirement in requirements("all")}
    providers = providers_of_imports()
    files = [f for f in (ROOT / folder).rglob("*") if f.suffix in (".py", ".ipynb")]
    undeclared = {
        (file.name, name)
        for file in files
        for name in imported(file) - UNPINNED
        if not declared & set(map(canonicalize_name, providers.get(name, [])))
    }
    assert undeclared == set(), "add the package to an extra in pyproject.toml, and its pin"
    assert files


# --- What travels with the package -----------------------------------------------------------

RECORDS = sorted(str(file.relative_to(ROOT / "data")) for file in DATA_FILES)
USE_EVERY_RECORD = """
import json, sys
import qstar
from qstar_book.records import baselines, corpus

found = {name: corpus.data_file(name) for name in sys.argv[1:]}
assert len(corpus.read_prompts(found["prompts.json"])) > 0
assert len(corpus.read_corpus(found["continuations.json"]).continuations) > 0
assert len(baselines.read(found["results/rivals.json"])[0]) > 0
print(json.dumps([qstar.__file__, *(file.read_text(encoding="utf8") for file in found.values())]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package as `pip install .` puts it, from a copy of what it is made from."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    leave_out = shutil.ignore_patterns("__pycache__", "expected")
    for name in ("qstar", "book/qstar_book", "data"):
        shutil.copytree(ROOT / name, source / name, ignore=leave_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    run(*pip, "--target", str(target), str(source), check=True)
    shutil.rmtree(source)
    return target


def test_an_installed_package_finds_its_records(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-P", "-c", USE_EVERY_RECORD, *RECORDS]
    result = run(*command, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    place, *texts = json.loads(result.stdout)
    assert Path(place).is_relative_to(installed), "the checkout was tried, not what it installs"
    assert texts == [(ROOT / "data" / name).read_text(encoding="utf8") for name in RECORDS]


def test_every_module_is_installed(installed):
    for package in (ROOT / "qstar", ROOT / "book" / "qstar_book"):
        names = {str(f.relative_to(package)) for f in package.rglob("*.py")}
        there = installed / package.name
        assert names == {str(f.relative_to(there)) for f in there.rglob("*.py")}


# --- The two commands ------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    """A copy of what `make environment` reads, and a PATH of only what the test puts there."""
    (tmp_path / ".ci").mkdir()
    for name in (".ci/environment", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    path = tmp_path / "bin"
    path.mkdir()
    for tool in ("bash", "cat", "cksum", "dirname", "env", "head", "pwd", "rm"):
        (path / tool).symlink_to(shutil.which(tool))
    return tmp_path


def tool(checkout, name, script="exit 0"):
    file = checkout / "bin" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!{shutil.which('bash')}\n{script}\n")
    file.chmod(0o755)


def make_environment(checkout, **variables):
    environment = {"PATH": str(checkout / "bin"), **variables}
    return run(shutil.which("bash"), str(checkout / ".ci" / "environment"), env=environment)


# A Python that passes every check and notes what it is asked to make and install. It fails to
# install, as one that was interrupted, while there is a file `interrupt`.
PYTHON = """
case "$*" in
    *version.split*) echo 3.11.7 ;;
    "-m venv --clear .venv")
        mkdir -p .venv/bin && cp "$0" .venv/bin/python; echo venv >>log ;;
    "-m pip"*) echo pip >>log; echo "$PIP_CONSTRAINT $*" >asked; [ ! -e interrupt ] ;;
esac
"""


def a_good_machine(checkout):
    tool(checkout, "git")
    tool(checkout, "python3", PYTHON)
    for name in ("mkdir", "cp"):
        (checkout / "bin" / name).symlink_to(shutil.which(name))


def log(checkout):
    text = (checkout / "log").read_text().split()
    (checkout / "log").write_text("")
    return text


@pytest.mark.parametrize(
    ("present", "variables", "missing"),
    [
        ({}, {}, "git"),
        ({"git": "exit 0"}, {}, "Python >= 3.11"),
        ({"git": "exit 0", "python3": "exit 1"}, {}, "Python >= 3.11"),
        ({"git": "exit 0"}, {"PYTHON": "python3.9"}, "Python >= 3.11 as PYTHON=python3.9"),
        ({"git": "exit 0", "python3": '[[ "$*" != *ensurepip* ]]'}, {}, "venv for python3"),
    ],
)
def test_a_missing_prerequisite_is_named_in_one_line(checkout, present, variables, missing):
    for name, script in present.items():
        tool(checkout, name, script)
    result = make_environment(checkout, **variables)
    assert result.returncode == 1
    assert result.stderr.startswith(f"Missing: {missing}. ")
    assert result.stderr.count("\n") == 1
    assert not (checkout / ".venv").exists()


def test_an_environment_is_made_once(checkout):
    a_good_machine(checkout)
    assert make_environment(checkout).returncode == 0
    assert log(checkout) == ["venv", "pip"]
    asked = (checkout / "asked").read_text()
    assert asked == "constraints.txt -m pip install --no-compile --editable .[all]\n"
    again = make_environment(checkout)
    assert (again.returncode, again.stdout) == (0, "")
    assert log(checkout) == []


def test_an_interrupted_environment_is_made_anew(checkout):
    a_good_machine(checkout)
    (checkout / "interrupt").touch()
    assert make_environment(checkout).returncode != 0
    assert not (checkout / ".venv" / ".made").exists()
    (checkout / "interrupt").unlink()
    log(checkout)
    assert make_environment(checkout).returncode == 0
    assert log(checkout) == ["venv", "pip"]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_requirement_refreshes_the_environment(checkout, name):
    a_good_machine(checkout)
    make_environment(checkout)
    log(checkout)
    with (checkout / name).open("a") as file:
        file.write("# changed\n")
    (checkout / "interrupt").touch()
    assert make_environment(checkout).returncode != 0
    assert log(checkout) == ["pip"]
    (checkout / "interrupt").unlink()
    make_environment(checkout)
    assert log(checkout) == ["venv", "pip"], "an interrupted refresh is not trusted"


def test_a_moved_environment_is_made_anew(checkout, tmp_path_factory):
    a_good_machine(checkout)
    make_environment(checkout)
    log(checkout)
    moved = tmp_path_factory.mktemp("elsewhere") / "clone"
    checkout.rename(moved)
    make_environment(moved)
    assert log(moved) == ["venv", "pip"]


def test_another_python_makes_the_environment_anew(checkout):
    a_good_machine(checkout)
    make_environment(checkout)
    log(checkout)
    make_environment(checkout, PYTHON="python3")
    assert log(checkout) == []
    tool(checkout, "python3.12", PYTHON.replace("3.11.7", "3.12.1"))
    make_environment(checkout, PYTHON="python3.12")
    assert log(checkout) == ["venv", "pip"]


def run_ci(checkout, present, *, root):
    """What .ci/run does on a machine with these programs: its exit status and commands in order."""
    shutil.copy(ROOT / ".ci" / "run", checkout / ".ci" / "run")
    noting = f'echo "${{0##*/}} $*" >>"{checkout}/log"'
    for name in ("make", "apt-get", *present):
        tool(checkout, name, noting if name in ("make", "apt-get") else "exit 0")
    tool(checkout, "id", f"echo {0 if root else 1000}")
    tool(checkout, "sudo", f'{noting}; while [[ $1 == -* ]]; do shift; done; "$@"')
    (checkout / "bin" / "mktemp").symlink_to(shutil.which("mktemp"))
    bash = shutil.which("bash")
    path = {"PATH": str(checkout / "bin")}
    code = run(bash, str(checkout / ".ci" / "run"), env=path, stdin=subprocess.DEVNULL).returncode
    *before, one, other = (checkout / "log").read_text().splitlines()
    return code, [*before, *sorted([one, other], reverse=True)]  # these two run side by side


def test_ci_installs_nothing_where_all_is_there(checkout):
    everything = ("git", "python3", "google-chrome")
    commands = ["make book", "make test", "make newest"]
    assert run_ci(checkout, everything, root=True) == (0, commands)


@pytest.mark.parametrize("root", [True, False])
def test_ci_installs_a_missing_browser(checkout, root):
    code, commands = run_ci(checkout, ("git", "python3"), root=root)
    assert code == 0
    asked = [command for command in commands if not command.startswith("sudo")]
    assert asked == [
        "apt-get update -q",
        "apt-get install -q -y --no-install-recommends chromium fonts-liberation",
        "make book",
        "make test",
        "make newest",
    ]
    assert len(commands) == len(asked) + (0 if root else 2)


@pytest.mark.parametrize("part", ["book", "test", "newest"])
def test_ci_fails_when_a_part_does(checkout, part):
    tool(checkout, "chromium")
    assert run_ci(checkout, ("git", "python3"), root=True)[0] == 0
    tool(checkout, "make", f'echo "told by $1"; [ "$1" != {part} ]')
    bash, path = shutil.which("bash"), {"PATH": str(checkout / "bin")}
    result = run(bash, str(checkout / ".ci" / "run"), env=path)
    assert result.returncode == 1
    told = ["book"] if part == "book" else ["book", "test", "newest"]
    assert result.stdout.splitlines() == [f"told by {name}" for name in told]


# A Python that passes every check, makes environments of itself and notes what it is asked to run.
NEWEST = """
case "$*" in
    "-c "*) echo {version} ;;
    "-m venv"*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    *"-m pip"*) echo "{version} $2 $3" >>log; {install} ;;
    *) echo "{version} $*" >>log ;;
esac
"""


def newest(checkout, install="true", *others):
    """What .ci/newest prints and runs beside a .venv of Python 3.11, and its exit status."""
    shutil.copy(ROOT / ".ci" / "newest", checkout / ".ci" / "newest")
    for name in ("mkdir", "mktemp", "cp", "rm", "cat", "grep"):
        (checkout / "bin" / name).unlink(missing_ok=True)
        (checkout / "bin" / name).symlink_to(shutil.which(name))
    tool(checkout, "../.venv/bin/python", NEWEST.format(version="3.11", install=install))
    for version in others:
        tool(checkout, f"python{version}", NEWEST.format(version=version, install=install))
    environment = {"PATH": str(checkout / "bin"), "HOME": str(checkout)}
    script = str(checkout / ".ci" / "newest")
    result = run(shutil.which("bash"), script, env=environment)
    log = checkout / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    return result, [" ".join(line.split()[:5]) for line in lines]


@pytest.mark.parametrize(
    ("others", "used"), [((), "3.11"), (("3.12", "3.13"), "3.13"), (("3.14", "3.12"), "3.14")]
)
def test_the_newest_versions_are_tried_on_the_newest_python(checkout, others, used):
    result, done = newest(checkout, "true", *others)
    assert result.returncode == 0, result.stderr
    assert done[0] == "3.11 pip wheel"
    assert sorted(done[1:]) == sorted(
        [  # the last two beside the others
            f"{used} pip install",
            f"{used} -P .ci/smoke.py",
            f"{used} -P -m pytest -q",
            "3.11 pip install",
            "3.11 -P .ci/smoke.py decode",
        ]
    )
    assert ("no newer Python" in result.stdout) == (not others)


def test_an_index_out_of_reach_is_said_and_any_other_failure_fails(checkout):
    broken = "echo 'WARNING: Retrying after connection broken by NewConnectionError' >&2; false"
    result, done = newest(checkout, broken)
    assert (result.returncode, done) == (0, ["3.11 pip wheel"])
    assert "NOT TRIED" in result.stdout
    result, _ = newest(checkout, "echo 'ERROR: ResolutionImpossible' >&2; false")
    assert result.returncode == 1
    assert "ResolutionImpossible" in result.stderr


@pytest.mark.parametrize("part", ["venv/bin", "--target"])
def test_either_part_of_the_newest_versions_can_fail(checkout, part):
    fails = f"[[ $* == *wheel* || $0$* != *{part}* ]] || {{ echo 'ERROR: broken' >&2; false; }}"
    result, done = newest(checkout, fails)
    assert result.returncode == 1
    assert "ERROR: broken" in result.stdout + result.stderr
    assert ("3.11 -P .ci/smoke.py" in done) == (part == "--target")


def test_ci_runs_the_two_commands_of_the_readme(checkout):
    readme = (ROOT / "README.md").read_text(encoding="utf8")
    commands = re.findall(r"^make \w+", readme, re.M)
    _, ran = run_ci(checkout, ("git", "python3", "chromium"), root=True)
    assert commands == ["make book", "make test"] == ran[:2]
    for script in (ROOT / ".ci" / name for name in ("run", "environment", "newest")):
        assert os.access(script, os.X_OK)


def follows(schema, file):
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema]
    return run(*check, str(file)).returncode == 0


@pytest.mark.parametrize(
    ("file", "schema", "needs"),
    [
        (WORKFLOW, "vendor.github-workflows", "runs-on"),
        (WORKFLOW, "custom.github-workflows-require-timeout", "timeout-minutes"),
        (CITATION, "vendor.citation-file-format", "cff-version"),
    ],
)
def test_a_file_that_others_read_follows_its_schema(file, schema, needs, tmp_path):
    assert follows(schema, file)
    broken = tmp_path / file.name
    broken.write_text(file.read_text(encoding="utf8").replace(f"{needs}:", "misspelt:"))
    assert not follows(schema, broken), "the check cannot fail"


def test_the_workflow_uploads_the_pages_that_its_run_builds():
    steps = yaml.safe_load(WORKFLOW.read_text(encoding="utf8"))["jobs"]["book"]["steps"]
    (place,) = [i for i, step in enumerate(steps) if "path" in step.get("with", {})]
    assert Path(steps[place]["with"]["path"]) == book_pages.HTML
    assert ".ci/run" in [step.get("run") for step in steps[:place]]


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """`qstar-book pages` on a book of one page, outside CI."""
    for folder in ("book", "data", "notebooks", "qstar"):
        (tmp_path / folder).mkdir()
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    config = "title: A book\nexecute: {execute_notebooks: 'off'}\n"
    (tmp_path / "book" / "_config.yml").write_text(config)
    (tmp_path / "book" / "_toc.yml").write_text("format: jb-book\nroot: index\n")
    (tmp_path / "book" / "index.md").write_text("# The first text\n")
    monkeypatch.delenv("CI", raising=False)
    return SimpleNamespace(
        ROOT=tmp_path,
        HTML=tmp_path / book_pages.HTML,
        main=lambda force=False: book_pages.command(force=force, root=tmp_path),
    )


def test_the_last_good_pages_outlive_a_build_with_a_warning(pages, capfd):
    assert pages.main() == 0
    index = pages.ROOT / "book" / "index.md"
    index.write_text("# The second text\n\n[](#nowhere)\n")
    assert pages.main() == 1
    assert "'nowhere'" in capfd.readouterr().err
    assert "The first text" in (pages.HTML / "index.html").read_text()


def test_a_build_begins_with_nothing_of_the_one_that_failed(pages, monkeypatch):
    """Sphinx warns of a page only when it reads it, so that a second look would find nothing."""
    there = []

    def fails(root, *command):
        place = Path(command[command.index("--path-output") + 1])
        there.append(place.exists())
        place.mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(wait=lambda: 1)

    monkeypatch.setattr(book_pages, "_start", fails)
    assert (pages.main(), pages.main()) == (1, 1)
    assert there == [False, False]


@pytest.mark.parametrize(
    ("exits", "read"),
    [((0, 1), True), ((1, 0), True), ((0,), False), ((1,), False)],
    ids=["no Chinese", "no English", "not read", "not read, no English"],
)
def test_the_old_pages_stay_unless_both_editions_are_built(pages, monkeypatch, exits, read):
    pages.HTML.mkdir(parents=True)
    (pages.HTML / "index.html").write_text("the old pages")
    config = "title: A book\nsphinx: {config: {translated_pages: [index]}}\n"
    (pages.ROOT / "book" / "_config.yml").write_text(config)
    begun = []

    def build(root, *command):
        made_in = pages.HTML.with_name("fresh") / "_build"
        (made_in / ("zh" if begun else "html")).mkdir(parents=True)
        if read and not begun:
            (made_in / ".doctrees").mkdir()
            (made_in / ".doctrees" / READ).touch()
        begun.append(command)
        code = exits[len(begun) - 1]
        return SimpleNamespace(wait=lambda: code, poll=lambda: None if read else code)

    monkeypatch.setattr(book_pages, "_start", build)
    assert pages.main() == 1
    assert len(begun) == len(exits)
    assert (pages.HTML / "index.html").read_text() == "the old pages"
    begun.clear()
    exits, read = (0, 0), True  # the control
    assert pages.main() == 0
    assert (pages.HTML / "zh").is_dir()


def build_nothing(pages, monkeypatch):
    """Let the pages be empty files, and count how often they are built."""
    builds = []

    def tool(root, *command):
        html = Path(command[command.index("--path-output") + 1]) / "_build" / "html"
        html.mkdir(parents=True)
        (html / "index.html").touch()
        builds.append(command)
        return SimpleNamespace(wait=lambda: 0)

    monkeypatch.setattr(book_pages, "_start", tool)
    return builds


def test_pages_are_built_once_and_their_place_is_said(pages, monkeypatch, capsys):
    builds = build_nothing(pages, monkeypatch)
    assert (pages.main(), pages.main()) == (0, 0)
    assert len(builds) == 1
    place = f"The book: {pages.HTML / 'index.html'}"
    assert capsys.readouterr().out.splitlines() == [place, "The pages are up to date.", place]


def test_pages_are_built_afresh_on_demand_and_in_ci(pages, monkeypatch):
    builds = build_nothing(pages, monkeypatch)
    pages.main()
    pages.main(force=True)
    monkeypatch.setenv("CI", "true")
    pages.main()
    assert len(builds) == 3


def test_pages_are_built_anew_when_anything_they_need_changes(pages, monkeypatch):
    builds = build_nothing(pages, monkeypatch)
    pages.main()
    new = pages.ROOT / "book" / "new.md"
    for count, change in enumerate(
        (
            lambda: (pages.ROOT / "qstar" / "new.py").write_text(""),
            lambda: (pages.ROOT / "data" / "new.json").write_text("{}"),
            lambda: new.write_text("# New\n"),
            lambda: new.rename(new.with_name("renamed.md")),
            lambda: new.with_name("renamed.md").unlink(),
        ),
        start=2,
    ):
        change()
        pages.main()
        pages.main()
        assert len(builds) == count


def test_the_readmes_snippet_prints_what_the_readme_says():
    readme = (ROOT / "README.md").read_text(encoding="utf8")
    snippet = re.findall(r"```python\n(.*?)```", readme, re.S)[0]
    said = re.findall(r"^# (.*)$", snippet, re.M)
    printed = run(sys.executable, "-c", snippet, check=True).stdout.splitlines()
    numbers = [[float(x) for x in re.findall(r"[\d.]+", line)] for line in (*said, *printed)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0, abs=1e-8)
    assert len(numbers) == 2


def test_the_readmes_links_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / name).read_text(encoding="utf8")
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / target).exists(), f"{name} links to {target}"


def in_numbers(svg):
    """The numbers of a picture, and what stands between them."""
    number = r"-?\d+(?:\.\d+)?"
    return [float(n) for n in re.findall(number, svg)], re.split(number, svg)


def test_the_readmes_figure_is_what_the_package_draws():
    kept, drawn = (in_numbers(svg) for svg in (FIGURE.read_text("utf8"), load("figure").drawn()))
    assert kept[1] == drawn[1], "run `make figure`"
    assert kept[0] == pytest.approx(drawn[0], rel=0, abs=0.02), "run `make figure`"
    assert FIGURE.stat().st_size < 60_000
    assert f"](book/{FIGURE.name})" in (ROOT / "README.md").read_text(encoding="utf8")


def test_a_changed_figure_is_noticed():
    numbers, between = in_numbers(FIGURE.read_text("utf8"))
    moved = [numbers[0] + 0.03, *numbers[1:]]
    assert moved != pytest.approx(numbers, rel=0, abs=0.02)
    assert in_numbers(FIGURE.read_text("utf8").replace("<path", "<line", 1))[1] != between


def test_the_readme_cites_what_the_citation_file_says():
    citation = yaml.safe_load(CITATION.read_text(encoding="utf8"))
    known = {name: citation[name] for name in ("authors", "title", "version")}
    assert f"```bibtex\n{bibtex(known)}\n```" in (ROOT / "README.md").read_text(encoding="utf8")
    assert "url    = {https://" in bibtex(known | {"repository-code": "https://x.org/y"})


def test_the_readme_names_every_notebook():
    readme = (ROOT / "README.md").read_text(encoding="utf8")
    notebooks = [f"notebooks/{file.name}" for file in (ROOT / "notebooks").glob("*.ipynb")]
    assert [name for name in notebooks if f"]({name})" not in readme] == []


# --- One public address ----------------------------------------------------------------------


def test_readme_and_citation_hold_the_address_of_the_setting():
    address = load("address")
    for name, block in address.FILES.items():
        text = (ROOT / name).read_text(encoding="utf8")
        assert text == address.filled(text, block(address.repository())), "run `make address`"


def test_no_script_hides_a_module_of_python():
    names = {file.stem for file in (ROOT / ".ci").glob("*.py")}
    assert names & sys.stdlib_module_names == set()


def test_without_an_address_nothing_links_to_one():
    address = load("address")
    assert {block("") for block in address.FILES.values()} == {""}
    for name, block in address.FILES.items():
        text = address.filled((ROOT / name).read_text(encoding="utf8"), block(""))
        assert not re.search(r"github\.com|github\.io|mybinder|colab\.research", text), name


def test_an_address_gives_every_link():
    address = load("address")
    readme, citation = (block(FAKE) for block in address.FILES.values())
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        path = f"Some-Owner/some.name/blob/main/notebooks/{notebook.name}"
        assert f"(https://colab.research.google.com/github/{path})" in readme
        binder = f"Some-Owner/some.name/main?labpath=notebooks%2F{notebook.name}"
        assert f"(https://mybinder.org/v2/gh/{binder})" in readme
    assert f"git clone {FAKE}" in readme
    assert "<https://some-owner.github.io/some.name/>" in readme
    assert yaml.safe_load(citation) == {
        "repository-code": FAKE,
        "url": "https://some-owner.github.io/some.name/",
    }


def test_a_citation_with_an_address_keeps_its_schema(tmp_path):
    address = load("address")
    text = address.filled(CITATION.read_text(encoding="utf8"), address.citation_block(FAKE))
    (tmp_path / CITATION.name).write_text(text)
    assert follows("vendor.citation-file-format", tmp_path / CITATION.name)


def test_the_owners_own_pages_have_no_folder():
    pages = load("address").pages("https://github.com/Owner/owner.github.io")
    assert pages == "https://owner.github.io/"


@pytest.mark.parametrize(
    "wrong", ["owner/name", FAKE + "/", FAKE + ".git", "http://example.org/a/b"]
)
def test_a_wrong_address_is_refused(wrong, tmp_path, monkeypatch):
    address = load("address")
    monkeypatch.setattr(address, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text(f'[tool.qstar]\nrepository = "{wrong}"\n')
    with pytest.raises(ValueError, match=re.escape(repr(wrong))):
        address.repository()


def test_the_versions_agree():
    import qstar

    citation = yaml.safe_load(CITATION.read_text(encoding="utf8"))
    assert {citation["version"], qstar.__version__} == {PYPROJECT["project"]["version"]}


def test_every_record_is_described():
    described = (ROOT / "data" / "README.md").read_text(encoding="utf8")
    records = sorted((ROOT / "data" / "results").iterdir())
    models = [*(ROOT / "data" / "family").iterdir(), *(ROOT / "data" / "adapters").iterdir()]
    names = [f"{file.parent.name}/{file.name}" for file in [*records, *sorted(models)]]
    assert [name for name in names if f"`{name}`" not in described] == []
    assert records
    assert models


def test_no_record_names_a_folder_of_the_machine_that_made_it():
    """Its command is one that others can give."""
    named = re.compile(r"(?<![\w.])/(?:tmp|root|home|work|Users)/\S*")
    assert named.search('"qstar-book record solver --out /tmp/solver.json"')
    found = {}
    for path in sorted((ROOT / "data").rglob("*.json")):
        if names := set(named.findall(path.read_text(encoding="utf8"))):
            found[str(path.relative_to(ROOT))] = names
    assert not found, f"write the last part of each path only: {found}"
