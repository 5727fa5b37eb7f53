"""What a recipe may name is what there is: every table of methods equals its Literal."""

from collections.abc import Iterable
from typing import Any, get_args

import pytest

from sqft.adapters.config import METHODS as ADAPTERS
from sqft.compression.quantize import METHODS as QUANTIZERS
from sqft.compression.sparsify import METHODS as SPARSIFIERS
from sqft.export import FORMATS
from sqft.foreign.merge import NEEDS_GRID
from sqft.pipeline import parse_recipe
from sqft.pipeline.stages import StageKind, recipe_stages
from sqft.search.search import METHODS as SEARCHES
from sqft.sections import (
    AdapterMethod,
    ExportFormat,
    MergeRung,
    QuantizeSection,
    SearchSection,
    SparsifySection,
)
from sqft.sections.compression import TARGET_GRIDS, QuantizeTarget


def named(section: Any, field: str = "method") -> tuple[str, ...]:
    return get_args(section.model_fields[field].annotation)


@pytest.mark.parametrize(
    ("table", "literal"),
    [
        (SPARSIFIERS, named(SparsifySection)),
        (QUANTIZERS, named(QuantizeSection)),
        (ADAPTERS, get_args(AdapterMethod)),
        (SEARCHES, named(SearchSection)),
        (FORMATS, get_args(ExportFormat)),
        (TARGET_GRIDS, get_args(QuantizeTarget)),
    ],
    ids=["sparsify", "quantize", "adapters", "search", "export", "targets"],
)
def test_a_table_holds_what_its_literal_names(table: Iterable[str], literal: tuple[str, ...]) -> None:
    assert sorted(table) == sorted(literal)


def test_rungs_that_need_a_grid_are_rungs() -> None:
    assert set(get_args(MergeRung)) > NEEDS_GRID


def test_every_kind_of_stage_is_made_by_some_recipe(tmp_path: Any) -> None:
    recipe = parse_recipe(
        {
            "model": "model",
            "data": {"train": str(tmp_path / "train.jsonl")},
            "tune": {},
            "sparsify": {},
            "quantize": {},
            "reconstruct": {},
            "adapters": {},
            "distillation": {"text": "text.txt"},
            "evaluate": {"models": ["merged", "dense_tuned"]},
            "export": {"formats": ["gguf"]},
        }
    )
    assert {stage.kind for stage in recipe_stages(recipe)} == set(get_args(StageKind))
