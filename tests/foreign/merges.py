"""Merging with settings given one by one."""

from pathlib import Path
from typing import Any

from sqft.foreign import MergeObserver, MergeResult, merge_foreign
from sqft.sections import MergeSection


def merge(
    base_dir: Path,
    adapter_dir: Path,
    output_dir: Path,
    *,
    calibration: Any = None,
    measure: Any = None,
    observer: MergeObserver | None = None,
    **settings: Any,
) -> MergeResult:
    """`merge_foreign` with a section of these settings."""
    return merge_foreign(
        base_dir,
        adapter_dir,
        output_dir,
        MergeSection(**{key: str(v) if isinstance(v, Path) else v for key, v in settings.items()}),
        calibration=calibration,
        measure=measure,
        observer=observer,
    )
