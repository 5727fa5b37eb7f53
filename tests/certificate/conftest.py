"""A merge of each kind, written once."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.merged_models import MergedDirectories, write_merge


@pytest.fixture(scope="session")
def merges(
    tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., MergedDirectories]:
    """`merges(arch="llama", **changes)`: do not write into what it returns."""
    made: dict[str, MergedDirectories] = {}

    def make(arch: str = "llama", **changes: Any) -> MergedDirectories:
        key = f"{arch}-{sorted(changes.items())}"
        if key not in made:
            made[key] = write_merge(tiny_model_dir(arch), tmp_path_factory.mktemp("merge"), **changes)
        return made[key]

    return make


@pytest.fixture
def merge_copy(merges: Callable[..., MergedDirectories], tmp_path: Path) -> Callable[..., MergedDirectories]:
    """A copy of a merge that the test may damage."""

    def make(arch: str = "llama", **changes: Any) -> MergedDirectories:
        original = merges(arch, **changes)
        copies = {part: tmp_path / part for part in ("base", "adapter", "merged")}
        for part, copy in copies.items():
            shutil.copytree(getattr(original, part), copy)
        return MergedDirectories(**copies)

    return make
