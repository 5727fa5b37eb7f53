"""Reconstruction in a recipe: the base that adapters, certificate, exports and provenance name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sqft.certificate import check_provenance
from sqft.models import load_model, open_checkpoint, read_masks
from sqft.pipeline import parse_recipe, plan_recipe, run_recipe
from sqft.pipeline.merging import merge_trained

CHAIN = ["model", "sparsify", "quantize", "reconstruct", "train"]
RECONSTRUCT = {"epochs": 2, "batch_size": 2}


@pytest.fixture(scope="module")
def values(
    shared_values: Callable[..., dict[str, Any]], tiny_model_dir: Callable[..., Path]
) -> Callable[..., dict[str, Any]]:
    """`values(**changes)`: sparse INT4, reconstructed; scales and norms trained on it, and merged."""

    def make(**changes: Any) -> dict[str, Any]:
        made = shared_values("qa_sparse_peft", tiny_model_dir("llama"))
        made["adapters"] = {"method": "scales"}
        made["train"] = {"max_steps": 3, "batch_size": 4, "checkpoint_steps": 2}
        made["calibration"] |= {"num_samples": 16}
        del made["search"]
        return made | {"name": "reconstructed", "reconstruct": RECONSTRUCT} | changes

    return make


@pytest.fixture(scope="module")
def result(values: Any) -> Any:
    return run_recipe(parse_recipe(values(export={"formats": ["gguf"]})))


def directory_of(result: Any, name: str) -> Path:
    found: Path = next(stage.directory for stage in result.stages if stage.name == name)
    return found


def test_the_reconstructed_model_is_the_base_of_all_that_follows(result: Any, values: Any) -> None:
    assert result.data.passed
    assert result.base_dir == directory_of(result, "reconstruct")
    assert [row.name for row in result.data.models][2:] == ["quantized", "reconstructed", "merged"]
    facts = json.loads((result.model_dir / "sqft.json").read_text())
    assert list(facts["lineage"]) == CHAIN
    assert facts["recipe"]["reconstruct"]["epochs"] == 2
    checks = check_provenance(result.model_dir, result.base_dir, result.adapter_dir)
    assert all(check.passed for check in checks), checks
    before, after = (open_checkpoint(directory_of(result, name)) for name in ("quantize", "reconstruct"))
    assert after.grid == before.grid
    for name, mask in read_masks(after.directory).items():
        assert torch.equal(mask, read_masks(before.directory)[name])
    facts["recipe"]["reconstruct"]["epochs"] = 3
    (result.model_dir / "sqft.json").write_text(json.dumps(facts))
    checks = check_provenance(result.model_dir, result.base_dir, result.adapter_dir)
    assert any("reconstruct is not what the base was made with" in check.detail for check in checks)


def test_what_was_fitted_is_told_with_what_it_took(result: Any) -> None:
    record = json.loads((result.base_dir / "sqft_layers.json").read_text())
    assert [block["name"] for block in record["blocks"]] == ["model.layers.0", "model.layers.1"]
    assert all(block["loss_after"] <= block["loss_before"] for block in record["blocks"])
    assert {layer["error"] for layer in record["layers"]} == {None}
    (note,) = [note for note in result.data.notes if note.startswith("reconstruction: ")]
    assert "of 2 blocks came closer" in note
    assert "1,792 tokens through each" in note  # 2 epochs over 14 sequences of 64
    assert any(note.startswith("reconstructed against compressed: loss ") for note in result.data.notes)


def test_stages_before_it_are_shared_and_its_own_is_planned(result: Any, values: Any) -> None:
    planned = {stage.name: stage for stage in plan_recipe(parse_recipe(values())).stages}
    assert planned["reconstruct"].reused
    assert planned["reconstruct"].memory_bytes > planned["quantize"].memory_bytes / 2
    assert planned["reconstruct"].disk_bytes == planned["quantize"].disk_bytes
    changed = plan_recipe(parse_recipe(values(reconstruct=RECONSTRUCT | {"epochs": 3}))).stages
    assert [stage.name for stage in changed if stage.reused][:3] == ["items", "sparsify", "quantize"]
    assert not {"reconstruct", "train"} & {stage.name for stage in changed if stage.reused}


def test_merging_by_hand_and_a_sparse_16_bit_model(result: Any, values: Any, tmp_path: Path) -> None:
    checks = merge_trained(result.base_dir, result.adapter_dir, tmp_path / "merged")
    assert all(check.passed for check in checks)
    ids = torch.arange(4, 24).reshape(2, 10)
    with torch.no_grad():
        first, second = (load_model(path)(ids).logits for path in (tmp_path / "merged", result.model_dir))
    assert torch.equal(first, second)
    made = values(name="sixteen", adapters={"method": "sparse_peft", "ranks": [4]})
    del made["quantize"]
    assert run_recipe(parse_recipe(made)).data.passed
