"""Directories that appear whole, that are known to be ours, and that never replace what others made.

A directory is built as `NAME.partial` and gets its name in one step. By its mark (marks.py) ours can be told
from a user's, also after an edit, and nothing but what is ours and unchanged is ever replaced or removed.
"""

import ctypes
import errno
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import IO, Any

from sqft.artifacts import TEMPORARY, digest_file, replace_file, sync_path, sync_tree
from sqft.errors import ExportError, WorkspaceError
from sqft.marks import (
    BEING_BUILT,
    MARK,
    Mark,
    changed_since,
    is_directory,
    list_files,
    list_names,
    read_mark,
    write_mark,
)

__all__ = [
    "PARTIAL",
    "check_destination",
    "claim_folder",
    "free_place",
    "is_being_built",
    "new_directory",
    "remove_own",
    "remove_partial",
    "why_not_ours",
    "write_files",
]

logger = logging.getLogger(__name__)

PARTIAL = ".partial"
CONFIGS = ("config.json", "adapter_config.json")
KEPT_DIGESTS = 32


def free_place(wanted: Path, about: Mapping[str, Any]) -> Path:
    """The wanted path, or the first of WANTED-2, WANTED-3 …, where a directory about this may be put.

    It is free, or holds one about the same that is as we wrote it, byte by byte.
    """
    for place in _numbered(wanted):
        if not os.path.lexists(place) or (is_directory(place) and not any(place.iterdir())):
            return place
        mark = read_mark(place) if is_directory(place) else None
        if mark is not None and mark.about == about and changed_since(place, thoroughly=True) is None:
            return place
    raise AssertionError("unreachable")


def claim_folder(wanted: Path, about: Mapping[str, Any]) -> Path:
    """The wanted folder, or the first of WANTED-2, WANTED-3 …, that is free or of ours and about the same."""
    for place in _numbered(wanted):
        mark = read_mark(place) if is_directory(place) else None
        if mark is not None and mark.about == about:
            return place
        empty = is_directory(place) and mark is None and list_names(place) <= {MARK + TEMPORARY}
        if empty or not os.path.lexists(place):
            place.mkdir(parents=True, exist_ok=True)
            write_mark(place, Mark(dict(about)))
            return place
    raise AssertionError("unreachable")


def write_files(folder: Path, contents: Mapping[str, bytes]) -> list[Path]:
    """Write files into a folder, each whole or not at all; returns their paths.

    A file of the same name that is not as we wrote it stays: NAME-2 is written beside it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mark = read_mark(folder) or Mark()
    places = []
    for name in contents:
        stem, suffix = Path(name).stem, Path(name).suffix
        names = (f"{place.name}{suffix}" for place in _numbered(Path(stem)))
        free = (n for n in names if not os.path.lexists(folder / n) or _is_own(folder / n, mark))
        places.append(folder / next(free))
    new = (hashlib.sha256(content).hexdigest() for content in contents.values())
    write_mark(folder, replace(mark, own=(*mark.own, *new)[-KEPT_DIGESTS:]))
    for place, content in zip(places, contents.values(), strict=True):
        temporary = place.with_name(place.name + TEMPORARY)
        temporary.write_bytes(content)
        replace_file(temporary, place)
    return places


def _is_own(path: Path, mark: Mark) -> bool:
    return path.is_file() and not path.is_symlink() and digest_file(path) in mark.own


def check_destination(output_dir: Path, *sources: str | Path | None) -> None:
    """Refuse an output directory whose replacement would destroy something.

    It may be absent, empty, or hold an earlier export or merge and nothing else. sources: the directories
    that are read, `nf4:DIR` as `sqft merge` takes it included.

    Raises: ExportError if the directory is, holds or lies in a source, or holds what sqft did not write.
    """
    place = output_dir.resolve()
    for source in sources:
        read = None if source is None else Path(str(source).removeprefix("nf4:")).resolve()
        if read is None or not read.exists():
            continue
        if place == read or place in read.parents or read == place.with_name(f"{place.name}.partial"):
            what = f"writing {output_dir} would delete {source}, which is read"
            raise ExportError(f"{what}; choose another output")
        if read in place.parents and any((read / name).is_file() for name in CONFIGS):
            raise ExportError(f"{output_dir} lies inside {source}, which is read; choose another output")
    if output_dir.is_symlink() or (output_dir.exists() and not output_dir.is_dir()):
        raise ExportError(f"{output_dir} is not a directory; choose another output")
    mark = read_mark(output_dir)
    if mark is not None and mark.about and mark.files is not None:
        raise ExportError(f"{output_dir} is a result of `sqft run`; choose another output")
    stranger = changed_since(output_dir) if output_dir.is_dir() else None
    if stranger is not None:
        raise ExportError(
            f"{output_dir} holds {stranger}, which no export or merge of sqft wrote, or which changed since; "
            "choose another output"
        )


@contextmanager
def new_directory(
    final: Path, *, keep_partial: bool = False, about: Mapping[str, Any] | None = None
) -> Iterator[Path]:
    """Yield `FINAL.partial`, and rename it to `FINAL` in one step when the block ends without an error.

    Where there is a `FINAL`, ours and unchanged, the two change places, and the old one is removed: a reader
    sees one or the other, whole. Everything is on the disk before. A `FINAL.partial` that is not ours is left
    alone, and `FINAL.partial-2` is taken.
    keep_partial: leave an unfinished one from an earlier run in place, for work that resumes from it.
    about: what the mark says of it.

    Raises: WorkspaceError if there is a `FINAL` that we did not write or that was changed, or a full disk.
    """
    _check_replaceable(final)
    partial, lock = _claim(final, keep_partial, dict(about or {}))
    try:
        with lock:
            yield partial
            write_mark(partial, Mark(dict(about or {}), list_files(partial)))
            sync_tree(partial)
            _put_in_place(partial, final)
    except Exception as error:
        if not _is_full(error):
            raise
        free = shutil.disk_usage(partial.parent).free
        message = f"no space left in {partial.parent} ({free // 2**20} MiB free); make room and run again"
        raise WorkspaceError(message) from error


def _is_full(error: BaseException | None) -> bool:
    """Whether the disk was full: libraries wrap that in their errors, keep its words, or fail after it."""
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def remove_partial(final: Path) -> None:
    """Remove what a killed run left under `FINAL.partial`, if it is ours."""
    remove_own(final.with_name(final.name + PARTIAL))


def remove_own(directory: Path) -> bool:
    """Remove a directory that is ours, as we wrote it, and in nobody's work; returns whether it is gone."""
    if why_not_ours(directory) is not None:
        return False
    lock = _lock(directory)
    if lock is None:
        return False
    with lock:
        _remove(directory)
    return True


