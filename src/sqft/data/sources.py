"""From what a recipe calls its data to records: files by name or pattern, or a data set of the hub."""

from collections.abc import Iterator
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from sqft.artifacts import digest_file
from sqft.data.files import read_file
from sqft.data.hub import hub_commit, read_hub
from sqft.data.records import Record, Source
from sqft.errors import DataError
from sqft.sections import HubSource

__all__ = ["expand_paths", "read_records", "source_content"]


def read_records(source: Source) -> Iterator[Record]:
    """Every record of a source: a file, a pattern such as data/*.csv, several of them, or a hub data set.

    They come one by one, so that a large file is in memory once.

    Raises: DataError for what is missing, empty or malformed, naming the place, where it is come upon.
    """
    if isinstance(source, HubSource):
        yield from read_hub(source)
        return
    for path in expand_paths(source):
        yield from read_file(path)


def expand_paths(source: Source) -> list[Path]:
    """The files that a path, a pattern or a list of them means, each once, a pattern's in order of name.

    Raises: DataError if one is not there.
    """
    assert not isinstance(source, HubSource)
    named = [source] if isinstance(source, str | Path) else list(source)
    paths: dict[Path, None] = {}
    for name in named:
        path = Path(name).expanduser()
        if path.is_file():
            found = [path]
        elif has_magic(str(path)):
            found = sorted(Path(match) for match in glob(str(path), recursive=True) if Path(match).is_file())
        elif path.is_dir():
            raise DataError(f"{path} is a folder; name its files, for instance '{path}/*.jsonl'")
        else:
            found = []
        if not found:
            raise DataError(f"there is no file {name}{_hub_hint(str(name))}")
        paths |= dict.fromkeys(found)
    return list(paths)


def source_content(source: Source) -> Any:
    """What identifies the content of a source: the digests of its files, or the commit of a hub data set.

    Raises: DataError if a file is not there, or the hub does not say which commit is meant.
    """
    if isinstance(source, HubSource):
        settings = source.model_dump(mode="json", exclude={"revision"}, exclude_none=True)
        return settings | {"commit": hub_commit(source)}
    return [digest_file(path) for path in expand_paths(source)]


def _hub_hint(name: str) -> str:
    looks_like_one = name.count("/") == 1 and not name.startswith((".", "/", "~")) and "." not in name
    return f"; for the data set of the hub write hub:{name}" if looks_like_one else ""
