"""The runner: it skips only what is unchanged, and no failure or interruption costs a chapter.

The notebooks are tiny and the kernels real; where no kernel is needed none is started.
"""

import ast
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest

from qstar_book import fresh
from qstar_book import run as reproduce
from qstar_book.__main__ import main
from qstar_book._worker import Literals, finished
from qstar_book.closure import imported_files
from qstar_book.files import RefusedError
from qstar_book.parameters import Parameter, check_parameters, read_parameters, read_setting

TAGS = {"parameters": {"tags": ["parameters"]}}
PATIENCE_S = 60.0
"""How long to wait for what must happen. Never waited in full by a runner that works."""


def write_notebook(root, name, *sources, parameters="seed = 0\nname = 'a'"):
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    notebook.cells = [
        nbformat.v4.new_markdown_cell("# Title"),
        nbformat.v4.new_code_cell(parameters, metadata=TAGS["parameters"]),
        *map(nbformat.v4.new_code_cell, sources),
    ]
    path = root / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)
    return path


@pytest.fixture
def root(tmp_path):
    """A checkout with one notebook, some data and a pin."""
    (tmp_path / "data" / "expected").mkdir(parents=True)
    (tmp_path / "data" / "numbers.json").write_text("[1]")
    (tmp_path / "constraints.txt").write_text("# pins\nnumpy==2.0\nnot-there==1.0\n")
    write_notebook(tmp_path, "01_first", "print(seed)")
    return tmp_path


def old_chapter(root, name="01_first"):
    """An executed copy of an earlier run, in the book."""
    chapter = root / "book" / "chapters" / f"{name}.ipynb"
    chapter.parent.mkdir(parents=True, exist_ok=True)
    chapter.write_text("the earlier good copy")
    return chapter


def command(root, *arguments):
    return [sys.executable, "-m", "qstar_book", "run", "--root", str(root), *arguments]


def run(root, *arguments, **environment):
    return subprocess.run(
        command(root, *arguments),
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
    )


def printed(chapter):
    """What the code cells of an executed notebook printed, together."""
    cells = json.loads(chapter.read_text())["cells"]
    return "".join(
        "".join(output["text"])
        for cell in cells
        for output in cell.get("outputs", [])
        if output["output_type"] == "stream"
    )


def wait_for(condition, what):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"still waiting for {what}"
        time.sleep(0.05)


def is_alive(pid):
    """Whether a process still runs; one that only waits to be collected does not."""
    status = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return status.stdout.strip()[:1] not in ("", "Z")


# --- What is asked for: no kernel is started ------------------------------------------------------


def test_parameters_are_read_with_their_defaults(root):
    path = write_notebook(root, "02_more", parameters="seed: int = 3\nrows = [1, 2]  # two\n")
    assert read_parameters(path) == {"seed": Parameter("3"), "rows": Parameter("[1, 2]")}
    write_notebook(root, "03_none", parameters="")
    assert read_parameters(root / "notebooks" / "03_none.ipynb") == {}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("seed=1", 1),
        ("model=HuggingFaceTB/SmolLM2", "HuggingFaceTB/SmolLM2"),
        ("prompt=a=b", "a=b"),
        ("rows=[0.5, 2]", [0.5, 2]),
        ("name='1'", "1"),
        ("name=", ""),
        ("flag=True", True),
    ],
)
def test_a_setting_is_a_literal_or_a_text(text, value):
    assert read_setting(text) == (text.split("=")[0], value)


@pytest.mark.parametrize(
    "text",
    ["seed", "=1", "a b=1", "x={1, 2}", "x=1j", "x={1: 2}", "x=1e999", "x=[1, -1e999]", "x=b'a'"],
)
def test_a_setting_that_is_none_is_refused(text):
    with pytest.raises(RefusedError):
        read_setting(text)


