"""Published numbers: the guard works on tiny chapters, and the real chapters pass it."""

import json
import math
import re
from contextlib import suppress
from pathlib import Path

import nbformat
import pytest

from qstar_book import numbers
from qstar_book.__main__ import main
from qstar_book.numbers import Expected

ROOT = Path(__file__).resolve().parents[2]
HELD = sorted((ROOT / "data" / "expected").glob("*.json"))
PREFIX = "application/papermill.record/"


def glued(name, text, *, kind="text/plain", prefix=PREFIX):
    """The output that `myst_nb.glue` leaves."""
    return nbformat.v4.new_output(
        "display_data",
        data={prefix + kind: text},
        metadata={"scrapbook": {"name": name, "mime_prefix": prefix}},
    )


def write_chapter(folder, name="01_first", **values):
    """An executed chapter that glued these values; a string is taken as what was displayed."""
    shown = {key: value if isinstance(value, str) else repr(value) for key, value in values.items()}
    outputs = [glued(key, text) for key, text in shown.items()]
    chapter = folder / f"{name}.ipynb"
    chapter.parent.mkdir(parents=True, exist_ok=True)
    cells = [nbformat.v4.new_code_cell("pass", outputs=outputs)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), chapter)
    return chapter


@pytest.fixture
def folders(tmp_path):
    return tmp_path / "chapters", tmp_path / "expected"


def drifts(chapter, entries, tmp_path):
    held = tmp_path / "held.json"
    numbers.write_expected(held, entries)
    return [(drift.name, drift.problem) for drift in numbers.compare(chapter, held)]


# --- Reading -------------------------------------------------------------------------------------


def test_glued_values_keep_their_type_and_every_bit(tmp_path):
    values = {"a": 0.1 + 0.2, "b": 3, "c": True, "d": -1e-300, "e": math.inf}
    chapter = write_chapter(tmp_path, **values, f="'refuted'")
    read = numbers.read_glued(chapter)
    assert read == {**values, "f": "refuted"}
    assert list(map(type, read.values())) == [float, int, bool, float, float, str]


def test_a_glued_nan_is_read_as_nan(tmp_path):
    assert math.isnan(numbers.read_glued(write_chapter(tmp_path, a="nan"))["a"])


def test_figures_are_names_and_not_numbers(tmp_path):
    output = glued("fig", "aGVsbG8=", kind="image/png")
    output["data"][PREFIX + "text/plain"] = "<Figure size 640x480 with 1 Axes>"
    cells = [nbformat.v4.new_code_cell("pass", outputs=[output, glued("x", "1.5", prefix="")])]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "01.ipynb")
    assert numbers.read_glued(tmp_path / "01.ipynb") == {"x": 1.5}
    assert numbers.read_figure_names(tmp_path / "01.ipynb") == {"fig"}


@pytest.mark.parametrize("shown", ["np.float64(0.5)", "[1, 2]", "None", "tensor(0.5)", "1j"])
def test_only_plain_values_can_be_published(tmp_path, shown):
    with pytest.raises(ValueError, match=r"glues 'a' to .*; glue a plain float"):
        numbers.read_glued(write_chapter(tmp_path, a=shown))


def test_a_name_glued_twice_is_refused(tmp_path):
    outputs = [glued("a", "1"), glued("a", "1")]
    cells = [nbformat.v4.new_code_cell("pass", outputs=outputs)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "01.ipynb")
    with pytest.raises(ValueError, match="'a' twice"):
        numbers.read_glued(tmp_path / "01.ipynb")


def test_expected_values_survive_the_file_to_the_last_bit(tmp_path):
    values = {"a": 0.1 + 0.2, "b": math.inf, "c": -math.inf, "d": "text", "e": False, "f": 10**20}
    entries = {name: Expected(value, 1e-9, "seeded run") for name, value in values.items()}
    numbers.write_expected(tmp_path / "x.json", dict(reversed(entries.items())))
    assert numbers.read_expected(tmp_path / "x.json") == entries
    assert list(json.loads((tmp_path / "x.json").read_text())) == sorted(entries)
    numbers.write_expected(tmp_path / "n.json", {"a": Expected(math.nan, 0, "no q*")})
    assert math.isnan(numbers.read_expected(tmp_path / "n.json")["a"].value)
    assert "NaN" not in (tmp_path / "n.json").read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["n.json", "x.json"]


