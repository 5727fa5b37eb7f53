"""The GPTQ file against the format's published reading, word by word."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sqft.export import export_model
from sqft.export.fidelity import compare_codes
from sqft.formats.gptq import read_gptq, write_gptq
from sqft.formats.weights import open_source
from sqft.models import read_quantized
from sqft.ops import QuantizedWeight


@pytest.mark.parametrize(
    ("changes", "version"), [({}, "gptq"), ({"symmetric": False}, "gptq"), ({"bits": 8}, "gptq")]
)
def test_the_fields_are_those_that_gptq_readers_expect(
    merged_dir: Callable[..., Path], tmp_path: Path, changes: dict[str, object], version: str
) -> None:
    directory = merged_dir(**changes)
    export_model(directory, "gptq", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    bits = config["bits"]
    assert config["checkpoint_format"] == version
    assert (config["quant_method"], config["desc_act"], config["lm_head"]) == ("gptq", False, False)
    assert config["sym"] == ("symmetric" not in changes)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    shifts = torch.arange(0, 32, bits)
    for name, weight in read_quantized(directory).items():
        rows, columns = weight.codes.shape
        parts = {part: tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
        assert parts["qweight"].shape == (columns * bits // 32, rows)
        assert parts["qzeros"].shape == (columns // config["group_size"], rows * bits // 32)
        assert parts["scales"].dtype == torch.float16
        # AutoGPTQ's own dequantization.
        codes = (parts["qweight"][:, None, :] >> shifts[None, :, None]) & (2**bits - 1)
        codes = codes.reshape(columns, rows)
        zeros = (parts["qzeros"][:, :, None] >> shifts[None, None, :]) & (2**bits - 1)
        zeros = zeros.reshape(-1, rows) + (1 if version == "gptq" else 0)
        g_idx = parts["g_idx"].long()
        dequantized = parts["scales"].float()[g_idx] * (codes - zeros[g_idx]).float()
        assert torch.equal(dequantized.T, weight.dequantize())


def test_a_zero_point_of_0_is_written_as_version_2(merged_dir: Callable[..., Path], tmp_path: Path) -> None:
    source = open_source(merged_dir(symmetric=False))
    name = source.quantized_names[0]
    weight = source.quantized(name)
    zero_point = weight.qparams.zero_point.clone()
    zero_point[0, 0] = 0
    changed = QuantizedWeight(weight.codes, replace(weight.qparams, zero_point=zero_point))
    source = replace(source, replaced={name: changed})
    write_gptq(source, tmp_path)
    config = json.loads((tmp_path / "quantize_config.json").read_text())
    assert config["checkpoint_format"] == "gptq_v2"
    first = int(load_file(tmp_path / "model.safetensors")[f"{name}.qzeros"][0, 0]) & 15
    assert first == 0
    assert compare_codes(source, read_gptq(source, tmp_path)).changed == 0


def test_linears_without_codes_are_named(merged_dir: Callable[..., Path], tmp_path: Path) -> None:
    export_model(merged_dir(), "gptq", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert config["dynamic"] == {}
