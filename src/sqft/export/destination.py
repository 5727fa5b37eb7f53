"""Where an export or a merge may write: never over what it reads, nor over what sqft did not write."""

import json
from pathlib import Path

from sqft.errors import ExportError

__all__ = ["check_destination"]

CONFIGS = ("config.json", "adapter_config.json")
RECORDS = ("sqft_export.json", "sqft_merge.json")
ENVIRONMENT = ".environment.json"  # what a recipe's run puts into the empty directory of a stage
BESIDE = {*RECORDS, "README.md", "manifest.json"}  # ours, whether or not the record names them


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