GOOD = {"value": 1.0, "tolerance": 0.1, "origin": "closed form"}


@pytest.mark.parametrize(
    "entry",
    [
        1.0,
        {"value": 1.0, "tolerance": 0.1},
        {**GOOD, "note": ""},
        {**GOOD, "tolerance": -1},
        {**GOOD, "tolerance": math.inf},
        {**GOOD, "tolerance": math.nan},
        {**GOOD, "tolerance": True},
        {**GOOD, "tolerance": "0.1"},
        {**GOOD, "origin": ""},
        {**GOOD, "origin": "two\nlines"},
        {**GOOD, "value": [1]},
        {**GOOD, "value": None},
    ],
)
def test_an_entry_without_value_tolerance_and_origin_is_refused(tmp_path, entry):
    (tmp_path / "x.json").write_text(json.dumps({"a": entry}))
    with pytest.raises(ValueError, match=r"x\.json: 'a'"):
        numbers.read_expected(tmp_path / "x.json")


# --- Comparing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("got", "expected", "same"),
    [
        (1.05, Expected(1.0, 0.1, ""), True),
        (1.15, Expected(1.0, 0.1, ""), False),
        (0.85, Expected(1.0, 0.1, ""), False),
        (1.0, Expected(1.0, 0.0, ""), True),
        (math.nextafter(1.0, 2.0), Expected(1.0, 0.0, ""), False),
        (math.nan, Expected(math.nan, 0.1, ""), True),
        (math.nan, Expected(1.0, 0.1, ""), False),
        (1.0, Expected(math.nan, 0.1, ""), False),
        (math.inf, Expected(math.inf, 0.1, ""), True),
        (-math.inf, Expected(math.inf, 0.1, ""), False),
        (math.inf, Expected(1.0, 0.1, ""), False),
        (5, Expected(4, 1, ""), True),
        (6, Expected(4, 1, ""), False),
        (4.0, Expected(4, 1, ""), False),
        (True, Expected(1, 1, ""), False),
        (False, Expected(True, 1, ""), False),
        ("refuted", Expected("refuted", 0, ""), True),
        ("refuted", Expected("confirmed", 1e9, ""), False),
    ],
)
def test_values_agree_within_the_tolerance_and_types_exactly(got, expected, same):
    assert numbers.agrees(got, expected) is same


def test_a_drift_a_missing_and_an_unpublished_name_are_told(tmp_path):
    chapter = write_chapter(tmp_path, kept=1.0, moved=2.0, new=3.0)
    entries = {
        "kept": Expected(1.0 + 1e-7, 1e-6, "closed form"),
        "moved": Expected(2.1, 1e-6, "closed form"),
        "gone": Expected(4.0, 1e-6, "closed form"),
    }
    assert drifts(chapter, entries, tmp_path) == [
        ("gone", "no longer glued"),
        ("moved", "drifted"),
        ("new", "not in data/expected: accept it"),
    ]


def test_an_origin_that_nobody_wrote_is_told(tmp_path):
    chapter = write_chapter(tmp_path, a=1.0)
    assert drifts(chapter, {"a": Expected(1.0, 0, numbers.TODO)}, tmp_path) == [
        ("a", "origin not written")
    ]
    assert drifts(chapter, {"a": Expected(1.0, 0, "closed form")}, tmp_path) == []


def test_a_chapter_that_was_not_executed_is_told(folders):
    chapters, expected = folders
    numbers.write_expected(expected / "07_lost.json", {})
    (drift,) = numbers.check(chapters, expected)["07_lost"]
    assert "not executed" in drift.problem


def test_a_name_glued_by_two_chapters_is_told(folders):
    chapters, expected = folders
    for name in ("01_first", "02_second"):
        write_chapter(chapters, name, a=1)
        numbers.write_expected(expected / f"{name}.json", {"a": Expected(1, 0, "count")})
    found = numbers.check(chapters, expected)
    assert list(found) == ["02_second"]
    assert found["02_second"][0].problem == "also glued by 01_first"


