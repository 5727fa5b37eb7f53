"""A merged sparse INT4 model is a base like any other: trained on again, it keeps its grid and its zeros."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sqft.certificate import check_integrity
from sqft.cli import run_command_line
from sqft.errors import CompressionError, RecipeError, SqftError
from sqft.models import open_checkpoint, read_masks
from sqft.pipeline import parse_recipe, plan_recipe, run_recipe
from tests.end_to_end.conftest import values_maker, write_task

Maker = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def first(
    tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Maker]:
    """A merged model, and a maker of recipes in the workspace that it lies in."""
    folder = tmp_path_factory.mktemp("merged")
    make = values_maker(write_task(folder), folder / "runs")
    values = make("qa_sparse_peft", tiny_model_dir("llama")) | {"search": {"method": "median"}}
    values["quantize"] = {"method": "rtn", "group_size": 32, "symmetric": False}
    del values["evaluate"]
    result = run_recipe(parse_recipe(values))
    assert result.model_dir is not None
    return result.model_dir, make


def again(first: tuple[Path, Maker], method: str) -> dict[str, Any]:
    model, make = first
    values = make(method, model) | {"name": f"again-{method}", "search": {"method": "median"}}
    for section in ("sparsify", "quantize", "calibration"):
        values.pop(section, None)
    values["evaluate"] |= {"models": ["base", "merged"]}
    if method == "scales":
        values["adapters"] = {"method": "scales"}
        values["train"] = {"max_steps": 6, "batch_size": 4}
        del values["search"]
    return values


@pytest.mark.parametrize("method", ["qa_sparse_peft", "scales"])
def test_what_is_trained_on_it_is_certified_against_it(
    method: str, first: tuple[Path, Maker], capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = first
    result = run_recipe(parse_recipe(again(first, method)))
    assert result.data.passed
    assert result.model_dir is not None
    before, after = open_checkpoint(model), open_checkpoint(result.model_dir)
    assert after.quantized_names == before.quantized_names
    changed = {"codes": 0, "scale": 0}
    for name, mask in read_masks(result.model_dir).items():
        old, new = before.quantized(name), after.quantized(name)
        assert torch.equal(mask, read_masks(model)[name])
        assert torch.equal(new.qparams.zero_point, old.qparams.zero_point)
        assert not new.dequantize()[~mask].any()
        changed["codes"] += int((new.codes != old.codes).sum())
        changed["scale"] += int((new.qparams.scale != old.qparams.scale).sum())
    trained, kept = ("scale", "codes") if method == "scales" else ("codes", "scale")
    assert changed[trained] > 0
    assert changed[kept] == 0
    zeros = {check.name: check for check in check_integrity(result.model_dir)}["zeros"]
    assert "pruned and exactly 0" in zeros.detail
    verify = ["verify", result.model_dir, "--base", model, "--adapter", result.adapter_dir]
    assert run_command_line([str(word) for word in verify]) == 0, capsys.readouterr()


@pytest.mark.parametrize(
    ("method", "changes", "kind", "message"),
    [
        ("qa_sparse_peft", {"sparsify": {"method": "magnitude"}}, CompressionError, "sparsify: .* already"),
        ("qa_sparse_peft", {"quantize": {"method": "rtn"}}, CompressionError, "quantize: .* already"),
        ("sparse_peft", {}, RecipeError, "merges into 16 bits, and .* is quantized; use qa_sparse_peft"),
    ],
)
def test_what_cannot_be_done_to_it_is_refused_by_the_plan(
    method: str, changes: dict[str, Any], kind: type[SqftError], message: str, first: tuple[Path, Maker]
) -> None:
    with pytest.raises(kind, match=message):
        plan_recipe(parse_recipe(again(first, method) | changes))


def test_a_plan_shows_the_grid_that_is_there(first: tuple[Path, Maker]) -> None:
    planned = plan_recipe(
        parse_recipe(again(first, "scales") | {"export": {"formats": ["compressed-tensors"]}})
    )
    assert all(module.quantized and module.num_scales == module.shape[0] * module.shape[1] // 32
               for module in planned.modules)  # fmt: skip


@pytest.mark.parametrize("method", ["qa_sparse_peft", "scales"])
def test_a_grid_that_is_nowhere_is_missed(
    method: str, recipe_values: Maker, tiny_model_dir: Callable[..., Path]
) -> None:
    values = recipe_values("sparse_peft", tiny_model_dir("llama")) | {"adapters": {"method": method}}
    del values["search"]
    del values["train"]
    with pytest.raises(RecipeError, match="has none; add a quantize section"):
        plan_recipe(parse_recipe(values))
