"""Merged models to export, written once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.merged_models import write_merge


@pytest.fixture(scope="session")
def merged_dir(
    tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`merged_dir(arch="llama", **changes)`: do not write into what it returns."""
    made: dict[str, Path] = {}

    def make(arch: str = "llama", **changes: Any) -> Path:
        key = f"{arch}-{sorted(changes.items())}"
        if key not in made:
            root = tmp_path_factory.mktemp("merge")
            made[key] = write_merge(tiny_model_dir(arch), root, **changes).merged
        return made[key]

    return make