# --- The commands --------------------------------------------------------------------------------


def command(folders, *arguments):
    chapters, expected = map(str, folders)
    return main([*arguments, "--chapters", chapters, "--expected", expected])


def test_accepting_fills_in_what_checking_then_holds(folders, capsys):
    chapters, expected = folders
    write_chapter(chapters, a=0.25, b=3, c="'refuted'", d=0.0)
    assert command(folders, "accept", "01_first") == 0
    held = numbers.read_expected(expected / "01_first.json")
    assert {name: entry.tolerance for name, entry in held.items()} == {
        "a": 2e-7,
        "b": 0,
        "c": 0,
        "d": 1e-12,
    }
    assert command(folders, "check") == 1, "the origins are still to be written"
    assert "origin not written" in capsys.readouterr().out
    (expected / "01_first.json").unlink()
    given = ("--origin", "closed form", "--tolerance", "0.5")
    assert command(folders, "accept", "01_first", *given) == 0
    assert command(folders, "check") == 0
    held = numbers.read_expected(expected / "01_first.json")
    assert [entry.tolerance for entry in held.values()] == [0.5, 0.5, 0, 0.5]
    write_chapter(chapters, a=0.85, b=3, c="'refuted'", d=0.0)
    capsys.readouterr()
    assert command(folders, "check") == 1
    row = r"01_first +a +drifted +0\.25 +0\.85 +0\.5"
    assert re.search(row, capsys.readouterr().out)


def test_accepting_keeps_tolerances_origins_and_what_did_not_drift(folders, capsys):
    chapters, expected = folders
    held = expected / "01_first.json"
    entries = {
        "near": Expected(1.0, 0.1, "sampled"),
        "far": Expected(1.0, 0.1, "sampled"),
        "retyped": Expected(1, 0.1, "counted"),
        "gone": Expected(1.0, 0.1, "sampled"),
    }
    numbers.write_expected(held, entries)
    write_chapter(chapters, near=1.05, far=2.0, retyped=1.0)
    assert command(folders, "accept") == 0
    assert numbers.read_expected(held) == {
        "near": entries["near"],
        "far": Expected(2.0, 0.1, "sampled"),
        "retyped": Expected(1.0, 1e-6, numbers.TODO),
    }
    said = capsys.readouterr().out
    for line in ("~ far: 1.0 -> 2.0", "+ retyped: 1.0", "- gone: 1.0"):
        assert line in said
    before = held.stat().st_mtime_ns
    assert command(folders, "accept") == 0
    assert held.stat().st_mtime_ns == before, "nothing changed, nothing is written"


def test_accepting_a_chapter_that_is_not_there_is_an_error(folders, capsys):
    assert command(folders, "accept", "notebooks/09_none.ipynb") == 2
    assert "09_none.ipynb: run qstar-book run" in capsys.readouterr().err


def test_a_stale_chapter_is_named(tmp_path, capsys):
    chapters = tmp_path / "book" / "chapters"
    write_chapter(chapters, a=1)
    write_chapter(tmp_path / "notebooks", a=1)
    command((chapters, tmp_path / "expected"), "check")
    assert "01_first is out of date (no record of the last run)" in capsys.readouterr().err


# --- The book ------------------------------------------------------------------------------------


def test_the_book_publishes_what_a_fresh_run_gives(chapters):
    found = numbers.check(chapters, ROOT / "data" / "expected")
    assert not found, "\n" + numbers.table(found)
    assert {file.stem for file in (ROOT / "data" / "expected").iterdir()} == {
        file.stem for file in (ROOT / "notebooks").glob("*.ipynb")
    }


def numbers_in(case):
    """Every number that stands in a reference case, at any depth."""
    if isinstance(case, dict | list):
        for item in case.values() if isinstance(case, dict) else case:
            yield from numbers_in(item)
    else:
        with suppress(ValueError, TypeError):
            yield float(case)


