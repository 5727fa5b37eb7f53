"""A Progress that measures: shared by the tests of what is in memory."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqft.progress import Advance


def anonymous_bytes() -> int:
    """The anonymous memory of this process (Linux), without what the allocator keeps of freed memory.

    A worker that ran other tests before holds free pages by the megabyte, and gets or returns them at any
    time.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
    if trim is not None:
        trim(0)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


class Watch:
    """A Progress that notes a figure after every piece of work."""

    def __init__(self, figure: Callable[[], int] = anonymous_bytes) -> None:
        self.figure, self.seen = figure, list[int]()

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        """Note the figure at every advance."""
        yield lambda done, note="": self.seen.append(self.figure())
