"""Identities, reuse, locks and damage, on a recipe that only compresses by magnitude."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sqft.errors import DataError, WorkspaceError
from sqft.pipeline import parse_recipe, run_recipe, workspace_status
from sqft.pipeline.runner import open_workspace, stage_keys


@pytest.fixture
def values(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> dict[str, Any]:
    return {
        "model": str(tiny_model_dir("llama")),
        "sparsify": {"method": "magnitude"},
        "quantize": {"method": "rtn", "group_size": 32},
        "runtime": {"workspace": str(tmp_path / "runs"), "device": "cpu"},
    }


def test_compression_alone_needs_no_data(values: dict[str, Any]) -> None:
    result = run_recipe(parse_recipe(values))
    assert result.model_dir is not None
    assert result.model_dir.name == "model"
    assert not list(result.model_dir.glob("manifest.json"))
    status = workspace_status(Path(values["runtime"]["workspace"]))
    assert [(row.name, row.finished) for row in status] == [("quantize", True), ("sparsify", True)]


def test_runtime_settings_do_not_enter_an_identity(values: dict[str, Any]) -> None:
    keys = stage_keys(parse_recipe(values), "model")
    values["runtime"]["threads"] = 2
    values["name"] = "other"
    assert stage_keys(parse_recipe(values), "model") == keys
    values["sparsify"]["sparsity"] = 0.6
    changed = stage_keys(parse_recipe(values), "model")
    assert changed["sparsify"] != keys["sparsify"]
    assert changed["quantize"] != keys["quantize"]
    assert stage_keys(parse_recipe(values), "another model")["sparsify"] != changed["sparsify"]


def test_data_enters_by_content(values: dict[str, Any], tmp_path: Path) -> None:
    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).write_text(text)
    recipes = [parse_recipe({**values, "data": {"train": str(tmp_path / name)}}) for name in "abc"]
    keys = [stage_keys(recipe, "model")["data"] for recipe in recipes]
    assert keys[0] == keys[1] != keys[2]
    with pytest.raises(DataError, match="there is no file"):
        stage_keys(parse_recipe({**values, "data": {"train": str(tmp_path / "none")}}), "model")


def test_a_changed_stage_directory_is_noticed(values: dict[str, Any]) -> None:
    result = run_recipe(parse_recipe(values))
    weights = result.stages[0].directory / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(WorkspaceError, match=r"model\.safetensors in it changed"):
        run_recipe(parse_recipe(values))


def test_one_run_at_a_time(values: dict[str, Any]) -> None:
    with (
        open_workspace(Path(values["runtime"]["workspace"])),
        pytest.raises(WorkspaceError, match="another run"),
    ):
        run_recipe(parse_recipe(values))


def test_workspace_that_cannot_be_written(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    values["runtime"]["workspace"] = str(tmp_path / "file")
    with pytest.raises(WorkspaceError, match="cannot write"):
        run_recipe(parse_recipe(values))
