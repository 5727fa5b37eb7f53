"""One process at a time for each stage of a workspace, also between machines that share its file system."""

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from sqft.errors import WorkspaceError

__all__ = ["StageBusyError", "hold", "holders"]

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0


class StageBusyError(WorkspaceError):
    """Another process is at work on it now."""


@contextmanager
def hold(path: Path, what: str, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock file `path` while the block runs; the kernel lets go of it when a process dies.

    what: what is locked, for messages. wait: until another process lets go; else StageBusyError at once.

    Raises: StageBusyError; WorkspaceError where the file system has no locks.
    """
    file = _acquire(path, what, wait)
    try:
        file.seek(0)
        file.truncate()
        file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid()}))
        file.flush()
        yield
    finally:
        with file, suppress(OSError):
            path.unlink()


def holders(folder: Path) -> Iterator[str]:
    """The processes that hold lock files in a folder now."""
    for path in sorted(folder.glob("*.lock")):
        with suppress(FileNotFoundError), path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield _holder(path)


def _acquire(path: Path, what: str, wait: bool) -> IO[str]:
    told = False
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = _try(path)
        if file is not None:
            return file
        if not wait:
            raise StageBusyError(f"{what} is being made by {_holder(path)}")
        if not told:
            logger.warning("waiting for %s, which %s is making", what, _holder(path))
            told = True
        time.sleep(POLL_SECONDS)


def _try(path: Path) -> IO[str] | None:
    """The lock file, locked; None if another process holds it, or has just removed it."""
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                return file
    except BlockingIOError:
        pass
    except OSError as error:
        file.close()
        raise WorkspaceError(
            f"the file system of {path.parent} cannot lock files ({error.strerror}); put runtime.workspace "
            "on one that can"
        ) from error
    except BaseException:
        file.close()
        raise
    file.close()
    return None


def _holder(path: Path) -> str:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return f"process {found['process']} on {found['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
