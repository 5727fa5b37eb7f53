"""Data sets of the Hugging Face hub, by name, through the `datasets` library (extra: hub)."""

import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from sqft.data.records import Record, source_name
from sqft.errors import DataError, first_line, require
from sqft.sections import HubSource

__all__ = ["hub_commit", "read_hub"]

COMMIT = re.compile(r"[0-9a-f]{40}")


def read_hub(source: HubSource) -> list[Record]:
    """The records of one split. With `records` they are streamed, so that no more is fetched than is used.

    Raises: MissingExtraError; DataError if the data set, its configuration or split is not there, or the hub
    cannot be reached and nothing is cached.
    """
    datasets = require("datasets", "hub")
    name = source_name(source)
    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.utils.logging.disable_progress_bar()
    try:
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(
            source.hub,
            source.config,
            split=source.split,
            revision=source.revision,
            streaming=source.records is not None,
        )
        fields = list(islice(rows, source.records))
    except Exception as error:  # of many kinds, from the network to the readers of every file format
        raise DataError(
            f"{name}, split {source.split}: {first_line(error)} (a local file can be given in its place)"
        ) from error
    finally:
        if bars:
            datasets.utils.logging.enable_progress_bar()
    if not fields:
        raise DataError(f"{name}, split {source.split}: no record")
    return [
        Record(dict(row), f"{name}, split {source.split}, record {number}")
        for number, row in enumerate(fields, start=1)
    ]


def hub_commit(source: HubSource) -> str:
    """The commit that a revision means: what identifies the content of a hub data set.

    The hub says so; where it cannot be reached, the cache on this machine.

    Raises: DataError if neither does.
    """
    if source.revision is not None and COMMIT.fullmatch(source.revision):
        return source.revision
    from huggingface_hub import HfApi

    try:
        found: str | None = HfApi().dataset_info(source.hub, revision=source.revision).sha
    except Exception as error:  # of many kinds: the network's library is another one in every release
        found = _cached_commit(source)
        if found is None:
            raise DataError(
                f"{source_name(source)}: the hub does not say which commit is meant ({first_line(error)}), "
                "and nothing of it is cached here"
            ) from error
    if found is None:
        raise DataError(f"{source_name(source)}: the hub names no commit; give revision")
    return found


def _cached_commit(source: HubSource) -> str | None:
    """The commit that the hub's cache on this machine holds for a branch or tag."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=source.hub, repo_type="dataset")
    try:
        return (folder / "refs" / (source.revision or "main")).read_text(encoding="utf-8").strip() or None
    except OSError:
        return None
