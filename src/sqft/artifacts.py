"""Files that are either whole or not there, their digests, and what stands in a stage's manifest.

A manifest is written last: a directory that has one is finished, whatever killed the run before.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sqft.errors import WorkspaceError

__all__ = [
    "CERTIFICATE",
    "DIGESTS",
    "ENVIRONMENT",
    "EXPORT_RECORD",
    "FACTS",
    "ITEM_FIGURES",
    "LATENT",
    "LAYERS",
    "MANIFEST",
    "MASKS",
    "MERGE_RECORD",
    "METRICS",
    "PACK_RECORD",
    "REFERENCE",
    "REPORT",
    "REPORT_PAGE",
    "SEAL",
    "SUB_ADAPTER",
    "SWEEP",
    "TEACHER",
    "TEMPORARY",
    "TRAINING_RECORD",
    "TRIALS",
    "UNROUNDED",
    "Manifest",
    "digest_file",
    "digest_files",
    "digest_json",
    "read_elapsed",
    "read_object",
    "replace_file",
    "seal",
    "sync_path",
    "sync_tree",
    "unseal",
    "user_cache",
    "write_json",
]

# The names of our own files. The certificate's readers that share no code with the library repeat theirs.
MANIFEST = "manifest.json"  # of a finished stage
ENVIRONMENT = ".environment.json"  # what an unfinished stage was begun in
LAYERS = "sqft_layers.json"  # of a compressed model: what was done to each layer
MASKS = "sqft_masks.safetensors"  # which weights are kept, bit by bit
LATENT = "sqft_latent.safetensors"  # codes with fractional bits: what training starts from
UNROUNDED = "sqft_unrounded.safetensors"  # of a training checkpoint: what is trained, before it is rounded
TEACHER = "sqft_teacher.safetensors"  # what a teacher predicts for the items and texts of a training
TRAINING_RECORD = "training.json"  # how a training went
METRICS = "metrics.jsonl"  # its loss and speed, step by step
TRIALS = "trials.log"  # of a search
SUB_ADAPTER = "sub_adapter.json"  # what a search chose
FACTS = "sqft.json"  # of a merged model or an adapter: what it is, and how its prompts were made
REFERENCE = "sqft_reference.safetensors"  # token ids, and the logits that the trained model gives for them
CERTIFICATE = "sqft_certificate.json"
MERGE_RECORD = "sqft_merge.json"  # of an adapter trained elsewhere: how it was merged, and what survived
EXPORT_RECORD = "sqft_export.json"  # what was written, and how it was compared
PACK_RECORD = "sqft_packed.json"  # of a download form: the files that it unpacks to
ITEM_FIGURES = "items.json"  # of every item of an evaluation
REPORT = "report.json"
REPORT_PAGE = "report.html"
SWEEP = "sweep.json"  # of a sweep: its variants and their figures

SEAL = "sha256"  # under which a sealed value keeps its own digest
DIGESTS = ".digests.json"  # of files by path, size and time, so that they need not be read again
TEMPORARY = ".tmp"  # ends the name of a file that is being written


@dataclass(frozen=True)
class Manifest:
    """What a finished directory says of itself."""

    stage: str
    key: str
    settings: dict[str, Any] = field(default_factory=dict)
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
            values = json.loads(path.read_text(encoding="utf-8"))
            if "section" in values:  # as release 0.1.0 called the settings
                values["settings"] = values.pop("section")
            manifest = cls(**values)
            manifest._check_kinds()
            return manifest
        except FileNotFoundError:
            raise WorkspaceError(
                f"{directory} has no {MANIFEST}; it was not written by sqft, or not finished"
            ) from None
        except (ValueError, TypeError, RecursionError) as error:
            raise WorkspaceError(f"{path} is damaged ({error}); delete {directory} and run again") from error

    def _check_kinds(self) -> None:
        """Raises: TypeError if a field is not what it should be."""
        for value in (self.settings, self.inputs, self.metrics, self.environment, self.files):
            if not isinstance(value, dict):
                raise TypeError("a value is of another kind")
        texts = [self.stage, self.key, *self.files.values(), *self.environment.values()]
        if not all(isinstance(text, str) for text in texts) or not isinstance(
            self.elapsed_seconds, int | float
        ):
            raise TypeError("a value is of another kind")

    def write(self, directory: Path) -> None:
        """Write the manifest of `directory`."""
        write_json(directory / MANIFEST, asdict(self))


def read_elapsed(directory: Path) -> float:
    """The time a stage took, read off the end of its manifest, which can be large. Raises: WorkspaceError."""
    try:
        with (directory / MANIFEST).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 100))
            end = file.read()
    except OSError as error:
        raise WorkspaceError(f"{directory / MANIFEST} cannot be read ({error.strerror})") from error
    found = re.search(rb'"elapsed_seconds": ([0-9.eE+-]+)\s*\}\s*$', end)
    return float(found[1]) if found else Manifest.read(directory).elapsed_seconds


def write_json(path: Path, value: Any) -> None:
    """Write JSON such that the file is either the old one or the whole new one, whatever happens."""
    temporary = path.with_name(path.name + TEMPORARY)
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    replace_file(temporary, path)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


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


def digest_file(path: Path, *, cache: Path | None = None) -> str:
    """The sha256 of a file's bytes. cache: as `digest_files` takes it.

    Raises: OSError, also for a pipe or a device, which may never end.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    if cache is not None:
        known, identity = _read_cache(cache), _identity(path)
        if identity not in known:
            known[identity] = digest_file(path)
            _write_cache(cache, known)
        return known[identity]
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
        identity = _identity(path)
        digests[name] = known[identity] = known.get(identity) or digest_file(path)
    if cache is not None:
        _write_cache(cache, known)
    return digests


def _identity(path: Path) -> str:
    """By what a file is taken for the one that it was."""
    found = path.stat()
    return f"{path.resolve()}:{found.st_size}:{found.st_mtime_ns}:{found.st_ino}"


def _write_cache(cache: Path, known: dict[str, str]) -> None:
    """Several processes may write at a time: the last one counts, and an entry that is lost is made anew."""
    with suppress(OSError):  # where nothing can be written, digests are taken anew
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_name(f"{cache.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}")
        temporary.write_text(json.dumps(known, indent=1), encoding="utf-8")
        os.replace(temporary, cache)


def _read_cache(cache: Path | None) -> dict[str, str]:
    try:
        known = json.loads(cache.read_text(encoding="utf-8")) if cache is not None else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def user_cache() -> Path:
    """Where a user's programs keep what can be made again; the compiled kernels lie there too."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sqft"
