import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from sqft.errors import AdapterError, ExportError, ModelError
from sqft.export import export_model
from sqft.export.foreign_adapter import open_foreign_adapter
from sqft.export.foreign_base import convert_base
from sqft.export.merging import merge_foreign
from sqft.models import load_model, read_masks, read_quantized

MergedDir = Callable[..., Path]
TOKENS = torch.randint(4, 288, (12, 24), generator=torch.Generator().manual_seed(5))


def answer_loss(model: nn.Module) -> float:
    """The loss on a fixed target, which an adapter can learn."""
    with torch.no_grad():
        return float(model(input_ids=TOKENS, labels=TOKENS).loss)


def train_adapter(base_dir: Path, directory: Path, *, steps: int = 25, **options: Any) -> Path:
    torch.manual_seed(0)
    model = load_model(base_dir)
    targets = "all-linear" if "phi3" not in str(base_dir) else ["qkv_proj", "down_proj"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, **options)
    adapted = get_peft_model(model, config)
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        adapted(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    adapted.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 4}}]
)
def test_adapted_weights_are_those_of_peft(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    base_dir = tiny_model_dir("llama")
    adapter = open_foreign_adapter(train_adapter(base_dir, tmp_path / "adapter", steps=4, **options))
    model = PeftModel.from_pretrained(load_model(base_dir), tmp_path / "adapter").merge_and_unload()
    base = load_model(base_dir)
    assert len(adapter.names) == 14
    for name in adapter.names:
        expected = model.get_submodule(name).weight
        found = adapter.adapted(name, base.get_submodule(name).weight.detach())
        torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arch", "changes"), [("llama", {}), ("mistral", {"symmetric": False, "sparsity": 0.0}), ("phi3", {})]
)
def test_the_ladder_climbs_and_keeps_grid_and_mask(
    merged_dir: MergedDir, tmp_path: Path, arch: str, changes: dict[str, Any]
) -> None:
    base_dir = merged_dir(arch, **changes)
    adapter_dir = train_adapter(base_dir, tmp_path / "adapter")
    result = merge_foreign(
        base_dir, adapter_dir, tmp_path / "out",
        calibration=TOKENS, measure=answer_loss, enough=2.0, least=0.0,
        polish_steps=20,
    )  # fmt: skip
    losses = {rung.name: rung.loss for rung in result.rungs}
    assert list(losses) == ["round", "feedback", "refit", "polish"]
    assert result.unmerged_loss is not None
    assert result.base_loss is not None
    assert result.unmerged_loss < result.base_loss - 0.1
    assert losses["polish"] < losses["round"]
    assert result.chosen == min(losses, key=lambda name: losses[name])
    assert answer_loss(load_model(tmp_path / "out")) == pytest.approx(losses[result.chosen], abs=1e-5)
    written, masks = read_quantized(tmp_path / "out"), read_masks(base_dir)
    for name, mask in masks.items():
        assert not written[name].dequantize()[~mask].any()
    names = {layer.name for layer in result.erasure}
    for name, weight in read_quantized(base_dir).items():
        if name not in names:
            assert torch.equal(weight.codes, written[name].codes)
    assert not (tmp_path / "out" / "work").exists()
    report = json.loads((tmp_path / "out" / "sqft_merge.json").read_text())
    assert report["chosen"] == result.chosen


def test_enough_ends_the_ladder(merged_dir: MergedDir, tmp_path: Path) -> None:
    adapter_dir = train_adapter(merged_dir(), tmp_path / "adapter")
    result = merge_foreign(
        merged_dir(), adapter_dir, tmp_path / "out", calibration=TOKENS, measure=answer_loss, enough=0.01
    )
    assert [rung.name for rung in result.rungs] == ["round"]
    before, after = read_quantized(merged_dir()), read_quantized(tmp_path / "out")
    for name, weight in before.items():
        assert torch.equal(weight.qparams.scale, after[name].qparams.scale)


