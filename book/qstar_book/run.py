"""Execute the notebooks into the book, each only when something that it is made from has changed.

    qstar-book run                           # all of them, into book/chapters/
    qstar-book run --list                    # their parameters, and what is up to date
    qstar-book run --only NAME --set seed=1  # one, into build/runs/, not into the book

What a chapter hangs on: `qstar_book.fresh`. Each notebook is executed by papermill in a process of
its own and a fresh kernel of this very Python, whatever other kernels, IPython profile or
matplotlib settings the user has. Its executed copy is stripped of times and paths and then renamed
into place, so that at any moment, and after any interruption, a chapter is either the old one or
the new one. A notebook that fails leaves the old one, and itself in `build/failed/`.
"""

import datetime
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import RefusedError, find_checkout, short, write_json
from .fresh import PACKAGES, digest, made_from, modules_of, out_of_date, record_of
from .parameters import check_parameters, read_cells, read_parameters, read_setting

HEARTBEAT_S = 60.0
GRACE_S = 5.0
SHOWN_LINES = 25


@dataclass(frozen=True, slots=True)
class Job:
    """What the notebooks of one run share.

    Attributes:
        out: The folder of the executed copies.
        parameters: What replaces the defaults of the parameters cells.
        root: The checkout.
        failed: The folder for copies that failed.
        scratch: A folder with one for each notebook.
        threads: Of each kernel.
        limit_s: The seconds that a notebook may take.
        stop: Set when everything has to end.
    """

    out: Path
    parameters: Mapping[str, object]
    root: Path
    failed: Path
    scratch: Path
    threads: int
    limit_s: float
    stop: threading.Event

    def copy(self, notebook: Path) -> Path:
        """What papermill saves of a notebook before and after each of its cells."""
        return self.scratch / notebook.stem / "executed.ipynb"


# --- One notebook --------------------------------------------------------------------------------


def execute(notebook: Path, job: Job) -> tuple[bool, str]:
    """Execute a notebook as it is now and put it in place: whether that went well, and what to say.

    If not, its earlier copy in `job.out` is as it was.
    """
    made = made_from(notebook, job.parameters, job.root)
    copy, started = job.copy(notebook), time.monotonic()
    with _worker(notebook, job) as worker:
        late = False
        while worker.poll() is None and not late and not job.stop.wait(0.1):
            late = _seconds_since(started) > job.limit_s
    if job.stop.is_set():
        return False, "interrupted"
    problem = f"stopped after {job.limit_s:g} s, its limit (--limit)" if late else ""
    if worker.returncode and not late:
        said = (copy.parent / "log").read_text(errors="replace").splitlines()
        said = said[-1:] if worker.returncode == 1 else said[-15:]  # 1: what Python raised
        problem = "\n".join([*said, f"its process ended with {worker.returncode}"])
    if problem:
        return False, _with_places(_failure(copy, problem), notebook, job)
    record, chapter = record_of(notebook, job.out), job.out / notebook.name
    record.unlink(missing_ok=True)
    write_json(chapter, json.loads((copy.parent / "finished.ipynb").read_bytes()))
    if made_from(notebook, job.parameters, job.root) == made:  # else: edited while it ran
        run = {"day": datetime.date.today().isoformat(), "commit": _commit(job.root)}
        output = digest(chapter.read_bytes())
        write_json(record, {"output": output, "made_from": made, "run": run})
    (job.failed / notebook.name).unlink(missing_ok=True)
    return True, f"done in {_seconds_since(started):.0f} s"


def _seconds_since(started: float) -> float:
    return time.monotonic() - started


@contextmanager
def _worker(notebook: Path, job: Job) -> Iterator[subprocess.Popen[bytes]]:
    """The process that executes a notebook; it lives as long as its standard input is open."""
    folder = job.copy(notebook).parent
    folder.mkdir()
    shutil.copyfile(notebook, folder / "source.ipynb")
    (folder / "matplotlibrc").touch()
    given = f"{str(folder)!r}, {str(notebook.parent)!r}, {dict(job.parameters)!r}"
    code = f"from qstar_book._worker import execute; execute({given})"
    above = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    environment = {
        "OMP_NUM_THREADS": str(job.threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait for one beside foreign load do not spin
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*dict.fromkeys(str(p.parent) for p in PACKAGES), *above]),
        "PYTHONHASHSEED": "0",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "MATPLOTLIBRC": str(folder / "matplotlibrc"),  # nobody's own settings
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "TQDM_DISABLE": "1",  # a chapter is no place for the debris of progress bars
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    with (folder / "log").open("wb") as log:
        worker = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the runner alone, and it ends the others
        )
    assert worker.stdin is not None
    try:
        yield worker
    finally:
        worker.stdin.close()
        try:
            worker.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def _failure(copy: Path, problem: str) -> str:
    """What went wrong, by the copy that was being executed: the cell that failed or ran last."""
    number, source, trace = 0, "", list[str]()
    with suppress(RefusedError, OSError):
        mark = "papermill-error-cell-tag"
        cells = [c for c in read_cells(copy) if mark not in c["metadata"].get("tags", [])]
        for place, cell in enumerate(cells, 1):
            if cell["metadata"].get("papermill", {}).get("start_time"):
                number, source = place, cell["source"]
                errors = [o for o in cell.get("outputs", []) if o["output_type"] == "error"]
                trace = errors[0]["traceback"] if errors else []
    return describe(number, source, trace or [problem])


