"""Records from JSON-lines files, with the line number in every complaint."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqft.errors import DataError

__all__ = ["Record", "read_records"]


@dataclass(frozen=True)
class Record:
    """One line of a JSON-lines file."""

    fields: dict[str, Any]
    path: Path
    line: int

    @property
    def place(self) -> str:
        """`path:line`, as editors understand it."""
        return f"{self.path}:{self.line}"


def read_records(path: Path | str) -> list[Record]:
    """Read a JSON-lines file: one object a line, blank lines skipped.

    Raises: DataError for a missing or empty file, and for the first malformed line, by its number.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; check the path in the recipe's data section") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    records = [
        Record(_parse(line, path, number), path, number)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not records:
        raise DataError(f"{path} is empty; write one JSON object a line")
    return records


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: not UTF-8 (byte {error.start} of the line)") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}:{number}: a {type(value).__name__}, where a JSON object is needed")
    return value
