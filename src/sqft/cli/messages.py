"""What the terminal shows beside a command's result: progress bars, warnings, and how a killed run ends."""

import logging
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Any, Self

import sqft
from sqft.progress import Advance

__all__ = ["RichProgress", "catch_termination", "quiet_warnings", "verbosity"]

PACKAGE = Path(sqft.__file__).parent
NOTABLE_SECONDS = 2.0
# -1: errors alone; 0: warnings and progress; 1: what each stage does as well.
verbosity: ContextVar[int] = ContextVar("verbosity", default=0)


class RichProgress:
    """Bars with the time left, on a terminal; one line for each longer piece of work in a log file."""

    def __init__(self) -> None:
        from rich.console import Console

        self._told = verbosity.get() >= 0
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._console = Console(stderr=True, highlight=False)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
            console=self._console,
            transient=True,
            disable=not (self._console.is_terminal and self._told),
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        """One bar; when it is done and took a while, a line with its time stays."""
        started = time.monotonic()
        bar = self._bars.add_task(description, total=total or None, note="")
        try:

            def advance(done: int, note: str = "") -> None:
                self._bars.advance(bar, done)
                if note:
                    self._bars.update(bar, note=note)

            yield advance
            seconds = time.monotonic() - started
            if seconds >= NOTABLE_SECONDS and self._told:
                self._console.print(f"{description}  {seconds:.0f} s", style="dim", markup=False)
        finally:
            self._bars.remove_task(bar)


@contextmanager
def quiet_warnings() -> Iterator[None]:
    """Show sqft's own warnings and log lines as single lines; leave out those of the libraries underneath."""

    def show(message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
        if Path(filename).is_relative_to(PACKAGE) and verbosity.get() >= 0:
            print("sqft: warning: " + " ".join(str(message).split()), file=sys.stderr)

    logger = logging.getLogger("sqft")
    handler = logging.StreamHandler()
    handler.setLevel(logging.ERROR if verbosity.get() < 0 else logging.NOTSET)
    handler.setFormatter(logging.Formatter("sqft: %(levelname)s: %(message)s"))
    logger.addHandler(handler)
    with warnings.catch_warnings():
        warnings.showwarning = show
        try:
            yield
        finally:
            logger.removeHandler(handler)


@contextmanager
def catch_termination() -> Iterator[None]:
    """Let SIGTERM end a run as Ctrl-C does, so that what is open is closed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
