import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from sqft.cli import run_command_line
from sqft.errors import AdapterError, ExportError
from sqft.export import export_adapter, export_model
from sqft.models import load_model
from sqft.runtimes.llama_cpp import LlamaCpp
from sqft.runtimes.speed import llama_cpp_speed, measure_speed, open_artefact

ITEM = [5, 9, 200, 7, 30, 99, 120, 44]


def write_adapter(base_dir: Path, directory: Path) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", rank_pattern={"o_proj": 4})
    model = get_peft_model(load_model(base_dir), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(directory)
    return model.eval()


@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_llama_cpp_adds_the_same_update(merged_dir: Callable[..., Path], tmp_path: Path, arch: str) -> None:
    pytest.importorskip("xllamacpp")
    base_dir = merged_dir(arch)
    model = write_adapter(base_dir, tmp_path / "adapter")
    export_model(base_dir, "gguf", tmp_path / "base")
    lora = export_adapter(tmp_path / "adapter", base_dir, "gguf", tmp_path / "lora")
    runtime = LlamaCpp(tmp_path / "base" / "model.gguf", threads=1, lora_path=lora)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ITEM])).logits[0, -1].log_softmax(-1)
        plain = load_model(base_dir)(input_ids=torch.tensor([ITEM])).logits[0, -1].log_softmax(-1)
    found = runtime.next_log_probabilities(ITEM, 288)
    assert (found - expected).abs().max() < 0.2 * (plain - expected).abs().max()


def test_a_plain_adapter_stays_stock_peft(merged_dir: Callable[..., Path], tmp_path: Path) -> None:
    model = write_adapter(merged_dir(), tmp_path / "adapter")
    assert run_command_line(
        ["export", str(tmp_path / "adapter"), "--to", "peft", "--output", str(tmp_path / "out")]
    ) == 0  # fmt: skip
    again = PeftModel.from_pretrained(load_model(merged_dir()), tmp_path / "out").eval()
    ids = torch.tensor([ITEM])
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_masked_adapter_is_never_written_dense(merged_dir: Callable[..., Path], tmp_path: Path) -> None:
    write_adapter(merged_dir(), tmp_path / "adapter")
    with pytest.raises(ExportError, match="choose peft or gguf"):
        export_adapter(tmp_path / "adapter", merged_dir(), "openvino", tmp_path / "out")
    with pytest.raises(ExportError, match="give the base too"):
        export_adapter(tmp_path / "adapter", None, "gguf", tmp_path / "out")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "SQFT"}))
    with pytest.raises(AdapterError, match="merge it with the recipe"):
        export_adapter(tmp_path / "adapter", merged_dir(), "peft", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_speed_is_measured_in_every_launch(merged_dir: Callable[..., Path], tmp_path: Path) -> None:
    # Merged and unmerged side by side: tests/runtimes/test_speed.py. A launch imports torch and transformers.
    write_adapter(merged_dir(), tmp_path / "adapter")
    merged = open_artefact(merged_dir(), "merged")
    (row,) = measure_speed([merged], prompt_tokens=4, new_tokens=4, rounds=2, launches=2, threads=1)
    assert row.name == "merged"
    assert len(row.tokens_per_second) == 4
    assert row.decode_speed > 0
    assert row.first_token_seconds > 0
    assert row.peak_bytes > 0
    unmerged = open_artefact(merged_dir(), "unmerged", tmp_path / "adapter")
    assert unmerged.size_bytes > merged.size_bytes == row.size_bytes
    with pytest.raises(ExportError, match="neither a model directory"):
        open_artefact(tmp_path)


def test_an_adapter_for_llama_cpp_is_no_larger_than_its_own_converter_writes(
    merged_dir: Callable[..., Path], tmp_path: Path
) -> None:
    write_adapter(merged_dir(), tmp_path / "adapter")
    lora = export_adapter(tmp_path / "adapter", merged_dir(), "gguf", tmp_path / "lora")
    kinds = {tensor.tensor_type.name for tensor in GGUFReader(lora).tensors}
    assert kinds == {"F16"}
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor * 1e6 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ExportError, match="does not fit float16; merge it"):
        export_adapter(tmp_path / "adapter", merged_dir(), "gguf", tmp_path / "large")
    assert not (tmp_path / "large").exists()


def test_the_first_token_is_timed_once() -> None:
    # llama.cpp: the prompt's time includes the first token, which the count of predicted ones includes too.
    timings = {"prompt_ms": 200.0, "predicted_n": 11.0, "predicted_ms": 100.0, "predicted_per_token_ms": 9.1}
    first, speed = llama_cpp_speed(timings)
    assert first == 0.2
    assert speed == pytest.approx(100)
