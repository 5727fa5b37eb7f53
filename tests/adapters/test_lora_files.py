"""Adapters of PEFT: what is taken is what PEFT merges, and what would merge wrongly is told."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.foreign.merges import merge

from sqft.adapters.lora_files import open_foreign_adapter
from sqft.errors import AdapterError, ExportError
from sqft.models import CheckpointWriter, load_model, open_checkpoint

ModelDir = Callable[..., Path]
MergedDir = Callable[..., Path]


def write_adapter(base_dir: Path, directory: Path, targets: list[str], **options: object) -> Path:
    """An untrained adapter with an update that is not 0."""
    model = get_peft_model(
        load_model(base_dir), LoraConfig(r=8, lora_alpha=16, target_modules=targets, **options)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name and not options.get("init_lora_weights"):
            torch.nn.init.normal_(parameter, std=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of embedding layers that are saved too
        model.save_pretrained(directory)
    return directory


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_a_converted_start_is_taken(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    base_dir = tiny_model_dir()
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], init_lora_weights="pissa")
    model = get_peft_model(load_model(base_dir), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "first")
    model.peft_config["default"].init_lora_weights = "pissa"
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(1.1)
    model.save_pretrained(tmp_path / "wrong")
    with pytest.raises(AdapterError, match="started by pissa"):
        open_foreign_adapter(tmp_path / "wrong")
    model.save_pretrained(
        tmp_path / "right", path_initial_model_for_weight_conversion=str(tmp_path / "first")
    )
    base = load_model(base_dir).model.layers[0].self_attn.q_proj.weight.detach()
    found = open_foreign_adapter(tmp_path / "right").adapted("model.layers.0.self_attn.q_proj", base)
    expected = layer.get_base_layer().weight.detach() + layer.get_delta_weight("default").detach()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_magnitude_vector"])
def test_an_adapter_that_is_not_finite_is_told(merged_dir: MergedDir, tmp_path: Path, part: str) -> None:
    adapter_dir = write_adapter(merged_dir(), tmp_path / "adapter", ["q_proj"], use_dora=True)
    path = adapter_dir / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if part in key and "layers.1" in key)
    tensors[key].view(-1)[3] = float("nan")
    save_file(tensors, path)
    with pytest.raises(AdapterError, match=f"{part} of model.layers.1.self_attn.q_proj is not finite"):
        merge(merged_dir(), adapter_dir, tmp_path / "out")


def test_a_loss_that_is_not_finite_is_never_best(merged_dir: MergedDir, tmp_path: Path) -> None:
    adapter_dir = write_adapter(merged_dir(), tmp_path / "adapter", ["q_proj"])
    calibration = torch.randint(4, 288, (4, 16))
    losses = iter([3.0, 1.0, float("nan"), 1.5])
    result = merge(
        merged_dir(), adapter_dir, tmp_path / "out", calibration=calibration, measure=lambda _: next(losses),
        rungs=["round", "feedback"],
    )  # fmt: skip
    assert result.chosen == "feedback"
    assert result.rungs[0].retention is None
    report = (tmp_path / "out" / "sqft_merge.json").read_text()
    assert "NaN" not in report
    assert "Infinity" not in report
    losses = iter([3.0, 1.0, float("nan"), float("inf")])
    with pytest.raises(ExportError, match=r"no rung .*finite loss"):
        merge(
            merged_dir(), adapter_dir, tmp_path / "bad", calibration=calibration,
            measure=lambda _: next(losses), rungs=["round", "feedback"],
        )  # fmt: skip
    values = iter([3.0, float("nan")])
    with pytest.raises(ExportError, match="the loss of the unmerged model is not finite"):
        merge(
            merged_dir(), adapter_dir, tmp_path / "bad",
            measure=lambda _: next(values),
        )  # fmt: skip
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("rung", ["round", "feedback", "rescale", "polish"])
def test_every_rung_keeps_the_update_of_a_head_without_a_grid(
    merged_dir: MergedDir, tmp_path: Path, rung: str
) -> None:
    adapter_dir = write_adapter(merged_dir(), tmp_path / "adapter", ["lm_head", "q_proj"])
    calibration = torch.randint(4, 288, (4, 16))
    merge(merged_dir(), adapter_dir, tmp_path / "out", calibration=calibration, rungs=[rung], polish_steps=2)
    base = open_checkpoint(merged_dir()).tensor("lm_head.weight").float()
    wanted = open_foreign_adapter(adapter_dir).adapted("lm_head", base) - base
    found = open_checkpoint(tmp_path / "out").tensor("lm_head.weight").float() - base
    assert (found - wanted).norm() < 0.1 * wanted.norm()


def test_a_plain_linear_inside_a_block_is_no_part_of_the_feedback(
    merged_dir: MergedDir, tmp_path: Path
) -> None:
    name, base_dir = "model.layers.0.self_attn.q_proj", tmp_path / "base"
    source = open_checkpoint(merged_dir())
    writer = CheckpointWriter(base_dir, source)
    kept = [other for other in source.quantized_names if other != name]
    writer.prepare(quantized=kept, grid=source.grid)
    for other in kept:
        writer.write_linear(other, source.quantized(other))
    writer.close()
    adapter_dir = write_adapter(base_dir, tmp_path / "adapter", ["q_proj"])
    calibration = torch.randint(4, 288, (4, 16))
    merge(base_dir, adapter_dir, tmp_path / "out", calibration=calibration, rungs=["feedback"])
    before, after = open_checkpoint(base_dir).weight(name), open_checkpoint(tmp_path / "out").weight(name)
    wanted = open_foreign_adapter(adapter_dir).adapted(name, before)
    assert torch.equal(after, torch.where(before != 0, wanted, 0).to(after.dtype))  # its zeros are a mask


def test_a_head_that_is_tied_or_brought_along_is_told(
    tiny_model_dir: ModelDir, merged_dir: MergedDir, tmp_path: Path
) -> None:
    tied = tiny_model_dir(tie_word_embeddings=True)
    adapter_dir = write_adapter(merged_dir(), tmp_path / "adapter", ["lm_head"])
    with pytest.raises(AdapterError, match="lm_head, which the base ties to its embedding"):
        merge(tied, adapter_dir, tmp_path / "out")
    stored = shutil.copytree(tied, tmp_path / "stored")  # some tools write a tied head too
    weights = load_file(stored / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, stored / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match="lm_head, which the base ties to its embedding"):
        merge(stored, adapter_dir, tmp_path / "out")
    path = adapter_dir / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.lm_head.base_layer.weight"
    tensors[key] = tensors[key] + 1
    save_file(tensors, path)
    with pytest.raises(
        AdapterError, match=r"has a lm_head\.weight of its own, which differs from the base's"
    ):
        merge(merged_dir(), adapter_dir, tmp_path / "out")
