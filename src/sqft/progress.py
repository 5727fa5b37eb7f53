"""How long work reports where it is, without knowing who watches.

Functions that may run for more than two seconds take `progress: Progress = SILENT`; the command line
passes one that draws bars with the time left.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

__all__ = ["SILENT", "Advance", "Progress", "errors_only", "track"]

Item = TypeVar("Item")


class Advance(Protocol):
    """Says how many more units are done, and in a few words how it goes."""

    def __call__(self, done: int, note: str = "") -> None:
        """note: shown beside the bar until the next one; empty leaves the last."""


class Progress(Protocol):
    """Opens one bar per piece of work."""

    def task(self, description: str, total: int) -> AbstractContextManager[Advance]:
        """A context in which the returned function is called as units are done."""


class _Silent:
    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        yield _ignore


def _ignore(done: int, note: str = "") -> None:
    pass


SILENT: Progress = _Silent()


def track(items: Sequence[Item], description: str, progress: Progress) -> Iterator[Item]:
    """Iterate over `items` while reporting one unit per item."""
    with progress.task(description, len(items)) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def errors_only(level: Callable[[], int], set_level: Callable[[int], None]) -> Iterator[None]:
    """Keep a library's messages off the screen for a while, but not its errors, by its own two functions."""
    before = level()
    set_level(logging.ERROR)
    try:
        yield
    finally:
        set_level(before)
