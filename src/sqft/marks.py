"""What lies in every directory of ours: a mark that we are writing it, or the list of what we wrote.

So what is ours can be told from what is a user's, also after an edit or an addition, and damage is noticed.
"""

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sqft.artifacts import ENVIRONMENT, TEMPORARY, Manifest, digest_file, seal, unseal, write_json
from sqft.errors import WorkspaceError

__all__ = [
    "BEING_BUILT",
    "EVALUATIONS",
    "MARK",
    "Mark",
    "changed_since",
    "damaged_since",
    "is_directory",
    "list_files",
    "list_names",
    "read_mark",
    "write_mark",
]

MARK = ".sqft.json"
EVALUATIONS = ".eval_results"  # in a model: what `sqft evaluate` measured, where the hub looks for it
FOLDER = "folder"  # in place of the digest of an empty one
BEING_BUILT = {MARK, MARK + TEMPORARY, ENVIRONMENT}  # in a directory that has no content yet


@dataclass(frozen=True)
class Mark:
    """What we say of a directory that is ours. about: whose it is, and what of.

    files: size, modification time in ns, and sha256 of each file by relative path; None while it is written.
    own: the sha256 of files that were written one by one into a folder that may hold others.
    """

    about: dict[str, Any] = field(default_factory=dict)
    files: dict[str, tuple[int, int, str]] | None = None
    own: tuple[str, ...] = ()


def read_mark(directory: Path) -> Mark | None:
    """The mark of a directory; None if it is not ours."""
    try:
        facts = unseal(json.loads((directory / MARK).read_bytes()))
        files = facts["files"]
        listed = None if files is None else {name: tuple(entry) for name, entry in files.items()}
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in listed or ()):
            return None
        return Mark(facts["about"], listed, tuple(facts["own"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def write_mark(directory: Path, mark: Mark) -> None:
    """Mark a directory as ours."""
    write_json(directory / MARK, seal(asdict(mark)))


def changed_since(directory: Path, *, thoroughly: bool = False, beside: tuple[str, ...] = ()) -> str | None:
    """The first file that was changed, added or removed since we wrote a directory; None if nothing was.

    beside: folders in it that anything may be added to.
    thoroughly: go by every file's bytes, also where size and modification time are those that were written.
    """
    mark = read_mark(directory)
    known = BEING_BUILT if mark is None or mark.files is None else {MARK, MARK + TEMPORARY, *mark.files}
    added = list_names(directory) - (known if mark else set())
    added = {name for name in added if name.split("/")[0] not in beside}
    return min(added, default=None) or damaged_since(directory, thoroughly=thoroughly)


def damaged_since(directory: Path, *, thoroughly: bool = True) -> str | None:
    """The first file that is no longer there as we wrote it; None if all are, whatever lies beside them."""
    mark = read_mark(directory)
    for name, (size, modified, digest) in (mark.files or {} if mark else {}).items():
        path = directory / name
        if digest == FOLDER and path.is_dir():
            continue
        if digest == FOLDER or not os.path.lexists(path):
            return name
        stat = path.lstat()
        touched = thoroughly or (stat.st_size, stat.st_mtime_ns) != (size, modified)
        if touched and (stat.st_size != size or _digest(path) != digest):
            return name
    return None


def list_files(directory: Path) -> dict[str, tuple[int, int, str]]:
    """Size, modification time and digest of every file; digests that a manifest states are not taken anew."""
    known: dict[str, str] = {}
    with suppress(WorkspaceError):
        known = Manifest.read(directory).files
    files: dict[str, tuple[int, int, str]] = {}
    for name in sorted(list_names(directory) - {MARK}):
        path = directory / name
        if is_directory(path):
            files[name] = (0, 0, FOLDER)
            continue
        stat = path.lstat()
        files[name] = (stat.st_size, stat.st_mtime_ns, known.get(name) or _digest(path))
    return files


def _digest(path: Path) -> str:
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    return digest_file(path) if path.is_file() else "neither file nor folder"  # a pipe would wait for ever


def list_names(directory: Path) -> set[str]:
    """Every file below a directory, hidden ones too, and every empty folder, by relative path."""
    found = set()
    for root, folders, files in os.walk(directory):
        relative = Path(root).relative_to(directory)
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        found |= {(relative / name).as_posix() for name in [*files, *links]}
        if not (files or folders) and relative != Path():
            found.add(relative.as_posix())
    return found


def is_directory(path: Path) -> bool:
    """Whether it is a directory itself, not a link to one."""
    return path.is_dir() and not path.is_symlink()
