"""The four pipelines of the paper, from a model directory to what is served, on tiny random models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import sqft.adapters
from sqft.cli import run_command_line
from sqft.marks import Mark, write_mark
from sqft.models import load_model, load_trainable, read_masks, read_quantized
from sqft.ops import QuantizedWeight
from sqft.ops.pattern import fits_pattern
from sqft.pipeline import RunResult, parse_recipe, run_recipe
from tests.end_to_end.conftest import PIPELINES

TOKENS = torch.arange(4, 24).reshape(2, 10)


@pytest.mark.parametrize("arch", ["llama", "mistral", "phi3"])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_result_is_the_trained_model(
    pipeline: str,
    arch: str,
    shared_values: Callable[..., dict[str, Any]],
    tiny_model_dir: Callable[..., Path],
) -> None:
    values = shared_values(pipeline, tiny_model_dir(arch)) | {"name": f"{pipeline}-{arch}"}
    result = run_recipe(parse_recipe(values))
    stages = {stage.name: stage.directory for stage in result.stages}
    base_stage = "quantize" if pipeline in ("sqft", "qa_sparse_peft") else "sparsify"
    assert result.model_dir is not None

    adapted = load_trainable(stages[base_stage])
    adapted = PeftModel.from_pretrained(adapted, stages["train"] / "adapter").eval()
    sqft.adapters.set_ranks(adapted, result.data.ranks)
    if pipeline == "sqft":  # stock PEFT wraps plain weights only
        served = load_model(result.model_dir)
    else:
        served = AutoModelForCausalLM.from_pretrained(result.model_dir, dtype=torch.float32)
    merges = pipeline in ("sparse_peft", "qa_sparse_peft")
    assert result.adapter_dir is not None
    if not merges:  # plain LoRA stays beside its base
        served = PeftModel.from_pretrained(served, result.adapter_dir)
    with torch.no_grad():
        expected, found = adapted(TOKENS).logits, served.eval()(TOKENS).logits
    assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()

    masks = read_masks(stages["sparsify"])
    trained = served if merges else served.base_model.model
    for name, mask in masks.items():
        weight = getattr(trained.get_submodule(name), "base_layer", trained.get_submodule(name)).weight
        assert (weight[~mask] == 0).all(), name
        assert abs(mask.float().mean().item() - 0.5) < 0.001
    if pipeline == "qa_sparse_peft":
        merged = sqft.adapters.merge_adapters(adapted)
        stored = read_quantized(result.model_dir)
        for name, weight in merged.items():
            assert isinstance(weight.weight, QuantizedWeight)
            assert torch.equal(weight.weight.codes, stored[name].codes), name
    if pipeline == "sparse_peft":
        merged = sqft.adapters.merge_adapters(adapted)
        for name, weight in merged.items():
            assert isinstance(weight.weight, torch.Tensor)
            assert torch.equal(weight.weight.float(), served.get_submodule(name).weight)
    _check_report(result, merges=merges)
    for row in result.data.models[1:]:
        assert row.sparsity == pytest.approx(0.5, abs=0.06), row.name


def _check_report(result: RunResult, *, merges: bool) -> None:
    report = json.loads(result.report_json.read_text())
    names = [row["name"] for row in report["models"]]
    assert names[0] == "base"
    assert names[-1] == ("merged" if merges else "adapted")
    for row in report["models"]:
        assert row["num_items"] == 12
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
        assert row["size_bytes"] > 0
    if merges:
        assert report["certificate"]["passed"]
        assert len(report["certificate"]["checks"]) >= 3
    else:
        assert report["certificate"] is None
    assert "<html" in result.report_html.read_text()


def test_second_run_does_nothing_and_a_changed_section_reuses_what_stands_before_it(
    recipe_values: Callable[..., dict[str, Any]], tiny_model_dir: Callable[..., Path]
) -> None:
    values = recipe_values("qa_sparse_peft", tiny_model_dir("llama"))
    first = run_recipe(parse_recipe(values))
    assert not any(stage.reused for stage in first.stages)
    assert all(stage.reused for stage in run_recipe(parse_recipe(values)).stages)
    values["train"]["learning_rate"] = 1e-2
    reused = {stage.name: stage.reused for stage in run_recipe(parse_recipe(values)).stages}
    assert reused["sparsify"]
    assert reused["quantize"]
    assert not reused["train"]
    assert not reused["merge"]


def test_a_search_that_was_killed_at_its_very_end_is_gone_on_with(
    recipe_values: Callable[..., dict[str, Any]], tiny_model_dir: Callable[..., Path]
) -> None:
    values = recipe_values("shears", tiny_model_dir("llama"))
    values["train"]["max_steps"] = values["search"]["num_trials"] = 2
    recipe = parse_recipe(values)
    (whole,) = [stage for stage in run_recipe(recipe).stages if stage.name == "search"]
    partial = whole.directory.with_name(f"{whole.directory.name}.partial")
    whole.directory.rename(partial)
    (partial / "manifest.json").unlink()
    write_mark(partial, Mark({"stage": whole.manifest.key}))
    (again,) = [stage for stage in run_recipe(recipe).stages if stage.name == "search"]
    assert not again.reused
    for name in ("adapter/adapter_model.safetensors", "adapter/sqft.json", "sub_adapter.json"):
        assert again.manifest.files[name] == whole.manifest.files[name]


def test_dense_quantization_aware_training_needs_no_mask(
    shared_values: Callable[..., dict[str, Any]], tiny_model_dir: Callable[..., Path]
) -> None:
    values = shared_values("qa_sparse_peft", tiny_model_dir("llama")) | {"name": "dense"}
    del values["sparsify"]
    values["evaluate"]["models"] = ["base", "dense_tuned", "quantized", "adapted", "merged"]
    result = run_recipe(parse_recipe(values))
    rows = {row.name: row for row in result.data.models}
    assert result.data.passed
    assert rows["adapted"].loss == pytest.approx(rows["merged"].loss, rel=1e-5)
    dense, tuned = rows["base"].loss, rows["dense_tuned"].loss
    assert dense is not None
    assert tuned is not None
    assert tuned < dense


def test_windows_are_kept_from_pruning_to_the_certificate(
    recipe_values: Callable[..., dict[str, Any]],
    tiny_model_dir: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = recipe_values("qa_sparse_peft", tiny_model_dir("llama"))
    values["sparsify"] = {"method": "sparsegpt", "target": "cpu", "swaps": 3, "refit": 3}
    values["quantize"] |= {"refit": 3, "descent": 1}
    values["evaluate"] = {"models": ["merged"]}
    result = run_recipe(parse_recipe(values))
    assert result.data.passed
    assert result.model_dir is not None
    assert all(fits_pattern(mask, "16:32 window 2") for mask in read_masks(result.model_dir).values())
    assert json.loads((result.model_dir / "sqft.json").read_text())["pattern"] == "16:32 window 2"
    assert run_command_line(["inspect", str(result.model_dir)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "_proj" in line]
    assert rows
    assert all("16:32 window 2" in row for row in rows)
