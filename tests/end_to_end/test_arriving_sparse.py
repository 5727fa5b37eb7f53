"""A model that others made sparse keeps its zeros through every pipeline that merges, and it is said."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sqft.certificate import check_integrity
from sqft.errors import CompressionError
from sqft.models import open_checkpoint, read_masks
from sqft.pipeline import parse_recipe, run_recipe


@pytest.fixture
def sparse_dir(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> Path:
    directory = shutil.copytree(tiny_model_dir("llama"), tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("proj.weight"):
            tensor[torch.rand(tensor.shape) < 0.5] = 0
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("pipeline", ["sparse_peft", "qa_sparse_peft"])
def test_zeros_are_kept_and_certified(
    pipeline: str,
    recipe_values: Callable[..., dict[str, Any]],
    sparse_dir: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    values = recipe_values(pipeline, sparse_dir)
    del values["sparsify"]
    with caplog.at_level(logging.WARNING, "sqft"):
        result = run_recipe(parse_recipe(values))
    assert [r.getMessage() for r in caplog.records if "arrive sparse" in r.getMessage()] == [
        "14 linears arrive sparse; their zeros are kept, as the recipe has no sparsify section"
    ]
    assert result.model_dir is not None
    before, after = open_checkpoint(sparse_dir), open_checkpoint(result.model_dir)
    masks = read_masks(result.model_dir)
    for name in before.linears:
        if name.startswith("model.layers."):
            assert not after.weight(name)[before.weight(name) == 0].any(), name
    assert all(torch.equal(mask, before.weight(name) != 0) for name, mask in masks.items())
    assert len(masks) == (14 if pipeline == "qa_sparse_peft" else 10)
    assert result.data.passed
    zeros = {check.name: check for check in check_integrity(result.model_dir)}["zeros"]
    assert "pruned and exactly 0" in zeros.detail
    assert all(row.sparsity is not None and row.sparsity > 0.49 for row in result.data.models)


def test_asking_for_fewer_zeros_is_refused(
    recipe_values: Callable[..., dict[str, Any]], sparse_dir: Path
) -> None:
    values = recipe_values("sparse_peft", sparse_dir)
    values["sparsify"] = {"method": "magnitude", "sparsity": 0.3}
    with pytest.raises(CompressionError, match=r"arrives with 5\d\.\d% zeros"):
        run_recipe(parse_recipe(values))