def describe(number: int, source: str, trace: Sequence[str]) -> str:
    """A failure in a page: the cell, the line, the place where it was raised and the error.

    Args:
        number: Of the cell; 0 if none had begun.
        source: The cell.
        trace: IPython's traceback: entries with an arrow at a line, the last frame and the error;
            or one entry, what else was said.
    """
    entries = [re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", entry).strip("\n") for entry in trace]
    in_the_cell = [entry for entry in entries if entry.startswith("Cell In")]
    shown = dict.fromkeys([*(in_the_cell or [source]), *entries[-2:]])
    lines = "\n".join(entry for entry in shown if entry).splitlines()
    if len(lines) > SHOWN_LINES:
        lines = [*lines[: SHOWN_LINES // 2], "...", *lines[-SHOWN_LINES // 2 :]]
    head = f"failed in cell {number}" if number else "failed before its first cell"
    return "\n    ".join([head, *lines])


def _commit(root: Path) -> str:
    """The commit that is checked out, with what differs from it said; "" where git cannot tell."""
    git = ["git", "-C", str(root)]
    told = [
        subprocess.run([*git, *words], capture_output=True, text=True)
        for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"])
    ]
    if any(one.returncode for one in told):
        return ""
    return told[0].stdout.strip() + (" with changes" if told[1].stdout.strip() else "")


def _with_places(problem: str, notebook: Path, job: Job) -> str:
    """The failure, and where to look: keeps the copy that failed, if there is a whole one."""
    with suppress(OSError, ValueError):
        json.loads(job.copy(notebook).read_bytes())
        job.failed.mkdir(parents=True, exist_ok=True)
        kept = shutil.copyfile(job.copy(notebook), job.failed / notebook.name)
        problem += f"\n    The copy with its outputs and the traceback: {short(kept)}"
    if (chapter := job.out / notebook.name).exists():
        problem += f"\n    The earlier good copy is kept: {short(chapter)}"
    return problem


# --- All of them ---------------------------------------------------------------------------------


def execute_all(notebooks: Sequence[Path], jobs: int, job: Job) -> list[str]:
    """Execute notebooks, `jobs` at a time; every one has its turn, whatever fails.

    Progress goes to standard error: a bar on a terminal, lines in a log.

    Returns:
        The names of those that failed.
    """
    from tqdm import tqdm

    sizes = {path: len(read_cells(path)) + bool(job.parameters) for path in notebooks}
    options: dict[str, Any] = {"leave": False, "dynamic_ncols": True, "disable": None}
    options["bar_format"] = "{desc} {bar} {n_fmt}/{total_fmt} cells, {elapsed}"
    failures, over = [], 0
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=sum(sizes.values()), **options) as bar:
        futures = {pool.submit(execute, notebook, job): notebook for notebook in notebooks}
        try:
            while futures:
                pause = HEARTBEAT_S if bar.disable else 0.5
                ended, _ = wait(futures, pause, return_when=FIRST_COMPLETED)
                for future in ended:
                    notebook, (good, said) = futures.pop(future), future.result()
                    bar.write(f"{notebook.stem}: {said}", file=sys.stderr)
                    failures += [] if good else [notebook.stem]
                    over += sizes[notebook]
                running = [notebook for future, notebook in futures.items() if future.running()]
                done = [progress(job.copy(notebook)) for notebook in running]
                if bar.disable and not ended:
                    for notebook, cells in zip(running, done, strict=True):
                        said = f"{notebook.stem}: {cells} of {sizes[notebook]} cells done"
                        print(said, file=sys.stderr, flush=True)
                bar.update(max(0, over + sum(done) - bar.n))
                bar.set_description_str(", ".join(notebook.stem for notebook in running))
        finally:
            job.stop.set()
            pool.shutdown(cancel_futures=True)
    return sorted(failures)


def progress(copy: Path) -> int:
    """How many cells of a notebook are done, by the copy that papermill saved last."""
    with suppress(OSError, ValueError):  # not begun, or being written
        states = [cell["metadata"].get("papermill", {}).get("status") for cell in read_cells(copy)]
        return states.count("completed")
    return 0


def select(folder: Path, only: Collection[str] | None) -> list[Path]:
    """The notebooks in a folder, or those of them that are named, by name or path.

    Raises:
        RefusedError: A name fits none of them; the message lists them.
    """
    notebooks = sorted(path for path in folder.glob("*.ipynb") if not path.name.startswith("."))
    if only is None:
        return notebooks
    chosen = set()
    for wanted in only:
        name = Path(wanted).stem if wanted.endswith(".ipynb") else wanted
        found = {path for path in notebooks if path.stem == name}
        if "/" in wanted:
            found = {path for path in found if path.resolve() == Path(wanted).resolve()}
        if not found:
            there_are = ", ".join(path.stem for path in notebooks) or "none"
            raise RefusedError(f"no notebook {wanted!r} in {folder}; there are: {there_are}")
        chosen |= found
    return sorted(chosen)


# --- The command ---------------------------------------------------------------------------------


def command(
    *,
    only: Collection[str] | None,
    settings: Sequence[str],
    force: bool,
    only_list: bool,
    jobs: int,
    limit: float,
    out: Path | None,
    no_wait: bool,
    root: Path | None,
) -> int:
    """`qstar-book run`; 1 if a notebook failed."""
    if jobs < 1 or not limit > 0:
        raise RefusedError("--jobs and --limit must be positive")
    root = find_checkout(root)
    book = root / "book" / "chapters"
    parameters = dict(map(read_setting, settings))
    notebooks = select(root / "notebooks", only)
    check_parameters(notebooks, parameters)
    runs = root / "build" / "runs"
    out = out.resolve() if out else runs / _run_name(parameters) if parameters else book
    if only_list:
        print("\n".join(_listing(notebooks, out, parameters, root)))
        return 0
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out, wait=not no_wait):
        if out == book:
            _remove_strays(out, {path.name for path in select(root / "notebooks", None)})
        due = [
            notebook
            for notebook in notebooks
            if force or out_of_date(notebook, out, made_from(notebook, parameters, root))
        ]
        failures: Sequence[str] = ()
        # Who imports the most takes longest, and would keep the others' cores waiting at the end.
        due.sort(key=lambda notebook: len(modules_of(notebook)), reverse=True)
        if due:
            room = tempfile.TemporaryDirectory(prefix="qstar-book-", ignore_cleanup_errors=True)
            with room as scratch:
                job = Job(
                    out,
                    parameters,
                    root,
                    failed=root / "build" / "failed" if out == book else out / "failed",
                    scratch=Path(scratch),
                    threads=max(1, _cores() // min(jobs, len(due))),
                    limit_s=limit,
                    stop=threading.Event(),
                )
                failures = execute_all(due, jobs, job)
    counts = {
        "executed": len(due) - len(failures),
        "up to date": len(notebooks) - len(due),
        "failed": len(failures),
    }
    said = ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "no notebooks"
    print(f"{short(out)}: {said}" + (f" ({', '.join(failures)})" if failures else ""))
    return 1 if failures else 0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_name(parameters: Mapping[str, object]) -> str:
    """A folder name that tells runs apart, and a reader which one this is."""
    said = ",".join(f"{name}={value}" for name, value in sorted(parameters.items()))
    readable = re.sub(r"[^\w=,.+-]+", "_", said)[:60]
    return f"{readable}-{digest(repr(sorted(parameters.items())).encode())[:6]}"


def _listing(
    notebooks: Sequence[Path], out: Path, parameters: Mapping[str, object], root: Path
) -> Iterator[str]:
    yield f"Into {short(out)}:"
    for notebook in notebooks:
        reasons = out_of_date(notebook, out, made_from(notebook, parameters, root))
        yield f"{notebook.stem}: {', '.join(reasons) or 'up to date'}"
        for name, parameter in read_parameters(notebook).items():
            changed = f"  (here {parameters[name]!r})" if name in parameters else ""
            allowed = f"  # {parameter.declared}" if parameter.declared else ""
            yield f"    {name} = {parameter.default}{allowed}{changed}"


def _remove_strays(book: Path, names: Collection[str]) -> None:
    """Remove chapters whose notebook is no more, and what was recorded of them."""
    for chapter in book.glob("*.ipynb"):
        if chapter.name not in names:
            chapter.unlink()
            record_of(chapter, book).unlink(missing_ok=True)
            print(f"{chapter.stem}: removed, its notebook is no more", file=sys.stderr)


@contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[None]:
    """Be the only run that writes to a folder; the lock goes with the process, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"another run is writing to {short(folder)}"
            if not wait:
                raise RefusedError(f"{message}; start again when it has ended") from None
            print(f"qstar-book: {message}; waiting for its end", file=sys.stderr, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
