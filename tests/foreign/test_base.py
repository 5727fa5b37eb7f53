"""Bases of other tools: taken over code by code, or as 16 bits, one linear in memory at a time."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sqft.errors import ModelError
from sqft.export import export_model
from sqft.foreign.base import convert_base, convert_training_base
from sqft.formats.nf4 import round_to_nf4
from sqft.models import load_model, open_checkpoint, read_quantized
from tests.memory import Watch

MergedDir = Callable[..., Path]
ModelDir = Callable[..., Path]
RECORDED = Path(__file__).parents[1] / "formats" / "nf4_reference.safetensors"
BLOCK_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def change(directory: Path, edit: Callable[[dict[str, Tensor]], Any], **quantization: Any) -> None:
    path, config_path = directory / "model.safetensors", directory / "config.json"
    tensors = load_file(path)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    config = json.loads(config_path.read_text())
    config["quantization_config"] = config.get("quantization_config", {}) | quantization
    config_path.write_text(json.dumps(config))


def write_gptq(dense_dir: Path, directory: Path) -> Path:
    """A symmetric GPTQ model of random codes, in groups of 32, written by the format's own rules."""
    shutil.copytree(dense_dir, directory)

    def quantize(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            rows, columns = tensors.pop(name).shape
            linear, groups = name.removesuffix(".weight"), columns // 32
            tensors[f"{linear}.qweight"] = torch.randint(-(2**31), 2**31, (columns // 8, rows)).int()
            tensors[f"{linear}.qzeros"] = torch.full((groups, rows // 8), 0x77777777).int()
            tensors[f"{linear}.scales"] = torch.rand(groups, rows).half() * 0.02 + 0.01
            tensors[f"{linear}.g_idx"] = (torch.arange(columns) // 32).int()

    change(directory, quantize, quant_method="gptq", bits=4, group_size=32, checkpoint_format="gptq")
    return directory


def reorder(directory: Path) -> None:
    """Put the columns into groups in another order, as activation order does."""

    def shuffle(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("g_idx")]:
            tensors[name] = tensors[name][torch.randperm(len(tensors[name]))]

    change(directory, shuffle, desc_act=True)


def obvious_weight(tensors: dict[str, Tensor], name: str) -> Tensor:
    """AutoGPTQ's own dequantization of 4-bit version 1, a value at a time."""
    words, index = tensors[f"{name}.qweight"].long(), tensors[f"{name}.g_idx"].tolist()
    zeros, scales = tensors[f"{name}.qzeros"].long(), tensors[f"{name}.scales"].float()
    columns, rows = len(index), words.shape[1]
    weight = torch.empty(rows, columns)
    for column in range(columns):
        codes = (words[column // 8] >> (4 * (column % 8))) & 15
        shifts = 4 * (torch.arange(rows) % 8)
        zero = ((zeros[index[column]][torch.arange(rows) // 8] >> shifts) & 15) + 1
        weight[:, column] = (codes - zero) * scales[index[column]]
    return weight


@pytest.mark.parametrize("changes", [{}, {"symmetric": False}, {"bits": 3}, {"bits": 8, "group_size": -1}])
def test_a_gptq_base_is_taken_over_code_by_code(
    merged_dir: MergedDir, tmp_path: Path, changes: dict[str, Any]
) -> None:
    export_model(merged_dir(**changes), "gptq", tmp_path / "gptq")
    found = read_quantized(convert_base(tmp_path / "gptq", tmp_path / "converted"))
    for name, weight in read_quantized(merged_dir(**changes)).items():
        assert torch.equal(found[name].codes, weight.codes)
        assert torch.equal(found[name].qparams.scale, weight.qparams.scale)
        assert torch.equal(found[name].qparams.zero_point, weight.qparams.zero_point)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_zero_points_of_both_versions_are_understood(
    merged_dir: MergedDir, tmp_path: Path, version: str
) -> None:
    directory = merged_dir(symmetric=False)
    export_model(directory, "gptq", tmp_path / "gptq")

    def to_version(tensors: dict[str, Tensor]) -> None:
        for name in tensors if version == "gptq_v2" else []:
            if name.endswith("qzeros"):  # no zero point here is 15, so adding 1 to each carries nowhere
                tensors[name] = (tensors[name].long() + 0x11111111).int()

    change(tmp_path / "gptq", to_version, checkpoint_format=version)
    found = read_quantized(convert_base(tmp_path / "gptq", tmp_path / "converted"))
    for name, weight in read_quantized(directory).items():
        assert torch.equal(found[name].qparams.zero_point, weight.qparams.zero_point)


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
    dense = open_checkpoint(convert_base(directory, tmp_path / "dense", dequantize=True))
    for name, weight in weights.items():
        assert torch.equal(dense.weight(name), weight.dequantize().to(dense.storage_dtype))


def test_one_symmetric_linear_does_not_change_the_grid_of_the_others(
    merged_dir: MergedDir, tmp_path: Path
) -> None:
    export_model(merged_dir(symmetric=False), "gptq", tmp_path / "gptq")
    name = "model.layers.0.self_attn.k_proj"
    change(tmp_path / "gptq", lambda tensors: tensors[f"{name}.qzeros"].fill_(0x77777777))
    found = read_quantized(convert_base(tmp_path / "gptq", tmp_path / "converted"))
    assert bool((found[name].qparams.zero_point == 8).all())
    other = "model.layers.1.self_attn.k_proj"
    expected = read_quantized(merged_dir(symmetric=False))[other]
    assert torch.equal(found[other].qparams.zero_point, expected.qparams.zero_point)


def test_activation_order_is_refused_or_taken_as_16_bits(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    directory = write_gptq(tiny_model_dir(), tmp_path / "gptq")
    reorder(directory)
    with pytest.raises(ModelError, match=r"activation order .* take it as 16 bits with --dequantize, and"):
        convert_base(directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    dense = open_checkpoint(convert_base(directory, tmp_path / "out", dequantize=True))
    assert dense.grid is None
    stored = load_file(directory / "model.safetensors")
    for name in (f"model.layers.1.mlp.{end}_proj" for end in ("up", "down")):
        expected = obvious_weight(stored, name).to(dense.storage_dtype)
        assert torch.equal(dense.weight(name), expected)
        plain = open_checkpoint(tiny_model_dir()).weight(name)
        assert not torch.equal(dense.weight(name), plain)


def test_groups_of_more_than_one_size_are_told(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    directory = write_gptq(tiny_model_dir(), tmp_path / "gptq")
    name = "model.layers.0.mlp.up_proj"

    def halve(tensors: dict[str, Tensor]) -> None:
        for part in ("qzeros", "scales"):
            tensors[f"{name}.{part}"] = tensors[f"{name}.{part}"][:1]
        tensors[f"{name}.g_idx"].zero_()

    change(directory, halve)
    with pytest.raises(ModelError, match=r"groups of \[32, 64\] columns, not one size; take it as 16 bits"):
        convert_base(directory, tmp_path / "out")


def test_several_files_and_needless_biases_are_read(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    directory = write_gptq(tiny_model_dir(), tmp_path / "gptq")
    expected = load_model(convert_base(directory, tmp_path / "one"))
    tensors = load_file(directory / "model.safetensors")
    linears = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    tensors |= {f"{name}.bias": torch.zeros(4) for name in linears}  # AutoGPTQ wrote them for Llama too
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    (directory / "model.safetensors").write_bytes(b"left from elsewhere")
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    found = load_model(convert_base(directory, tmp_path / "two"))
    for (name, value), (_, wanted) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(value, wanted), name


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize("dequantize", [False, True])
def test_memory_does_not_grow_with_the_number_of_linears(
    tiny_model_dir: ModelDir, tmp_path: Path, dequantize: bool
) -> None:
    dense_dir = tiny_model_dir("llama", num_hidden_layers=12, hidden_size=256, intermediate_size=1024)
    directory, watch = write_gptq(dense_dir, tmp_path / "gptq"), Watch()
    convert_base(directory, tmp_path / "out", dequantize=dequantize, progress=watch)
    assert len(watch.seen) == 12 * len(BLOCK_LINEARS)
    all_codes = 9 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 1024)  # of nine blocks, a byte each
    assert watch.seen[-1] - watch.seen[3 * len(BLOCK_LINEARS)] < all_codes / 3


def write_nf4(dense_dir: Path, directory: Path, case: str) -> tuple[Path, str, Tensor]:
    """A model with one linear that bitsandbytes quantized: the directory, the linear, its weight."""
    recorded = {
        name.removeprefix(f"{case}."): tensor
        for name, tensor in load_file(RECORDED).items()
        if name.startswith(f"{case}.")
    }
    expected = recorded.pop("dequantized")
    name, rows = "model.layers.0.self_attn.q_proj", recorded.pop("dense").shape[0]
    shutil.copytree(dense_dir, directory)

    def quantize(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{part}": tensor for part, tensor in recorded.items()}

    quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    change(directory, quantize, quant_method="bitsandbytes", **quantization)
    assert rows == 64
    return directory, name, expected


@pytest.mark.parametrize("case", ["plain", "double"])
def test_nf4_is_read_as_bitsandbytes_dequantizes_it(
    tiny_model_dir: ModelDir, tmp_path: Path, case: str
) -> None:
    directory, name, expected = write_nf4(tiny_model_dir(), tmp_path / "nf4", case)
    assert torch.equal(
        open_checkpoint(convert_training_base(str(directory), tmp_path / "a")).weight(name), expected
    )
    assert torch.equal(
        open_checkpoint(convert_base(directory, tmp_path / "b", dequantize=True)).weight(name), expected
    )
    with pytest.raises(ModelError, match=r"NF4, no integer grid .* --trained-on, or take it as 16 bits"):
        convert_base(directory, tmp_path / "c")


def test_a_16_bit_directory_is_rounded_as_on_loading(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    dense = open_checkpoint(tiny_model_dir("phi3"))
    directory = convert_training_base(f"nf4:{tiny_model_dir('phi3')}", tmp_path / "out")
    rounded = open_checkpoint(directory)
    changed = {name for name in dense.names if not torch.equal(dense.tensor(name), rounded.tensor(name))}
    assert changed == {f"{name}.weight" for name in dense.linears if name != "lm_head"}
    for name in changed:
        assert torch.equal(rounded.tensor(name), round_to_nf4(dense.tensor(name)))
    load_model(directory)


def test_what_is_no_base_is_told(merged_dir: MergedDir, tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ModelError, match="has a grid that a merge keeps; export it to safetensors"):
        convert_base(merged_dir(), out, dequantize=True)
    with pytest.raises(ModelError, match="is quantized already; nf4: stands before a 16-bit directory"):
        convert_training_base(f"nf4:{merged_dir()}", out)
    with pytest.raises(ModelError, match=r"not a model directory: it has no config\.json"):
        convert_training_base(str(tmp_path / "nothing"), out)
    directory = write_gptq(tiny_model_dir(), tmp_path / "gptq")
    damages: list[tuple[Callable[[dict[str, Tensor]], Any], dict[str, Any], str]] = [
        (lambda t: None, {"quant_method": "hqq"}, "is quantized by hqq; merge onto GPTQ, AWQ"),
        (lambda t: None, {"quant_method": "bitsandbytes"}, "quantized by bitsandbytes, but not to NF4"),
        (lambda t: None, {"quant_method": "awq", "bits": 3}, "AWQ with 3 bits, and only 4 bits can be read"),
        (lambda t: t.pop("model.layers.0.mlp.up_proj.scales"), {}, "lacks the tensor .*up_proj.scales"),
        (lambda t: t.update({"model.magic.qweight": t.pop("lm_head.weight")}), {}, "not a linear of"),
    ]  # fmt: skip
    for number, (edit, quantization, message) in enumerate(damages):
        damaged = tmp_path / str(number)
        shutil.copytree(directory, damaged)
        change(damaged, edit, **quantization)
        with pytest.raises(ModelError, match=message):
            convert_base(damaged, out)
    (directory / "model.safetensors").write_bytes(b"\0" * 99)
    with pytest.raises(ModelError, match="truncated or damaged"):
        convert_base(directory, out)
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no safetensors files"):
        convert_base(directory, out)
    assert not out.exists()
