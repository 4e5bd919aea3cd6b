"""How does one notebook run? In a kernel of its own, watched, its end told by exceptions alone."""

import contextlib
import os
import platform
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil

from helpers.run.profiles import Step
from helpers.store import ROOT

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "numpy",
    "scipy",
    "pandas",
    "statsmodels",
)
COLOURS = re.compile(r"\x1b\[[\d;]*m")
# the first arrow of a traceback: the cell's own line
FAILING_LINE = re.compile(r"-+> \d+ +(.*)")


class NotebookFailed(Exception):
    """A notebook did not come to its end; the message says which, where and why."""


def execute(step: Step, part: Path) -> None:
    """Run the notebook into `part`. Raises NotebookFailed unless every cell ran: after a killed
    kernel papermill's output looks finished, so only exceptions and counts are believed."""
    import papermill  # slow to import, and not needed to skip
    from nbclient.exceptions import DeadKernelError

    name = step.notebook.name
    part.parent.mkdir(parents=True, exist_ok=True)
    with (
        patch.dict(os.environ, kernel_variables(step.threads)),
        tempfile.TemporaryDirectory() as folder,
    ):
        try:
            book = papermill.execute_notebook(
                step.notebook.path,
                part,
                parameters=step.parameters,
                kernel_name="python3",
                cwd=ROOT,
                progress_bar={"desc": name, "leave": False, "disable": None},
                # bars of long steps
                stderr_file=sys.stderr if sys.stderr.isatty() else None,
                **_private_kernel(folder),
            )
        except papermill.PapermillExecutionError as error:
            raise NotebookFailed(_told(name, error, part)) from error
        except DeadKernelError as error:
            raise NotebookFailed(
                f"{name} stopped: its kernel was killed, perhaps for want of memory; the same "
                f"command takes it up again\nIts output so far: {part}"
            ) from error
    for i, cell in enumerate(book.cells, 1):
        runs = cell.cell_type == "code" and cell.source.strip()
        if runs and cell.execution_count is None:  # a notebook that left by sys.exit
            raise NotebookFailed(f"{name} stopped before its end, at cell {i}: {part}")


def kernel_variables(threads: int) -> dict[str, str]:
    """What a kernel's process must know before it loads a numerical library."""
    count = str(threads)
    return {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        # this environment's kernel, whatever else is registered
        "JUPYTER_PREFER_ENV_PATH": "1",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }


def _private_kernel(folder: str) -> dict[str, Any]:
    """A kernel whose messages go through files in `folder`: no ports to race for."""
    from traitlets.config import Config

    manager = {"transport": "ipc", "connection_file": f"{folder}/kernel.json"}
    return {
        "config": Config({"KernelManager": manager}),
        # it logs that it is told to stop
        "extra_arguments": ["--IPKernelApp.log_level=50"],
    }


def _told(name: str, error: Any, part: Path) -> str:
    trace = COLOURS.sub("", "\n".join(error.traceback))
    line = FAILING_LINE.search(trace)
    where = f" ({line[1]})" if line else ""
    return (
        f"{name} failed in In [{error.exec_count}]{where}: {error.ename}: {error.evalue}\n"
        f"Its output so far, with the traceback: {part}"
    )


@contextlib.contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Yield a list whose one item grows to the most bytes that we and our children held."""
    peak, stop = [0], threading.Event()

    def sample() -> None:
        this = psutil.Process()
        while not stop.wait(0.5):
            processes = [this, *this.children(recursive=True)]
            peak[0] = max(peak[0], sum(map(_resident, processes)))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        stop.set()
        sampler.join()


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:  # it ended since it was listed
        return 0


def machine() -> str:
    """This machine in words."""
    memory = psutil.virtual_memory().total / 1e9
    parts = [f"{os.cpu_count()} cores", f"{memory:.0f} GB", *_gpus()]
    parts += [
        f"{platform.system()} {platform.machine()}",
        f"Python {platform.python_version()}",
    ]
    return ", ".join(parts)


def _gpus(folder: Path = Path("/proc/driver/nvidia/gpus")) -> list[str]:
    """The names of the NVIDIA devices, as their driver tells them: no library need be loaded."""
    files = sorted(folder.glob("*/information"))
    text = "\n".join(file.read_text() for file in files)
    return re.findall(r"^Model:\s*(.+?)\s*$", text, flags=re.MULTILINE)


def package_versions() -> dict[str, str]:
    """Versions of the packages that results depend on; one that is not installed is left out."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def versions() -> str:
    """The packages that results depend on, in one line."""
    packages = ", ".join(
        f"{name} {version}" for name, version in package_versions().items()
    )
    return f"Python {platform.python_version()}, {packages}"
