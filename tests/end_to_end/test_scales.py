"""Scales and norms trained in place: alone, beside a low-rank update, and on a sparse 16-bit model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sqft.certificate import check_provenance
from sqft.cli import run_command_line
from sqft.errors import RecipeError
from sqft.export import export_model
from sqft.models import read_quantized
from sqft.pipeline import parse_recipe, plan_recipe, run_recipe
from sqft.pipeline.opening import open_adapted

TOKENS = torch.arange(4, 24).reshape(2, 10)
ADAPTERS: dict[str, dict[str, Any]] = {
    "scales": {"method": "scales"},
    "both": {"method": "qa_sparse_peft", "train_scales": True, "train_norms": True, "ranks": [6, 4]},
    "sparse": {"method": "sparse_peft", "train_norms": True, "ranks": [6, 4]},
}
DENSE_FORMATS = ["safetensors", "gguf", "openvino"]
FORMATS = ["compressed-tensors", "gguf", "gptq", "openvino"]


@pytest.fixture(scope="module")
def values(
    shared_values: Callable[..., dict[str, Any]], tiny_model_dir: Callable[..., Path]
) -> Callable[..., dict[str, Any]]:
    def make(kind: str, arch: str = "llama") -> dict[str, Any]:
        made = shared_values("sparse_peft" if kind == "sparse" else "qa_sparse_peft", tiny_model_dir(arch))
        made["name"] = f"{kind}-{arch}"
        made["adapters"] = ADAPTERS[kind]
        made["train"] |= {"scale_learning_rate": 2e-2, "norm_learning_rate": 1e-2}
        if kind == "scales":
            del made["search"], made["train"]["learning_rate"]
        return made

    return make


@pytest.mark.parametrize("arch", ["llama", "phi3"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_merged_model_is_the_trained_one(kind: str, arch: str, values: Any) -> None:
    result = run_recipe(parse_recipe(values(kind, arch)))
    assert result.data.passed
    assert result.model_dir is not None
    assert result.adapter_dir is not None
    assert result.base_dir is not None
    adapted = open_adapted(result.base_dir, result.adapter_dir).eval()
    merged = AutoModelForCausalLM.from_pretrained(result.model_dir, dtype=torch.float32)
    with torch.no_grad():
        expected, found = adapted(TOKENS).logits, merged.eval()(TOKENS).logits
    assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()
    checks = check_provenance(result.model_dir, result.base_dir, result.adapter_dir)
    assert all(check.passed for check in checks), checks
    names = [stage.name for stage in result.stages]
    assert ("search" in names) == (kind != "scales")
    rows = {row.name: row.loss for row in result.data.models}
    before = rows["sparse" if kind == "sparse" else "quantized"]
    assert rows["merged"] is not None
    assert before is not None
    assert rows["merged"] < before
    if kind != "sparse":
        base, stored = read_quantized(result.base_dir), read_quantized(result.model_dir)
        moved = sum(int((base[name].qparams.scale != w.qparams.scale).sum()) for name, w in stored.items())
        assert moved > 0
        frozen = [torch.equal(base[name].codes, weight.codes) for name, weight in stored.items()]
        assert all(frozen) == (kind == "scales")


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning:openvino")
@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_format_holds_what_was_trained(kind: str, values: Any, tmp_path: Path) -> None:
    made = values(kind)
    if kind != "sparse":
        made["quantize"] = {"method": "rtn", "target": "gguf-q4_0"}
    del made["evaluate"]
    model_dir = run_recipe(parse_recipe(made)).model_dir
    assert model_dir is not None
    for target in FORMATS if kind != "sparse" else DENSE_FORMATS:
        if target == "openvino":
            pytest.importorskip("openvino")
        record = export_model(model_dir, target, tmp_path / target).as_dict()
        assert record["code_comparison"]["changed"] == 0, target
        assert (record["code_comparison"]["codes"] > 0) == (kind != "sparse"), target
        assert record["code_comparison"]["weights_changed"] == 0, target


def test_the_command_merges_an_adapter_of_ours(
    values: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = values("scales")
    del made["evaluate"]
    result = run_recipe(parse_recipe(made))
    other = values("scales") | {"name": "other", "sparsify": {"method": "magnitude", "sparsity": 0.4}}
    del other["evaluate"], other["adapters"], other["train"]
    other_base = run_recipe(parse_recipe(other)).model_dir
    assert result.model_dir is not None
    arguments = ["--adapter", str(result.adapter_dir), "--output", str(tmp_path / "out")]
    assert run_command_line(["merge", "--base", str(other_base), *arguments]) == 2
    assert run_command_line(["merge", "--base", str(result.base_dir), *arguments, "--data", "x"]) == 2
    refused = capsys.readouterr().err.splitlines()
    assert len(refused) == 2
    assert "belongs to another base, with other codes" in refused[0]
    assert "--data would be ignored" in refused[1]
    assert not (tmp_path / "out").exists()
    arguments += ["--into", "gptq"]
    assert run_command_line(["merge", "--base", str(result.base_dir), *arguments]) == 0
    shown = capsys.readouterr().out
    assert "checks passed" in shown
    assert "0 codes changed" in shown
    assert run_command_line(["verify", str(tmp_path / "out")]) == 0
    for name in ("model.safetensors", "sqft_masks.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (result.model_dir / name).read_bytes()
    facts = json.loads((tmp_path / "out" / "sqft.json").read_text())
    assert facts["prompt"]["prompt"].startswith("question")


def test_the_adapter_is_small_and_a_second_run_does_nothing(values: Any) -> None:
    recipe = parse_recipe(values("scales"))
    result = run_recipe(recipe)
    assert result.adapter_dir is not None
    tensors = load_file(result.adapter_dir / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(stage.reused for stage in run_recipe(recipe).stages)
    assert result.data.ranks == {}


def test_the_plan_shows_what_is_trained(values: Any) -> None:
    planned = plan_recipe(parse_recipe(values("scales")))
    assert all(module.rank == 0 for module in planned.modules if module.num_scales)
    assert {m.name: m.num_scales for m in planned.modules}["mlp.up_proj"] == 128 * 64 // 32
    assert "search" not in {stage.name for stage in planned.stages}
    both = plan_recipe(parse_recipe(values("both")))
    by_name = {module.name: module for module in both.modules}
    assert by_name["self_attn.o_proj"].num_scales > 0
    assert by_name["self_attn.o_proj"].rank == 0
    assert by_name["mlp.up_proj"].rank == 6


def test_the_dense_reference_has_a_rank_of_its_own(values: Any) -> None:
    made = values("scales")
    made["adapters"] = {"method": "scales", "ranks": [4], "alpha": 8}
    made["train"] |= {"learning_rate": 1e-2, "max_steps": 2}
    made["evaluate"]["models"] = ["dense_tuned", "merged"]
    names = [row.name for row in run_recipe(parse_recipe(made)).data.models]
    assert names == ["dense_tuned", "merged"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"search": {"method": "median"}}, "no ranks to choose from"),
        ({"adapters": {"method": "scales", "ranks": [8]}}, "adapters.ranks would be ignored"),
        ({"train": {"learning_rate": 1e-3}}, "train.learning_rate would be ignored"),
        ({"adapters": {"method": "scales", "gradient": "lowrank"}}, "gradient would be ignored"),
        ({"adapters": {"method": "lora", "train_norms": True}}, "train_norms goes with"),
        ({"adapters": {"method": "scales", "train_scales": False}}, "method scales always trains the scales"),
        ({"train": {"scale_learning_rate": 0}}, "greater than 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any], words: str, values: Any) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        parse_recipe(values("scales") | changes)
    assert "\n" not in str(caught.value)
