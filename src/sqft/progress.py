"""How long work reports where it is, without knowing who watches.

Functions that may run for more than two seconds take `progress: Progress = SILENT`; the command line
passes one that draws bars with the time left.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

__all__ = ["SILENT", "Progress", "track"]

Item = TypeVar("Item")


class Progress(Protocol):
    """Opens one bar per piece of work."""

    def task(self, description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """A context in which calling the returned function with n says that n more units are done."""


class _Silent:
    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda done: None


SILENT: Progress = _Silent()


def track(items: Sequence[Item], description: str, progress: Progress) -> Iterator[Item]:
    """Iterate over `items` while reporting one unit per item."""
    with progress.task(description, len(items)) as advance:
        for item in items:
            yield item
            advance(1)
