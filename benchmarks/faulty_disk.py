"""File operations that kill, fail or are forgotten: what a crash, a full disk and a power cut do.

`watch` counts every operation that a process makes below a directory and lets something happen at one of
them. What was synced is kept aside meanwhile, so that `power_cut` can put the directory into a state that a
disk may be in afterwards: everything synced is there, of everything else an older, torn or no version.
"""

import errno
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["Shadow", "damage", "fail", "kill", "watch"]

EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def kill() -> None:
    """End this process as the kernel ends it when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    """What the system says when the disk is full."""
    raise OSError(errno.ENOSPC, "No space left on device")


def watch(
    directory: Path, act: Callable[[], None] | None, number: int, *, onwards: bool = False
) -> list[str]:
    """Call `act` before the operation of this number below a directory; the process ends with it.

    onwards: and before each later one that writes. Returns the list that the operations are noted in.
    """
    seen: list[str] = []
    root = str(directory)

    def tick(what: str, path: Any) -> None:
        name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if not name.startswith(root):
            return
        seen.append(f"{what} {name.removeprefix(root)}")
        if act is not None and (len(seen) == number or (onwards and len(seen) > number)):
            act()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or (event == "open" and not _writes(arguments)):
            return
        if not (onwards and event in ("os.remove", "os.rmdir")):
            tick(event, arguments[0])

    sys.addaudithook(hook)
    for module, name in _native():
        original = getattr(module, name)

        def counted(*arguments: Any, original: Any = original, name: str = name, **options: Any) -> Any:
            path = next((a for a in arguments if isinstance(a, str | Path)), None)
            tick(name, path)
            result = original(*arguments, **options)
            tick(f"after {name}", path)
            return result

        setattr(module, name, counted)
    return seen


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    return any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool(flags & WRITING)


def _native() -> list[tuple[Any, str]]:
    """Functions that write without Python's knowledge, where they are called from."""
    import torch

    from sqft import directories
    from sqft.compression import walk
    from sqft.models import tensorfile

    return [(torch, "save"), (walk, "save_file"), (directories, "_exchange"), (tensorfile, "sync_path")]


class Shadow:
    """What of a directory is on the disk: the bytes of synced files, and the names in synced directories.

    It lies in a folder of its own, so that it outlives the process that is killed.
    """

    def __init__(self, directory: Path, place: Path) -> None:
        self.directory, self.place = directory, place
        place.mkdir()
        for path in [directory, *directory.rglob("*")]:  # what was there before is on the disk
            self.note(path)

    def note(self, path: Path) -> None:
        """A file or directory as it is now was synced."""
        inode = path.stat().st_ino
        if path.is_dir():
            names = {child.name: child.stat().st_ino for child in path.iterdir()}
            (self.place / f"{inode}.names").write_text(json.dumps(names))
        else:
            shutil.copyfile(path, self.place / f"{inode}.bytes")
            held = self.place / f"{inode}.held"
            if not held.exists():  # so that the number is not given to another file
                os.link(path, held)

    def follow(self) -> None:
        """From now on, note what this process syncs."""
        fsync = os.fsync

        def noted(descriptor: Any) -> None:
            fsync(descriptor)
            path = Path("/", "proc", "self", "fd", str(descriptor)).readlink()
            if path.is_relative_to(self.directory) and path.exists():
                self.note(path)

        os.fsync = noted  # type: ignore[assignment]

    def power_cut(self, draw: random.Random) -> None:
        """Leave of the directory what may be there after the power went: all that was synced, little else."""
        after = self.directory.with_name(self.directory.name + ".after")
        self._survive(self.directory.stat().st_ino, self._paths(), after, draw)
        shutil.rmtree(self.directory)
        after.rename(self.directory)

    def _paths(self) -> dict[int, Path]:
        return {path.stat().st_ino: path for path in [self.directory, *self.directory.rglob("*")]}

    def _survive(self, inode: int, now: dict[int, Path], target: Path, draw: random.Random) -> None:
        synced, here = self.place / f"{inode}.bytes", now.get(inode)
        listing = self.place / f"{inode}.names"
        if listing.exists() or (here is not None and here.is_dir()):
            target.mkdir()
            names = json.loads(listing.read_text()) if listing.exists() else {}
            if here is not None and here.is_dir() and draw.random() < 0.5:  # the newer names made it
                names = {child.name: child.stat().st_ino for child in here.iterdir()}
            for name, child in names.items():
                self._survive(child, now, target / name, draw)
            return
        old = synced.read_bytes() if synced.exists() else None
        new = here.read_bytes() if here is not None else old
        if old is not None and (old == new or draw.random() < 0.5):
            target.write_bytes(old)
        elif new is not None:
            target.write_bytes(_torn(new, old or b"", draw))
        # else: a name whose file never reached the disk


def _torn(new: bytes, old: bytes, draw: random.Random) -> bytes:
    """A version between the synced and the written one, page by page; pages that never arrived are zero."""
    kind = draw.randrange(4)
    if kind == 0:
        return old
    if kind == 1:
        return bytes(len(new))
    if kind == 2:
        return new[: draw.randrange(len(new) + 1)]
    old = old.ljust(len(new), b"\0")
    pages = (
        (new if draw.random() < 0.5 else old)[start : start + 4096] for start in range(0, len(new), 4096)
    )
    return b"".join(pages)[: len(new)]


def damage(path: Path, draw: random.Random) -> str:
    """Flip a bit of a file, cut it, empty it, zero it or delete it; returns which."""
    kind = draw.choice(["flip", "cut", "empty", "zeros", "delete"])
    content = bytearray(path.read_bytes())
    if kind == "delete":
        path.unlink()
        return kind
    if kind == "flip" and content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del content[draw.randrange(len(content) + 1) :]
    elif kind == "zeros":
        content = bytearray(len(content))
    else:
        content = bytearray()
    path.unlink()  # the file may be linked from elsewhere, as published weights are
    path.write_bytes(content)
    return kind