def why_not_ours(directory: Path) -> str | None:
    """Why a directory is not to be removed; None if it is ours, and as we wrote it or still being written."""
    if not is_directory(directory) or read_mark(directory) is None:
        return "has no mark of sqft's"
    if _may_remove(directory):
        return None
    return f"holds {changed_since(directory)}, which sqft did not write or which changed since"


def is_being_built(directory: Path) -> bool:
    """Whether a process builds in a directory of ours now."""
    lock = _lock(directory)
    if lock is not None:
        lock.close()
    return lock is None


def _claim(final: Path, keep: bool, about: dict[str, Any]) -> tuple[Path, IO[bytes]]:
    """A directory to build in, ours and of nobody else at work now, and what holds it until it is closed."""
    for partial in _numbered(final.with_name(final.name + PARTIAL)):
        if os.path.lexists(partial) and (not is_directory(partial) or not _may_remove(partial)):
            continue
        partial.mkdir(parents=True, exist_ok=True)
        if read_mark(partial) is None:
            write_mark(partial, Mark(about))
        lock = _lock(partial)
        if lock is not None and read_mark(partial) != Mark(about):  # of an earlier run
            write_mark(partial, Mark(about))
            lock.close()
            lock = _lock(partial)
        if lock is None:
            continue
        _clear(partial, only_temporary=keep)
        return partial, lock
    raise AssertionError("unreachable")


def _clear(directory: Path, *, only_temporary: bool = False) -> None:
    """Empty a directory of ours but for its mark, so that a kill meanwhile leaves one that is ours."""
    for path in sorted(directory.rglob("*"), reverse=True):
        if path != directory / MARK and (not only_temporary or path.name.endswith(TEMPORARY)):
            path.rmdir() if is_directory(path) else path.unlink()


def _remove(directory: Path) -> None:
    write_mark(directory, Mark())
    _clear(directory)
    shutil.rmtree(directory)


def _lock(partial: Path) -> IO[bytes] | None:
    """A half-built directory's mark, held as long as it is open; None if another process holds it."""
    lock = (partial / MARK).open("rb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def _may_remove(partial: Path) -> bool:
    """Whether a half-built directory is ours: marked and, where it lists its files, unchanged; or empty."""
    mark = read_mark(partial)
    if mark is None:
        return list_names(partial) <= BEING_BUILT
    return mark.files is None or changed_since(partial) is None


def _check_replaceable(final: Path) -> None:
    if not os.path.lexists(final):
        return
    if not is_directory(final):
        raise WorkspaceError(f"{final} is not a directory; move it away, or choose another place")
    stranger = changed_since(final)
    if stranger is not None:
        raise WorkspaceError(
            f"{final} holds {stranger}, which sqft did not write or which changed since; move it away, or "
            "choose another place"
        )


def _put_in_place(partial: Path, final: Path) -> None:
    try:
        _check_replaceable(final)
    except WorkspaceError as error:
        raise WorkspaceError(f"{error}; what was made is in {partial}") from None
    before = read_mark(final)
    if not final.exists():
        os.rename(partial, final)
    elif _exchange(partial, final):
        if before is not None and before.files is None:  # somebody is still building this one
            write_mark(final, before)
        _remove(partial)
    else:
        logger.warning("%s: this file system cannot swap directories; for a moment it was not there", final)
        old = next(p for p in _numbered(final.with_name(final.name + ".old")) if not os.path.lexists(p))
        os.rename(final, old)
        os.rename(partial, final)
        _remove(old)
    sync_path(final.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Let two directories change names in one step; False where the file system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(first), os.fsencode(second)
    if hasattr(library, "renameat2"):  # Linux: AT_FDCWD, RENAME_EXCHANGE
        failed = library.renameat2(-100, paths[0], -100, paths[1], 2)
    elif hasattr(library, "renamex_np"):  # macOS: RENAME_SWAP
        failed = library.renamex_np(*paths, 2)
    else:
        return False
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(first))


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    for number in count(2):
        yield path.with_name(f"{path.name}-{number}")
