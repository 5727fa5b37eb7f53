"""A record as it was read, with its place for every complaint."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqft.sections import HubSource

__all__ = ["Record", "Source", "source_name"]

Source = str | Path | Sequence[str | Path] | HubSource


@dataclass(frozen=True)
class Record:
    """The fields of one item, and where it stands: `path:line` where a file has lines."""

    fields: dict[str, Any]
    place: str


def source_name(source: Source) -> str:
    """A source as a user would write it, for messages."""
    if isinstance(source, HubSource):
        return ":".join(part for part in ("hub", source.hub, source.config) if part)
    return str(source) if isinstance(source, str | Path) else ", ".join(map(str, source))