def test_an_unknown_parameter_is_refused_with_the_known_ones(root, capsys):
    write_notebook(root, "02_other", parameters="rows = 1")
    assert main(["run", "--root", str(root), "--set", "sede=1"]) == 2
    said = capsys.readouterr().err
    assert "01_first has no parameter sede; it has seed, name" in said
    assert "02_other has no parameter sede; it has rows" in said
    assert "--only" in said
    assert not (root / "build").exists()


def test_a_parameter_must_be_known_to_every_selected_notebook(root, capsys):
    write_notebook(root, "02_other", parameters="rows = 1")
    assert main(["run", "--root", str(root), "--set", "seed=1"]) == 2
    assert "02_other has no parameter seed; it has rows" in capsys.readouterr().err
    assert (
        main(["run", "--root", str(root), "--only", "01_first", "--set", "seed=1", "--list"]) == 0
    )


@pytest.mark.parametrize("setting", ["seed=abc", "seed=1.5", "seed=True", "name=1"])
def test_a_value_of_another_type_is_refused(root, capsys, setting):
    assert main(["run", "--root", str(root), "--set", setting]) == 2
    assert "of type" in capsys.readouterr().err


def test_an_integer_serves_where_a_float_is_the_default(root):
    path = write_notebook(root, "02_float", parameters="scale = 0.5\nnothing = None")
    check_parameters([path], {"scale": 2, "nothing": "else"})


WHOLE = [
    None,
    True,
    -3,
    10**30,
    -0.0,
    1e-300,
    (1, 0, 0),
    (),
    (2,),
    [0.5, (1, [None, {"a": (True, "b")}])],
    {"a b": -1, "'": [], "c": {}},
    'it\'s "so"\n\tC:\\new {x} %s',
    "茶をどう淹れますか 🍵",
    "\udcff\x00\x1b",
    "None",
    "",
]


@pytest.mark.parametrize("value", WHOLE, ids=ascii)
def test_what_is_accepted_arrives_as_that_value(value):
    name, read = read_setting(f"x={value!r}")
    said = Literals.codify({name: read})
    arrived = {}
    exec(said, arrived)
    assert repr(arrived["x"]) == repr(value) == repr(read)


RANGES = """
seed = 0  # 0..1_000
share = 0.5  # 0..1; of the whole
rest = -1.5  # ..-0.5
law = [0.7, 0.3]  # distribution of 2
other: list = [0.4, 0.6]  # distribution of 2
device = "auto"  # one of auto, cpu, cuda:*
model = "a # b"  # text; or a folder
record = "01_first.ipynb"  # file
widths = [1, 2]  # 1..
free = 3  # in 1..2 it would be said otherwise
bare = "# 1..2"
"""


def test_comments_declare_what_a_parameter_may_be(root):
    path = write_notebook(root, "02_ranges", parameters=RANGES)
    parameters = read_parameters(path)
    assert {name: p.declared for name, p in parameters.items() if p.declared} == {
        "seed": "0..1_000",
        "share": "0..1",
        "rest": "..-0.5",
        "law": "distribution of 2",
        "other": "distribution of 2",
        "device": "one of auto, cpu, cuda:*",
        "model": "text",
        "record": "file",
        "widths": "1..",
    }
    assert parameters["model"].default == "'a # b'"
    assert parameters["bare"].default == "'# 1..2'"


