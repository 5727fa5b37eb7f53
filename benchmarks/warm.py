"""Tries in children forked from a process that has imported everything: a hundredth of a start each."""

import importlib
import os
import pkgutil
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import sqft

__all__ = ["Ended", "import_everything", "run_child"]

POLL_SECONDS = 0.002


@dataclass(frozen=True)
class Ended:
    """How a child ended. code: of a signal, its negative number. peak_bytes: the most it held in memory.

    seconds: of the processor, which a busy machine does not make longer.
    """

    code: int
    said: str
    seconds: float
    peak_bytes: int

    @property
    def is_clean(self) -> bool:
        """Whether it did what it was asked, or said what is wrong in a line, without a traceback."""
        return self.code == 0 or (self.code == 2 and len(self.complaints) == 1)

    @property
    def complaints(self) -> list[str]:
        """The lines that the command line ends with; a traceback counts as none."""
        if "Traceback (most recent call last)" in self.said:
            return []
        lines = [line for line in self.said.splitlines() if line.startswith("sqft: ")]
        return [line for line in lines if not line.startswith(("sqft: WARNING", "sqft: warning"))]


def import_everything() -> None:
    """Import every module, so that children need not."""
    for module in pkgutil.walk_packages(sqft.__path__, "sqft."):
        if not module.name.startswith(("sqft.kernels", "sqft.runtimes", "sqft.__main__")):
            importlib.import_module(module.name)


def run_child(
    work: Callable[[], int],
    *,
    seconds: float = 120,
    processor_seconds: int | None = None,
    memory_bytes: int | None = None,
) -> Ended:
    """Run `work` in a forked child and wait for it; killed after so long.

    processor_seconds: the time of the processor that it may take. memory_bytes: what it may allocate beyond
    what this process has.
    """
    output = tempfile.TemporaryFile()  # noqa: SIM115  the child's too
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        code = 70
        try:
            # torch renews its thread pool in the first operation after a fork, and two threads that come to
            # it at once (a loader's) find none: "Invalid thread pool!", one fork in eighty. Here one comes
            torch.set_num_threads(torch.get_num_threads())
            if processor_seconds is not None:
                resource.setrlimit(resource.RLIMIT_CPU, (processor_seconds, processor_seconds))
            if memory_bytes is not None:
                limit = _address_space() + memory_bytes
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            code = work()
        except BaseException:
            import traceback

            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    while True:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if found:
            break
        if time.monotonic() > started + seconds:
            os.kill(child, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    output.seek(0)
    said = output.read().decode(errors="replace")
    code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return Ended(code, said, usage.ru_utime + usage.ru_stime, 1024 * usage.ru_maxrss)


def _address_space() -> int:
    """The bytes of address space that this process has (Linux)."""
    pages = int(Path("/", "proc", "self", "statm").read_text().split()[0])
    return pages * resource.getpagesize()
