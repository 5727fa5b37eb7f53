"""A Progress that measures: shared by the tests of what is in memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def anonymous_bytes() -> int:
    """The anonymous memory of this process (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


class Watch:
    """A Progress that notes a figure after every piece of work."""

    def __init__(self, figure: Callable[[], int] = anonymous_bytes) -> None:
        self.figure, self.seen = figure, list[int]()

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Note the figure at every advance."""
        yield lambda done: self.seen.append(self.figure())