@pytest.mark.parametrize(
    ("accepted", "refused", "message"),
    [
        ("seed=1000", "seed=-1", "seed must be at least 0 and at most 1_000; got -1"),
        ("seed=0", "seed=1001", "at most 1_000"),
        ("seed=0x10", f"seed={10**400}", "at most 1_000"),
        ("seed=7", "seed=None", "seed is of type int"),
        ("share=1", "share=1.01", "share must be at least 0 and at most 1"),
        ("rest=-2", "rest=0", "rest must be at most -0.5; got 0"),
        ("law=(0.5, 0.5)", "law=[0.5, 0.6]", "law must be 2 positive probabilities that sum to 1"),
        ("law=[0.9, 0.1]", "law=(1, 0)", r"positive probabilities that sum to 1; got \(1, 0\)"),
        ("law=[0.2, 0.8]", "law=[0.2, 0.3, 0.5]", "law must be 2 positive"),
        ("law=[0.2, 0.8]", "law=['a', 'b']", "law must be 2 positive"),
        ("other=[0.3, 0.7]", "law=[0.4, 0.6]", r"law and other must differ; got \[0.4, 0.6\]"),
        ("device=cuda:1", "device=tpu", "device must be one of auto, cpu, cuda"),
        ("model=x", "model=", "model must be a text that is not empty"),
        ("record=01_first.ipynb", "record=none.json", "record must be a file, as seen from"),
        ("widths=[3]", "widths=[3, 0]", r"widths must be at least 1; got \[3, 0\]"),
        ("widths=(3, 4)", "widths=[True]", "widths must be at least 1"),
        ("widths=[]", "widths=[[1]]", "widths must be at least 1"),
        ("free=-100", "free=1.5", "free is of type int"),
    ],
)
def test_a_value_out_of_range_is_refused_before_anything_runs(
    root, capsys, accepted, refused, message
):
    write_notebook(root, "02_ranges", parameters=RANGES)
    arguments = ["--root", str(root), "--only", "02_ranges"]
    assert main(["run", *arguments, "--set", accepted, "--list"]) == 0
    capsys.readouterr()
    assert main(["run", *arguments, "--set", refused]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (root / "build").exists()


BOOK = Path(__file__).resolve().parents[2]
CHAPTERS = sorted((BOOK / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", CHAPTERS, ids=lambda path: path.stem)
def test_every_chapter_says_what_its_parameters_may_be(notebook):
    """Its own defaults are; each number and list is limited, on both sides where it is a count."""
    known = read_parameters(notebook)
    defaults = {name: ast.literal_eval(parameter.default) for name, parameter in known.items()}
    check_parameters([notebook], defaults)
    wrong = {int: [-1, -(10**9), 10**12, 1.5, True], list: [[], [0.5, 0.6], (1, 0, 0), "x"]}
    for name, default in defaults.items():
        for value in [None, {}, *wrong.get(type(default), [1])]:
            with pytest.raises(RefusedError, match=f"{notebook.stem}: {name} (is|must)"):
                check_parameters([notebook], {name: value})
        if name in ("model", "device", "benchmark_record"):
            assert known[name].declared
            with pytest.raises(RefusedError, match=f"{name} must be"):
                check_parameters([notebook], {name: " "})


@pytest.mark.parametrize("name", ["02_second", "02_second.ipynb"])
def test_a_notebook_is_found_by_name_or_file(root, name):
    second = write_notebook(root, "02_second")
    assert reproduce.select(root / "notebooks", [name]) == [second]
    assert reproduce.select(root / "notebooks", [str(second)]) == [second]


@pytest.mark.parametrize("name", ["7", "second", "02_sec", "/elsewhere/02_second.ipynb"])
def test_a_name_that_fits_no_notebook_is_refused_with_those_there_are(root, name):
    write_notebook(root, "02_second")
    with pytest.raises(RefusedError, match=r"there are: 01_first, 02_second"):
        reproduce.select(root / "notebooks", [name])


def test_listing_shows_parameters_and_state_and_runs_nothing(root, capsys):
    assert main(["run", "--root", str(root), "--list"]) == 0
    said = capsys.readouterr().out
    assert "01_first: not run yet\n    seed = 0\n    name = 'a'\n" in said
    assert not (root / "book").exists()


@pytest.mark.parametrize("arguments", [["--jobs", "0"], ["--limit", "0"], ["--limit", "nan"]])
def test_a_senseless_limit_is_refused(root, arguments):
    assert main(["run", "--root", str(root), *arguments]) == 2


# --- What is up to date: no kernel is started -----------------------------------------------------


def pretend_it_ran(root, *packages):
    """Leave what a good run would have left."""
    notebook = root / "notebooks" / "01_first.ipynb"
    chapter = old_chapter(root)
    record = chapter.parent / fresh.RECORDS / "01_first.json"
    record.parent.mkdir(exist_ok=True)
    made = fresh.made_from(notebook, {}, root, packages=packages)
    output = fresh.digest(chapter.read_bytes())
    record.write_text(json.dumps({"made_from": made, "output": output}))
    return notebook, chapter.parent


@pytest.fixture
def ran(root):
    package = root / "package"
    (package / "deep").mkdir(parents=True)
    (package / "__init__.py").write_text("_ON_FIRST_USE = {'late': '.lazy'}")
    (package / "solve.py").write_text("from . import deep")
    (package / "deep" / "__init__.py").write_text("def f():\n    from ..inside import x")
    for name in ("inside", "dotted", "lazy", "unused"):
        (package / f"{name}.py").write_text("x = 1")
    code = "%matplotlib inline\nimport package\nfrom package.solve import x"
    write_notebook(root, "01_first", code, "package.dotted.x + package.late")
    notebook, out = pretend_it_ran(root, package)

    def reasons(parameters=None):
        made = fresh.made_from(notebook, parameters or {}, root, packages=[package])
        return fresh.out_of_date(notebook, out, made)

    return reasons


def test_what_a_package_loads_late_is_followed_under_every_name(tmp_path):
    """A chapter depends on the figures that it draws, however it calls their package."""
    folder = tmp_path / "whole" / "figures"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "__init__.py").write_text("_ON_FIRST_USE = {'bars': '.one', 'dots': '.two'}")
    for name in ("one", "two"):
        (folder / f"{name}.py").touch()
    for code in (
        "from whole import figures\nfigures.bars()",
        "from whole import figures as f\nf.bars()",
        "import whole.figures as f\nf.bars()",
        "import whole\nwhole.figures.bars()",
        "from whole.figures import bars",
    ):
        found = imported_files(code, [folder.parent])
        assert [name.rpartition(".")[2] for name in found] == ["whole", "figures", "one"], code


def append(path, text=" "):
    with path.open("a") as file:
        file.write(text)


def test_nothing_changed_is_up_to_date(root, ran):
    assert ran() == []


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("notebooks/01_first.ipynb", "notebook changed"),
        ("package/__init__.py", "modules that it imports changed"),
        ("package/solve.py", "modules that it imports changed"),
        ("package/deep/__init__.py", "modules that it imports changed"),
        ("package/inside.py", "modules that it imports changed"),
        ("package/dotted.py", "modules that it imports changed"),
        ("package/lazy.py", "modules that it imports changed"),
        ("data/numbers.json", "data changed"),
        ("book/chapters/01_first.ipynb", "the executed copy is not what the last run wrote"),
        ("book/chapters/.runner/01_first.json", "no record of the last run"),
    ],
)
def test_a_changed_file_makes_a_chapter_out_of_date(root, ran, file, reason):
    append(root / file, "\n" if file.startswith("notebooks") else "\n#")
    assert ran() == [reason]


