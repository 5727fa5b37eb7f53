"""The download form of a packed directory: its weight files compressed by Zstandard, as any tool undoes it.

A mask of a bit a weight and codes of half a byte are nearly random, but not quite: small steps are more
frequent than large ones. Zstandard's entropy coder finds that at any level.
"""

import hashlib
import shutil
from pathlib import Path
from typing import Any

from sqft.directories import new_directory
from sqft.errors import ModelError, require
from sqft.formats.packed import list_files, read_record

__all__ = ["compress_packed", "expand_packed", "is_compressed"]

END = ".zst"
LEVEL = 9  # higher levels take much longer and gain less than 0.1 %
CHUNK = 1 << 20


def is_compressed(directory: Path) -> bool:
    """Whether a packed directory is in its download form."""
    return any(directory.glob(f"*{END}"))


def compress_packed(directory: Path, output_dir: Path) -> None:
    """Write the download form of a packed directory. Raises: MissingExtraError without zstandard."""
    zstandard = require("zstandard", "zstd")
    read_record(directory)
    with new_directory(output_dir) as partial:
        for path in list_files(directory):
            target = partial / path.relative_to(directory)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.parent == directory and path.suffix == ".safetensors" and path.name.startswith("packed"):
                compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True)
                with path.open("rb") as source, target.with_name(target.name + END).open("wb") as file:
                    compressor.copy_stream(source, file, size=path.stat().st_size)
            else:
                shutil.copyfile(path, target)


def expand_packed(directory: Path, output_dir: Path) -> None:
    """Undo `compress_packed`; every file is checked against its digest.

    Raises: ModelError if a file is damaged or larger than it is to be; MissingExtraError without zstandard.
    """
    zstandard = require("zstandard", "zstd")
    record = read_record(directory)
    with new_directory(output_dir) as partial:
        for path in list_files(directory):
            target = partial / path.relative_to(directory)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix != END:
                shutil.copyfile(path, target)
                continue
            try:
                _expand(zstandard, path, target.with_name(target.name.removesuffix(END)), record)
            except zstandard.ZstdError as error:
                raise ModelError(f"{path} is truncated or damaged ({error}); fetch it again") from None


def _expand(zstandard: Any, path: Path, target: Path, record: dict[str, Any]) -> None:
    expected = record["files"].get(target.name)
    limit = sum(record["bytes"].values())
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as source, target.open("wb") as file:
        reader = zstandard.ZstdDecompressor().stream_reader(source)
        while (part := reader.read(CHUNK)) and size <= limit:
            size += len(part)
            digest.update(part)
            file.write(part)
    if digest.hexdigest() != expected:
        raise ModelError(f"{path} is truncated or was changed; fetch it again")
