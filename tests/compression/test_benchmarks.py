"""What the benchmarks of compression make of their options, without running them."""

from typing import Any

import pytest
import torch
from benchmarks.compression import OTHERS, checks, others
from benchmarks.compression_speed import statistic_rows
from tests.compression.tiny_runs import tokens

from sqft.compression.walk import BlockWalk
from sqft.models import open_checkpoint
from sqft.sections import SparsifySection


@pytest.mark.parametrize("level", ["50", "2:4"])
def test_the_other_methods_of_a_level_are_ones_it_can_have(level: str) -> None:
    shape: dict[str, Any] = {"pattern": level} if ":" in level else {"sparsity": int(level) / 100}
    for settings in others(level).values():
        SparsifySection(**(settings | shape))
    assert ("wanda, owl" in others(level)) == (level == "50")
    assert others("50") == OTHERS


def test_rows_of_patterns_alone_leave_the_sparsity_unmeasured() -> None:
    rows = [{"level": "2:4", "method": "wanda", "increase": 0.5, "sparsity": 0.5}]
    assert [found["value"] for found in checks(rows)] == [None] * len(checks(rows))
    rows += [{"level": "50", "method": "wanda", "increase": 0.5, "sparsity": 0.5005}]
    assert checks(rows)[-1]["value"] == pytest.approx(0.0005)


@pytest.mark.parametrize("rows", [4, 16])
def test_both_sides_take_statistics_of_the_same_tokens(tiny_model_dir: Any, rows: int) -> None:
    ids = tokens(rows)
    walk = BlockWalk(open_checkpoint(tiny_model_dir("llama")), ids)
    seen = len(walk.hidden) - walk.held_out
    assert len(statistic_rows(ids)) == sum(len(batch) for batch in walk.hidden[:seen])
    assert torch.equal(statistic_rows(ids), ids[: len(statistic_rows(ids))])