def test_a_new_file_of_data_makes_a_chapter_out_of_date(root, ran):
    (root / "data" / "results").mkdir()
    (root / "data" / "results" / "new.csv").touch()
    assert ran() == ["data changed"]


def test_a_module_that_takes_the_place_of_a_name_makes_a_chapter_out_of_date(root, ran):
    (root / "package" / "solve").mkdir()
    (root / "package" / "solve.py").rename(root / "package" / "solve" / "x.py")
    assert ran() == ["modules that it imports changed"]


def test_a_renamed_file_makes_a_chapter_out_of_date(root, ran):
    (root / "data" / "numbers.json").rename(root / "data" / "renamed.json")
    assert ran() == ["data changed"]


def test_a_moved_pin_makes_a_chapter_out_of_date_and_a_comment_does_not(root, ran):
    append(root / "constraints.txt", "# a comment\n")
    assert ran() == []
    append(root / "constraints.txt", "scipy==1.0\n")
    assert ran() == ["pins changed"]


def test_what_no_notebook_reads_changes_nothing(root, ran):
    (root / "data" / "expected" / "01_first.json").write_text("{}")
    (root / "data" / "claims.yaml").write_text("claims: []")
    (root / "package" / "__pycache__").mkdir()
    (root / "package" / "__pycache__" / "solve.pyc").touch()
    (root / "package" / ".solve.py.swp").touch()
    append(root / "package" / "unused.py", "y = 2")
    (root / "package" / "new.py").touch()
    assert ran() == []