@pytest.mark.parametrize("file", HELD, ids=lambda file: file.stem)
def test_an_origin_that_names_a_reference_case_tells_the_truth(file):
    text = (ROOT / "data" / "reference_cases.json").read_text(encoding="utf8")
    cases = {case["id"]: case for case in json.loads(text)["cases"]}
    for name, entry in numbers.read_expected(file).items():
        if named := re.match(r"reference case (\w+)", entry.origin):
            assert named[1] in cases, f"{name}: {entry.origin}"
        if named and entry.origin.endswith("30 digits"):
            near = [abs(number - entry.value) for number in numbers_in(cases[named[1]])]
            assert min(near) <= min(entry.tolerance, 1e-6), f"{name} is not in {named[1]}"


def test_a_chapter_shows_no_warning_no_address_and_no_folder_of_a_machine(chapters):
    """What a clean run on another machine would not show has no place in the book."""
    for chapter in chapters.glob("*.ipynb"):
        for cell in json.loads(chapter.read_text(encoding="utf8"))["cells"]:
            for output in cell.get("outputs", []):
                text = "".join(output.get("text", output.get("data", {}).get("text/plain", "")))
                where = f"{chapter.stem}: {text[:200]}"
                assert output.get("name") != "stderr", where
                assert not re.search(r" at 0x[0-9a-f]{6}|/site-packages/", text), where
                assert str(ROOT) not in text, where


REFERENCE = re.compile(
    r"\{glue(?::\w*)?\}`(?P<role>[^`]+)`"  # {glue:text}`key:.3f`
    r"|^[ \t]*(?:`{3,}|:{3,})\{(?:glue(?::\w*)?|pasted-figure)\}[ \t]*(?P<directive>\S+)",
    re.MULTILINE,
)


def references(text, home):
    """(chapter, key, format) of every glue reference in a piece of MyST Markdown."""
    for found in REFERENCE.finditer(text):
        target = found["role"] or found["directive"]
        chapter, _, rest = target.rpartition("::")
        key, _, form = rest.partition(":")
        yield Path(chapter).stem if chapter else home, key, form


def test_references_are_found_in_roles_and_directives():
    text = (
        "is {glue:text}`ch1-a:.3f`, {glue:}`ch1-b`, {glue:text}`chapters/02_x.ipynb::ch2-c:s`\n"
        ":::{pasted-figure} chapters/01_y.ipynb::ch1-fig\n:::\n```{glue:figure} ch1-d\n```\n"
    )
    assert list(references(text, "01_y")) == [
        ("01_y", "ch1-a", ".3f"),
        ("01_y", "ch1-b", ""),
        ("02_x", "ch2-c", "s"),
        ("01_y", "ch1-fig", ""),
        ("01_y", "ch1-d", ""),
    ]


def prose():
    """(chapter or None, text) of everything a reader is shown: prose, captions, pages."""
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in json.loads(notebook.read_text(encoding="utf8"))["cells"]:
            if cell["cell_type"] == "markdown":
                yield notebook.stem, "".join(cell["source"])
            figure = cell["metadata"].get("mystnb", {}).get("figure", {})
            yield notebook.stem, figure.get("caption", "")
    for page in (ROOT / "book").glob("*.md"):
        yield None, page.read_text(encoding="utf8")


def test_every_number_that_is_shown_is_glued_and_can_be_formatted(chapters):
    """A number may be glued and not shown: it is held like the others."""
    values = {file.stem: numbers.read_glued(file) for file in chapters.glob("*.ipynb")}
    figures = {file.stem: numbers.read_figure_names(file) for file in chapters.glob("*.ipynb")}
    shown = {reference for home, text in prose() for reference in references(text, home)}
    wrong = []
    for chapter, key, form in sorted(shown, key=str):
        if key in values.get(chapter, {}):
            value = values[chapter][key]
            try:
                format(value, form)
            except ValueError as error:
                wrong.append(f"{key} of {chapter}: {value!r} shown as {form!r}: {error}")
        elif key not in figures.get(chapter, ()):
            wrong.append(f"{key} of {chapter} is shown and not glued")
    assert wrong == []