def test_an_update_smaller_than_a_step_is_erased_and_refused(merged_dir: MergedDir, tmp_path: Path) -> None:
    adapter_dir = train_adapter(merged_dir(), tmp_path / "adapter", steps=1)
    arguments = {"measure": answer_loss, "rungs": ["round"], "least": 0.9}
    with pytest.raises(ExportError, match=r"the best rung, round, retains .* serve it unmerged"):
        merge_foreign(merged_dir(), adapter_dir, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
    result = merge_foreign(merged_dir(), adapter_dir, tmp_path / "out")
    assert result.rungs[0].loss is None
    assert all(layer.erased > 0.9 for layer in result.erasure)
    assert all(layer.update_in_steps is not None and layer.update_in_steps < 0.1 for layer in result.erasure)


def test_a_sparse_base_keeps_its_zeros(merged_dir: MergedDir, tmp_path: Path) -> None:
    base_dir = merged_dir(quantized=False)
    adapter_dir = train_adapter(base_dir, tmp_path / "adapter")
    result = merge_foreign(
        base_dir, adapter_dir, tmp_path / "out",
        calibration=TOKENS, measure=answer_loss, enough=2.0, least=0.0,
        polish_steps=15,
    )  # fmt: skip
    assert [rung.name for rung in result.rungs] == ["round", "polish"]
    assert 0.3 < result.erasure[0].masked < 0.7
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, mask in read_masks(base_dir).items():
        assert not tensors[f"{name}.weight"][~mask].any()


@pytest.mark.parametrize("changes", [{}, {"symmetric": False}])
def test_a_gptq_base_is_taken_over_code_by_code(
    merged_dir: MergedDir, tmp_path: Path, changes: dict[str, Any]
) -> None:
    export_model(merged_dir(**changes), "gptq", tmp_path / "gptq")
    converted = convert_base(tmp_path / "gptq", tmp_path / "converted")
    found = read_quantized(converted)
    for name, weight in read_quantized(merged_dir(**changes)).items():
        assert torch.equal(found[name].codes, weight.codes)
        assert torch.equal(found[name].qparams.scale, weight.qparams.scale)
        assert torch.equal(found[name].qparams.zero_point, weight.qparams.zero_point)
    adapter_dir = train_adapter(merged_dir(**changes), tmp_path / "adapter", steps=3)
    assert merge_foreign(tmp_path / "gptq", adapter_dir, tmp_path / "out").chosen == "round"


def test_an_awq_base_is_read_in_its_own_order(merged_dir: MergedDir, tmp_path: Path) -> None:
    weights = read_quantized(merged_dir(symmetric=False))
    tensors = load_file(merged_dir(symmetric=False) / "model.safetensors")
    tensors = {key: t for key, t in tensors.items() if key.rpartition(".")[0] not in weights}

    def pack(values: torch.Tensor) -> torch.Tensor:
        words = torch.zeros(values.shape[0], values.shape[1] // 8, dtype=torch.int32)
        for position, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):  # AutoAWQ's own loop
            words |= values.int()[:, column::8] << (4 * position)
        return words

    for name, weight in weights.items():
        tensors[f"{name}.qweight"] = pack(weight.codes.T)
        tensors[f"{name}.qzeros"] = pack(weight.qparams.zero_point.T)
        tensors[f"{name}.scales"] = weight.qparams.scale.T.half().contiguous()
    directory = tmp_path / "awq"
    directory.mkdir()
    save_file({key: t.contiguous() for key, t in tensors.items()}, directory / "model.safetensors")
    config = json.loads((merged_dir(symmetric=False) / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "version": "gemm"}
    (directory / "config.json").write_text(json.dumps(config))
    found = read_quantized(convert_base(directory, tmp_path / "converted"))
    for name, weight in weights.items():
        assert torch.equal(found[name].codes, weight.codes)
        assert torch.equal(found[name].qparams.zero_point, weight.qparams.zero_point)


def test_what_cannot_be_merged_is_told(merged_dir: MergedDir, tmp_path: Path) -> None:
    adapter_dir = train_adapter(merged_dir(), tmp_path / "adapter", steps=1)
    path = adapter_dir / "adapter_config.json"
    config = json.loads(path.read_text())
    for change, message in (
        ({"peft_type": "SQFT"}, "merge it with the recipe that trained it"),
        ({"peft_type": "IA3"}, "only LORA can be merged"),
        ({"modules_to_save": ["lm_head"]}, "sets modules_to_save"),
        ({"bias": "all"}, "trains biases"),
        ({"use_dora": True}, "lacks lora_magnitude_vector"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(AdapterError, match=message):
            merge_foreign(merged_dir(), adapter_dir, tmp_path / "out")
    path.write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="which the base does not have"):
        merge_foreign(merged_dir("phi3"), adapter_dir, tmp_path / "out")
    with pytest.raises(ExportError, match="rung magic is unknown"):
        merge_foreign(merged_dir(), adapter_dir, tmp_path / "out", rungs=["magic"])
    with pytest.raises(ModelError, match="not a model directory"):
        merge_foreign(tmp_path, adapter_dir, tmp_path / "out")
    with pytest.raises(AdapterError, match="not a PEFT adapter"):
        merge_foreign(merged_dir(), tmp_path, tmp_path / "out")
