"""Directories that are either whole or not there, and what stands in their manifests.

A directory under construction is called `NAME.partial`; its manifest is written last, then it is renamed.
So a directory that carries its final name and a manifest is finished, whatever killed the run before.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sqft.errors import ExportError, WorkspaceError

__all__ = [
    "LAYERS",
    "MANIFEST",
    "Manifest",
    "check_destination",
    "digest_file",
    "digest_files",
    "digest_json",
    "new_directory",
    "replace_file",
    "seal",
    "sync_path",
    "sync_tree",
    "unseal",
    "write_json",
]

MANIFEST = "manifest.json"
SEAL = "sha256"
TEMPORARY = ".tmp"  # ends the name of a file that is being written
LAYERS = "sqft_layers.json"  # of a compressed model: what was done to each layer
CONFIGS = ("config.json", "adapter_config.json")
RECORDS = ("sqft_export.json", "sqft_merge.json")
ENVIRONMENT = ".environment.json"  # what a recipe's run puts into the empty directory of a stage
BESIDE = {*RECORDS, "README.md", "manifest.json"}  # ours, whether or not the record names them


@dataclass(frozen=True)
class Manifest:
    """What a finished directory says of itself."""

    stage: str
    key: str
    section: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    elapsed_seconds: float = 0.0

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Raises: WorkspaceError if the manifest is missing or damaged."""
        path = directory / MANIFEST
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise WorkspaceError(
                f"{directory} has no {MANIFEST}; it was not written by sqft, or not finished"
            ) from None
        except (ValueError, TypeError) as error:
            raise WorkspaceError(f"{path} is damaged ({error}); delete {directory} and run again") from error

    def write(self, directory: Path) -> None:
        """Write the manifest of `directory`."""
        write_json(directory / MANIFEST, asdict(self))


def write_json(path: Path, value: Any) -> None:
    """Write JSON such that the file is either the old one or the whole new one, whatever happens."""
    temporary = path.with_name(path.name + TEMPORARY)
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    replace_file(temporary, path)


def replace_file(temporary: Path, path: Path) -> None:
    """Give a written file its final name, in one step; it is on the disk before, and its name after."""
    sync_path(temporary)
    os.replace(temporary, path)
    sync_path(path.parent)


def sync_path(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Wait until everything below a directory is on the disk."""
    for path in [*directory.rglob("*"), directory]:
        if not path.is_symlink():
            sync_path(path)


@contextmanager
def new_directory(final: Path, *, keep_partial: bool = False) -> Iterator[Path]:
    """Yield `FINAL.partial`, and rename it to `FINAL` when the block ends without an error.

    keep_partial: leave an unfinished one from an earlier run in place, for work that resumes from it.

    Raises: WorkspaceError if the disk is full.
    """
    partial = final.with_name(final.name + ".partial")
    if partial.exists() and not keep_partial:
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    for half_written in partial.rglob("*" + TEMPORARY):  # a kill between writing a file and naming it
        half_written.unlink()
    try:
        yield partial
        sync_tree(partial)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        sync_path(final.parent)
    except Exception as error:
        # Libraries wrap the system's error in their own, and keep its words.
        if getattr(error, "errno", None) != errno.ENOSPC and "No space left" not in str(error):
            raise
        free = shutil.disk_usage(partial.parent).free
        message = f"no space left in {partial.parent} ({free // 2**20} MiB free); make room and run again"
        raise WorkspaceError(message) from error


def digest_json(value: Any) -> str:
    """The sha256 of a value as canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """The same with a digest of itself under "sha256", so that `unseal` notices a change by accident."""
    plain = json.loads(json.dumps(value))
    return {**plain, SEAL: digest_json(plain)}


def unseal(value: Any) -> dict[str, Any]:
    """What was sealed. Raises: ValueError if it is not what it was then."""
    if not isinstance(value, dict) or SEAL not in value:
        raise ValueError("it was not written whole")
    plain = {key: item for key, item in value.items() if key != SEAL}
    if value[SEAL] != digest_json(plain):
        raise ValueError("it is not as it was written")
    return plain


def digest_file(path: Path) -> str:
    """The sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_files(directory: Path, *, cache: Path | None = None) -> dict[str, str]:
    """The sha256 of every file below a directory, by relative path, hidden files left out.

    cache: a JSON file that remembers digests by path, size, modification time and inode.
    """
    known: dict[str, str] = _read_cache(cache)
    digests: dict[str, str] = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = path.relative_to(directory).as_posix()
        if any(part.startswith(".") for part in Path(name).parts):
            continue
        stat = path.stat()
        identity = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"
        digests[name] = known[identity] = known.get(identity) or digest_file(path)
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_json(cache, known)
    return digests


def _read_cache(cache: Path | None) -> dict[str, str]:
    if cache is None or not cache.exists():
        return {}
    try:
        known = json.loads(cache.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return known if isinstance(known, dict) else {}


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
        raise ExportError(f"{output_dir} is no directory; choose another output")
    stranger = _stranger(output_dir)
    if stranger is not None:
        raise ExportError(
            f"{output_dir} holds {stranger}, which no export or merge of sqft wrote; choose another output"
        )


def _stranger(directory: Path) -> str | None:
    """The first entry of a directory that is no part of an earlier export or merge; None without one."""
    found = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    entries = sorted(found - {ENVIRONMENT})
    record = next((name for name in RECORDS if name in entries), None)
    if record is None:
        return next(iter(entries), None)
    known = _recorded(directory / record)
    for name in entries:
        if name not in BESIDE and (name not in known if known else (directory / name).is_dir()):
            return name
    return None


def _recorded(path: Path) -> set[str]:
    """The top-level names in a record; empty where it names none."""
    try:
        files = json.loads(path.read_text(encoding="utf-8")).get("files", {})
        return {name.split("/")[0] for name in files}
    except (ValueError, AttributeError):
        return set()