USED = """
import sys
{imports}
print(*(name for name in sys.modules if name.split(".")[0] in ("qstar", "qstar_book")))
"""


@pytest.mark.parametrize("only", ["kl_*", "*"])
def test_what_the_notebooks_load_is_what_they_are_said_to_import(only):
    """The controls: a closure of nothing, and of the imports that stand at the top, miss some."""
    code = ""
    for path in sorted((fresh.PACKAGES[0].parent / "notebooks").glob(f"{only}.ipynb")):
        cells = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
        code += "\n".join(cells) + "\n"
    tree = ast.parse(code)
    imports = [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    lines = [line for line in imports if "qstar" in line]
    names = [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    lines += [name for name in names if re.fullmatch(r"figures\.\w+", name)]  # loaded on first use
    program = USED.replace("{imports}", "\n".join(lines))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert len(loaded) > 10
    assert loaded <= set(imported_files(code, fresh.PACKAGES))
    assert not loaded <= set(imported_files("", fresh.PACKAGES))
    assert not loaded <= set(imported_files(code, fresh.PACKAGES[:1]))


def test_code_that_cannot_be_read_is_taken_to_import_everything(ran, root):
    everything = imported_files("%%bash\nls $HOME", [root / "package"])
    assert {"package.unused", "package.deep"} < set(everything)


def test_scipy_s_distributions_are_taken_to_be_handed_to_the_families():
    solved = "import qstar\nfrom scipy.stats import norm\nqstar.kl(norm(), norm(1))"
    assert "qstar.families.exponential" in imported_files(solved, fresh.PACKAGES)
    plain = "import qstar\nqstar.kl([0.0], [0.0])"
    assert "qstar.families.exponential" not in imported_files(plain, fresh.PACKAGES)


def test_a_family_is_imported_by_the_chapters_on_families_alone():
    importing = set()
    for path in (fresh.PACKAGES[0].parent / "notebooks").glob("*.ipynb"):
        code = "\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code")
        if "qstar.families.exponential" in imported_files(code, fresh.PACKAGES):
            importing.add(path.stem)
    assert "beyond_gaussians" in importing
    assert not importing & {"kl_symmetry", "solving_alpha", "speculative_decoding"}


def test_parameters_versions_and_machine_make_a_chapter_out_of_date(root, ran, monkeypatch):
    assert ran({"seed": 1}) == ["parameters changed"]
    version = fresh.installed_version
    monkeypatch.setattr(fresh, "installed_version", lambda name: version(name) + "1")
    assert ran() == ["pins changed"]
    monkeypatch.setattr(fresh, "installed_version", version)
    monkeypatch.setattr(fresh.platform, "python_version", lambda: "4.0.0")
    assert ran() == ["pins changed"]
    monkeypatch.undo()
    monkeypatch.setattr(fresh, "accelerators", lambda: "nvidia0")
    assert ran() == ["machine changed"]


def test_no_chapter_is_out_of_date(root, ran):
    (root / "book" / "chapters" / "01_first.ipynb").unlink()
    assert ran() == ["not run yet"]


def test_a_notebook_that_ended_its_kernel_is_not_finished():
    cell = {"cell_type": "code", "source": "exit()", "metadata": {}, "outputs": []}
    executed = {"cells": [{**cell, "execution_count": None}], "metadata": {}}
    with pytest.raises(ValueError, match="cell 1 was not executed"):
        finished(executed, {})


def test_a_chapter_without_a_notebook_is_removed(root, capsys):
    pretend_it_ran(root, *fresh.PACKAGES)
    gone = old_chapter(root, "09_gone")
    assert main(["run", "--root", str(root)]) == 0
    captured = capsys.readouterr()
    assert "1 up to date" in captured.out
    assert "09_gone: removed" in captured.err
    assert not gone.exists()


def test_a_second_run_waits_or_gives_up(root, capsys):
    _, out = pretend_it_ran(root, *fresh.PACKAGES)
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert main(["run", "--root", str(root), "--no-wait"]) == 2
    assert "another run is writing to" in capsys.readouterr().err
    with subprocess.Popen(command(root), stderr=subprocess.PIPE, text=True) as waiting:
        assert "waiting for its end" in waiting.stderr.readline()
        os.close(handle)
        assert waiting.wait(PATIENCE_S) == 0


# --- A failure, shown -----------------------------------------------------------------------------

TRACEBACK = [
    "\x1b[31m-----\x1b[39m",
    "\x1b[31mValueError\x1b[39m  Traceback (most recent call last)",
    "\x1b[36mCell\x1b[39m \x1b[32mIn[3]\x1b[39m, line 30\n     29 b\n\x1b[32m---> 30\x1b[39m c",
    "\x1b[36mFile \x1b[39m\x1b[32m/pkg/solve.py:12\x1b[39m, in \x1b[36m_check\x1b[39m(x)\n-> 12 y",
    "\x1b[31mValueError\x1b[39m: row 0 sums to 3",
]


def test_a_failure_shows_the_cell_the_line_and_the_error_in_plain_text():
    said = reproduce.describe(7, "not shown", TRACEBACK)
    assert said.splitlines() == [
        "failed in cell 7",
        "    Cell In[3], line 30",
        "         29 b",
        "    ---> 30 c",
        "    File /pkg/solve.py:12, in _check(x)",
        "    -> 12 y",
        "    ValueError: row 0 sums to 3",
    ]
    long = [TRACEBACK[2], "ValueError: " + "one more line\n" * 1000]
    assert len(reproduce.describe(7, "", long).splitlines()) < 30


def test_a_failure_without_a_traceback_shows_the_cell_and_what_was_said():
    said = reproduce.describe(2, "x = 1", ["DeadKernelError: Kernel died"])
    assert said.splitlines() == [
        "failed in cell 2",
        "    x = 1",
        "    DeadKernelError: Kernel died",
    ]


def test_progress_is_what_papermill_saved_last(tmp_path):
    copy = tmp_path / "executed.ipynb"
    assert reproduce.progress(copy) == 0
    states = ["completed", "completed", "running", "pending"]
    cells = [{"source": "", "metadata": {"papermill": {"status": state}}} for state in states]
    copy.write_text(json.dumps({"cells": cells}))
    assert reproduce.progress(copy) == 2
    copy.write_text('{"cells": [')
    assert reproduce.progress(copy) == 0


# --- Real kernels ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ran(tmp_path_factory):
    """Two notebooks at once, a good one and one that fails, for a user with odd settings."""
    root = tmp_path_factory.mktemp("checkout")
    write_notebook(
        root,
        "01_good",
        "import os, sys, matplotlib\nprint(sys.executable, os.path.basename(os.getcwd()))",
        "import matplotlib.pyplot as plt\nplt.plot([1, 2]);",
        "assert 'from_profile' not in globals() and plt.rcParams['lines.linewidth'] == 1.5",
    )
    write_notebook(root, "02_bad", "x = 1\nraise ValueError('row 0 sums to 3')", "y = 2")
    old_chapter(root, "02_bad")
    home = root / "home"
    kernel = home / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    spec = {"argv": ["/bin/false"], "display_name": "Another Python", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    startup = home / ".ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text("from_profile = True")
    (home / "matplotlibrc").write_text("lines.linewidth: 9")
    result = run(
        root,
        HOME=str(home),
        JUPYTER_PATH=str(home / "jupyter"),
        JUPYTER_DATA_DIR=str(home / "jupyter"),
        MATPLOTLIBRC=str(home),
        MPLBACKEND="agg",
    )
    return root, result


def test_a_failure_leaves_the_others_and_the_earlier_copy_alone(two_ran):
    root, result = two_ran
    chapters = root / "book" / "chapters"
    assert result.returncode == 1, result.stderr
    assert result.stdout.endswith("1 executed, 1 failed (02_bad)\n")
    assert re.search(r"^01_good: done in \d+ s$", result.stderr, re.M)
    assert (chapters / "02_bad.ipynb").read_text() == "the earlier good copy"
    assert [path.name for path in (chapters / ".runner").iterdir()] == ["01_good.json"]


def test_a_failure_shows_the_cell_and_keeps_the_failed_copy(two_ran):
    root, result = two_ran
    failed = root / "build" / "failed" / "02_bad.ipynb"
    shown = [
        "02_bad: failed in cell 3",
        "    Cell In[2], line 2",
        "          1 x = 1",
        "    ----> 2 raise ValueError('row 0 sums to 3')",
        "    ValueError: row 0 sums to 3",
        f"    The copy with its outputs and the traceback: {failed}",
        f"    The earlier good copy is kept: {root / 'book' / 'chapters' / '02_bad.ipynb'}",
    ]
    assert "\n".join(shown) in result.stderr
    errors = [
        output["ename"]
        for cell in json.loads(failed.read_text())["cells"]
        for output in cell.get("outputs", [])
        if output["output_type"] == "error"
    ]
    assert errors == ["ValueError"]


def test_a_chapter_ran_in_this_python_with_nobodys_settings(two_ran):
    root, _ = two_ran
    chapter = root / "book" / "chapters" / "01_good.ipynb"
    assert printed(chapter) == f"{sys.executable} notebooks\n"
    assert "image/svg+xml" in chapter.read_text(), "the inline backend draws"


def test_a_chapter_holds_no_times_and_no_paths(two_ran):
    root, _ = two_ran
    chapter = root / "book" / "chapters" / "01_good.ipynb"
    notebook = json.loads(chapter.read_text())
    nbformat.validate(nbformat.read(chapter, as_version=nbformat.NO_CONVERT))
    metadata = json.dumps([notebook["metadata"], *(c["metadata"] for c in notebook["cells"])])
    for word in ("papermill", "_time", "duration", str(root)):
        assert word not in metadata
    record = notebook["metadata"]["qstar"]
    assert record["parameters"] == {}
    assert set(record) == {"accelerators", "packages", "parameters", "python"}


def test_the_same_run_gives_the_same_bytes_and_an_unchanged_one_is_skipped(two_ran):
    root, _ = two_ran
    chapter = root / "book" / "chapters" / "01_good.ipynb"
    before, written = chapter.read_bytes(), chapter.stat().st_mtime_ns
    skipped = run(root, "--only", "01_good")
    assert (skipped.returncode, skipped.stderr) == (0, "")
    assert skipped.stdout.endswith("1 up to date\n")
    assert chapter.stat().st_mtime_ns == written
    forced = run(root, "--only", "01_good", "--force")
    assert forced.stdout.endswith("1 executed\n")
    assert chapter.stat().st_mtime_ns != written
    assert chapter.read_bytes() == before


def test_a_run_with_other_parameters_stays_out_of_the_book(root):
    chapter = old_chapter(root)
    write_notebook(
        root, "01_first", "print(seed, pair)", parameters="seed = 0\nname = ''\npair = [1]"
    )
    more = "--set", "pair=(1, None)"
    result = run(root, "--set", "seed=5", "--set", "name=a b/{c}", *more)
    assert result.returncode == 0, result.stderr
    assert chapter.read_text() == "the earlier good copy"
    (copy,) = (root / "build" / "runs").glob("name=a_b_*seed=5-*/01_first.ipynb")
    assert printed(copy) == "5 (1, None)\n"
    assert json.loads(copy.read_text())["metadata"]["qstar"]["parameters"] == {
        "name": "'a b/{c}'",
        "pair": "(1, None)",
        "seed": "5",
    }


# --- Interruptions: kernels that would run for minutes --------------------------------------------

SLEEP = """\
import os, pathlib, subprocess, time
if not pathlib.Path("go").exists():
    child = subprocess.Popen(["sleep", "300"])
    pathlib.Path("pids").write_text(f"{os.getppid()} {os.getpid()} {child.pid}")
    time.sleep(300)
"""


def asleep(root):
    """The worker, the kernel and its child, once the cell is being executed."""
    pids = root / "notebooks" / "pids"
    found = pids.read_text().split() if pids.exists() else []
    return [int(pid) for pid in found] if len(found) == 3 else []


@contextmanager
def sleeping(root):
    """The runner, at a moment when a cell is being executed, and the processes under it."""
    write_notebook(root, "01_first", SLEEP, "print('woken')")
    # A shell that starts the tests in the background has SIGINT ignored in all that they start.
    as_it_was = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        runner = subprocess.Popen(command(root), stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, as_it_was)
    with runner:  # closes its pipe and waits for its end
        try:
            wait_for(lambda: asleep(root), "the cell to start")
            yield runner, asleep(root)
        finally:
            runner.kill()


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_leaves_the_old_chapter_and_no_process(root, kind):
    chapter = old_chapter(root)
    with sleeping(root) as (runner, pids):
        runner.send_signal(kind)
        _, said = runner.communicate(timeout=PATIENCE_S)
    assert runner.returncode == (130 if kind == signal.SIGINT else -kind)
    assert chapter.read_text() == "the earlier good copy"
    wait_for(lambda: not any(map(is_alive, pids)), "worker, kernel and its child to end")
    if kind == signal.SIGINT:
        assert "interrupted" in said
        assert not (root / "build" / "failed").exists()
        return
    (root / "notebooks" / "go").touch()
    again = run(root)
    assert again.returncode == 0, again.stderr
    assert printed(chapter) == "woken\n"


def test_a_kernel_that_dies_is_a_failure_of_its_notebook_alone(root):
    write_notebook(root, "01_first", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    write_notebook(root, "02_second", "print('alive')")
    result = run(root, "--jobs", "1")
    assert result.returncode == 1
    assert "01_first: failed in cell 3\n    import os, signal\n" in result.stderr
    assert "DeadKernelError: Kernel died" in result.stderr
    assert printed(root / "book" / "chapters" / "02_second.ipynb") == "alive\n"


def test_a_notebook_over_its_limit_is_stopped(root, monkeypatch, capsys):
    """Its time is over once its cell is being executed, however busy the machine."""
    chapter = old_chapter(root)
    write_notebook(root, "01_first", SLEEP)
    monkeypatch.setattr(reproduce, "_seconds_since", lambda _: 601.0 if asleep(root) else 599.0)
    assert main(["run", "--root", str(root), "--limit", "600"]) == 1
    assert "stopped after 600 s, its limit (--limit)" in capsys.readouterr().err
    assert chapter.read_text() == "the earlier good copy"
    family = asleep(root)
    wait_for(lambda: not any(map(is_alive, family)), "worker, kernel and its child to end")


def test_plain_papermill_runs_a_notebook_of_the_book(tmp_path):
    """As the README says: papermill, a parameter, no runner."""
    papermill = shutil.which("papermill", path=Path(sys.executable).parent)
    source = fresh.PACKAGES[0].parent / "notebooks" / "kl_symmetry.ipynb"
    out = tmp_path / "out.ipynb"
    quick = [papermill, str(source), str(out), "-p", "trials", "100", "--no-progress-bar"]
    result = subprocess.run(quick, capture_output=True, text=True, cwd=source.parent)
    assert result.returncode == 0, result.stderr
    assert "injected-parameters" in out.read_text()
