"""Records of one local file, by what its name says it is; of another name it is taken for JSON lines."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sqft.data.records import Record
from sqft.errors import DataError, first_line, require

__all__ = ["READERS", "read_file"]

DELIMITERS = (",", ";", "\t", "|")
LARGEST_FIELD = 1 << 27  # characters of a CSV field; the csv module stops at 131,072 unless told otherwise


def read_file(path: Path) -> Iterator[Record]:
    """The records of a file, as they are read: .jsonl, .json, .csv, .tsv, .parquet or .txt, also with .gz.

    Raises: DataError if it cannot be read, is malformed (with the line or record) or holds no record.
    """
    name = path.name.removesuffix(".gz")
    reader = READERS.get(Path(name).suffix.lower(), _read_json_lines)
    try:
        data = path.read_bytes()
        if name != path.name:
            data = gzip.decompress(data)
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"there is no file {path}; check the path in the recipe's data section") from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path} is not a whole gzip file ({error})") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    empty = True
    for record in reader(data, path):
        empty = False
        yield record
    if empty:
        raise DataError(f"{path} is empty; it holds no record")


def _text(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 (byte {error.start} of the file)") from None


def _read_json_lines(data: bytes, path: Path) -> Iterator[Record]:
    for number, line in enumerate(io.BytesIO(data.removeprefix(b"\xef\xbb\xbf")), start=1):
        if line.strip():
            place = f"{path}:{number}"
            yield Record(_object(_parse_line(line, place), place), place)


def _parse_line(line: bytes, place: str) -> Any:
    try:
        return _parse_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 (byte {error.start} of the line)") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON: {_reason(error)}") from None


def _parse_json(text: str) -> Any:
    """JSON's values; NaN, which JSON has not but Python writes for a missing number, is null.

    Raises: ValueError, RecursionError. Also for half a surrogate pair, which no UTF-8 file can hold again.
    """
    value = json.loads(text, parse_constant=_constant)
    if "\\u" in text:  # the only way to such a half
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _constant(name: str) -> None:
    if name != "NaN":
        raise ValueError(f"{name} is not a number")


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    half = isinstance(error, UnicodeEncodeError)
    return "it holds half of a surrogate pair, which is not a character" if half else first_line(error)


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{place}: a {type(value).__name__}, where a JSON object is needed")
    return value


def _read_json(data: bytes, path: Path) -> Iterator[Record]:
    """A list of objects, an object that holds one such list, an object of equal columns, or JSON lines."""
    text = _text(data, path)
    try:
        value = _parse_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line, whatever the file is called
            yield from _read_json_lines(data, path)
            return
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {_reason(error)}") from None
    for number, row in enumerate(_rows(value, path), start=1):
        place = f"{path}, record {number}"
        yield Record(_object(row, place), place)


def _rows(value: Any, path: Path) -> list[Any]:
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list)]
        tables = [rows for rows in lists if rows and all(isinstance(row, dict) for row in rows)]
        if len(tables) == 1:
            return tables[0]
        if lists and len(lists) == len(value) and len({len(column) for column in lists}) == 1:
            return [dict(zip(value, row, strict=True)) for row in zip(*lists, strict=True)]
        return [value]
    raise DataError(f"{path} holds a {type(value).__name__}, where a list of JSON objects is needed")


def _read_csv(data: bytes, path: Path) -> Iterator[Record]:
    """One record a row; the first row names the fields. Every value is a text."""
    text = _text(data, path)
    delimiter = "\t" if ".tsv" in path.suffixes else _delimiter(text)
    before = csv.field_size_limit(LARGEST_FIELD)
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header = next(rows, [])
        repeated = {name for name in header if header.count(name) > 1}
        if repeated:
            raise DataError(f"{path}:1: the field {sorted(repeated)[0]!r} is named twice")
        line = rows.line_num + 1
        for row in rows:
            if row and len(row) != len(header):
                raise DataError(
                    f"{path}:{line}: {len(row)} fields, but the first line names {len(header)}; quote a "
                    f"field that holds {delimiter!r}"
                )
            if row:
                yield Record(dict(zip(header, row, strict=True)), f"{path}:{line}")
            line = rows.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{rows.line_num}: not CSV: {error}") from None
    finally:
        csv.field_size_limit(before)


def _delimiter(text: str) -> str:
    """The delimiter that stands in the first line most often."""
    header = text.split("\n", 1)[0]
    return max(DELIMITERS, key=header.count)


def _read_parquet(data: bytes, path: Path) -> Iterator[Record]:
    pyarrow = require("pyarrow", "hub")
    parquet = require("pyarrow.parquet", "hub")
    try:
        rows = parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is not a whole Parquet file ({first_line(error)})") from None
    for number, row in enumerate(rows, start=1):
        yield Record(row, f"{path}, row {number}")


def _read_text(data: bytes, path: Path) -> Iterator[Record]:
    """The whole file as one text."""
    text = _text(data, path)
    if text.strip():
        yield Record({"text": text}, str(path))


READERS: dict[str, Callable[[bytes, Path], Iterator[Record]]] = {
    ".csv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".md": _read_text,
    ".ndjson": _read_json_lines,
    ".parquet": _read_parquet,
    ".tsv": _read_csv,
    ".txt": _read_text,
}
