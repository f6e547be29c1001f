"""What the process of one notebook does: let papermill execute it, and end with the runner."""

import json
import os
import platform
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import papermill  # type: ignore[import-untyped]
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from papermill.translators import (  # type: ignore[import-untyped]
    PythonTranslator,
    papermill_translators,
)

from .files import write_json
from .fresh import accelerators, installed_version

NAMED = ("numpy", "scipy", "matplotlib", "torch", "transformers")
"""The packages whose versions an executed copy states."""

DRAWING = (
    "--InlineBackend.figure_formats=svg",
    "--InlineBackend.figure_formats=png",
    "--InlineBackend.rc=svg.hashsalt=qstar",
)
"""What the kernel is told: figures as SVG, with the same names inside in every run, and as PNG."""

MANAGERS = list[Any]()


class ThisPython(AsyncKernelManager):
    """Kernels of this interpreter, whatever `python3` means to the user's Jupyter."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        MANAGERS.append(self)

    @property
    def kernel_spec(self) -> KernelSpec:
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", *DRAWING]
        return KernelSpec(
            argv=command,
            display_name="Python 3",
            language="python",
            env={"SOURCE_DATE_EPOCH": "0"},  # no date in a figure
        )


class Literals(PythonTranslator):  # type: ignore[misc]
    """Writes parameters as Python does; papermill's own writes a tuple as the text of it."""

    @classmethod
    def translate(cls, val: object) -> str:
        return repr(val)


def execute(folder: str, cwd: str, parameters: Mapping[str, object]) -> None:
    """Execute the notebook that lies in a folder, and leave it there as the book takes it.

    Papermill saves the copy before and after each cell.
    """
    threading.Thread(target=_end_with_the_runner, daemon=True).start()
    papermill_translators.register("python", Literals)
    executed = Path(folder, "executed.ipynb")
    papermill.execute_notebook(
        f"{folder}/source.ipynb",
        executed,
        parameters=parameters,
        cwd=cwd,
        progress_bar=False,
        start_timeout=120,
        kernel_manager_class=ThisPython,
        record_timing=False,
    )
    write_json(
        Path(folder, "finished.ipynb"), finished(json.loads(executed.read_bytes()), parameters)
    )


def finished(executed: dict[str, Any], parameters: Mapping[str, object]) -> dict[str, Any]:
    """An executed notebook as the book takes it: the same on every run, no times, no paths.

    Args:
        executed: What papermill wrote, as JSON data; changed in place.
        parameters: What replaced the defaults; recorded in its metadata, with the versions.

    Raises:
        ValueError: A code cell was not executed (the notebook ended its own kernel).
    """
    for number, cell in enumerate(executed["cells"], 1):
        metadata = cell["metadata"]
        for key in ("papermill", "execution", *([] if metadata.get("tags") else ["tags"])):
            metadata.pop(key, None)
        if "injected-parameters" in metadata.get("tags", []):
            cell["id"] = "injected-parameters"  # papermill draws one at random
        if cell["cell_type"] == "code" and "".join(cell["source"]).strip():
            if cell["execution_count"] is None:
                raise ValueError(f"cell {number} was not executed, and no earlier one failed")
            for output in cell["outputs"]:
                if output["output_type"] == "error":  # papermill takes exit() for a good end
                    raise ValueError(f"cell {number} ended with {output['ename']}")
    executed["metadata"].pop("papermill", None)
    executed["metadata"]["qstar"] = {
        "parameters": {name: repr(value) for name, value in sorted(parameters.items())},
        "python": platform.python_version(),
        "packages": {name: installed_version(name) for name in NAMED},
        "accelerators": accelerators(),
    }
    return executed


def _end_with_the_runner() -> None:
    """Kill the kernel and all that it started, once the runner closes its end or is no more."""
    os.read(0, 1)
    for manager in MANAGERS:
        with suppress(AttributeError, ProcessLookupError, PermissionError, TypeError):
            os.killpg(manager.provisioner.pid, signal.SIGKILL)
    os._exit(1)
