"""GPTQ checkpoints, as GPTQModel, AutoGPTQ, transformers and vLLM read them.

    qweight  int32 (in * bits / 32, out)      codes down the columns, lowest bits first
    qzeros   int32 (groups, out * bits / 32)  zero points along the rows
    scales   float16 (groups, out)
    g_idx    int32 (in,)                      the group of every input

Version 1 (`checkpoint_format: gptq`) stores zero_point - 1 and its readers add the 1 back; version 2
(`gptq_v2`) stores the zero point itself. Version 1 cannot store a zero point of 0 (readers differ on the
wrap-around), so such a grid is written as version 2; everything else as version 1, which more runtimes read.
Source: GPTQModel, `gptqmodel/nn_modules/qlinear` and `utils/model.py` (convert_gptq_v1_to_v2_format).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sqft.artifacts import write_json
from sqft.errors import ExportError
from sqft.formats.grouped import GroupedLayout, to_tensor, unpack_words
from sqft.formats.weights import ExportSource, IntegerWeight, exact_in
from sqft.models.beside import copy_kept_files
from sqft.ops import QuantizedWeight

__all__ = ["GptqLayout", "gptq_refusal", "read_gptq", "write_gptq"]

WORD = 32


def gptq_refusal(source: ExportSource) -> str | None:
    """Why a model cannot be held exactly; None if it can."""
    if not source.quantized_names:
        return "weights that are not on an integer grid"
    for name in source.quantized_names:
        weight = source.quantized(name)
        rows, columns = weight.codes.shape
        bits = weight.qparams.bits
        if (rows * bits) % WORD or (columns * bits) % WORD:
            return (
                f"{name} of shape {rows} x {columns}: its {bits}-bit rows and columns do not fill int32 words"
            )
        if not exact_in(weight.qparams.scale, torch.float16):
            return f"scales of {name} that are not exact in float16"
    return None


def write_gptq(source: ExportSource, directory: Path) -> dict[str, str]:
    """Write the checkpoint and return the type of every tensor."""
    version = _version(source)
    tensors: dict[str, torch.Tensor] = {}
    for name in source.plain_names:
        tensors[name] = source.checkpoint.tensor(name).contiguous()
    for name in source.quantized_names:
        tensors |= {
            f"{name}.{part}": value for part, value in _packed(source.quantized(name), version).items()
        }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = source.config
    config["quantization_config"] = quantization = _quantization(source, version)
    write_json(directory / "config.json", config)
    write_json(directory / "quantize_config.json", quantization)
    copy_kept_files(source.directory, directory)
    return {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}


def read_gptq(source: ExportSource, directory: Path) -> Iterator[tuple[str, IntegerWeight | torch.Tensor]]:
    """The weights of a GPTQ checkpoint by tensor name, whichever version it states.

    Raises: ExportError if a tensor is missing or g_idx is not that of plain groups.
    """
    config = json.loads((directory / "quantize_config.json").read_text(encoding="utf-8"))
    bits, offset = int(config["bits"]), 1 if config["checkpoint_format"] == "gptq" else 0
    with safe_open(directory / "model.safetensors", framework="np") as file:
        stored = set(file.keys())
        for name in source.quantized_names:
            missing = [p for p in ("qweight", "qzeros", "scales", "g_idx") if f"{name}.{p}" not in stored]
            if missing:
                raise ExportError(f"{directory} lacks {name}.{missing[0]}")
            parts = {p: file.get_tensor(f"{name}.{p}") for p in ("qweight", "qzeros", "scales", "g_idx")}
            scale = parts["scales"].astype(np.float32).T
            groups = scale.shape[1]
            codes = unpack_words(parts["qweight"].T, bits).astype(np.int16)
            zero_point = unpack_words(parts["qzeros"], bits).T.astype(np.int16) + offset
            columns = codes.shape[1]
            if not np.array_equal(parts["g_idx"], np.arange(columns) // (columns // groups)):
                raise ExportError(f"{directory}: the groups of {name} are out of order")
            steps = codes - zero_point.repeat(columns // groups, axis=1)
            yield (
                f"{name}.weight",
                IntegerWeight(steps.astype(np.int16, copy=False), np.ascontiguousarray(scale)),
            )
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        for name in source.plain_names:
            if name not in stored:
                raise ExportError(f"{directory} lacks {name}")
            yield name, file.get_tensor(name)


def _version(source: ExportSource) -> int:
    lowest = min(int(source.quantized(name).qparams.zero_point.min()) for name in source.quantized_names)
    return 1 if lowest >= 1 else 2


def _packed(weight: QuantizedWeight, version: int) -> dict[str, torch.Tensor]:
    qparams = weight.qparams
    columns, groups = weight.codes.shape[1], qparams.scale.shape[1]
    zero_point = qparams.zero_point.numpy() - np.uint8(1 if version == 1 else 0)
    return {
        "qweight": torch.from_numpy(_pack(weight.codes.numpy(), qparams.bits).T.copy()),
        "qzeros": torch.from_numpy(_pack(zero_point.T, qparams.bits)),
        "scales": qparams.scale.T.half().contiguous(),
        "g_idx": (torch.arange(columns) // (columns // groups)).int(),
    }


def _pack(values: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """(rows, n) integers → (rows, n * bits / 32) int32, a stream of bits, lowest first."""
    stream = (values[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    packed = np.packbits(stream.reshape(len(values), -1), axis=1, bitorder="little")
    return np.ascontiguousarray(packed).view(np.int32)


def _quantization(source: ExportSource, version: int) -> dict[str, Any]:
    qparams = source.quantized(source.quantized_names[0]).qparams
    columns = source.quantized(source.quantized_names[0]).codes.shape[1]
    grid = source.checkpoint.grid
    one_group = grid is not None and grid.group_size == -1 and not source.replaced
    inside = [n for n in source.checkpoint.linears if n.startswith(source.checkpoint.block_names)]
    plain = sorted(set(inside) - set(source.quantized_names))
    return {
        "quant_method": "gptq",
        "bits": qparams.bits,
        "group_size": -1 if one_group else qparams.group_size(columns),
        "sym": qparams.symmetric,
        "desc_act": False,
        "static_groups": True,
        "true_sequential": True,
        "lm_head": False,
        "pack_dtype": "int32",
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "dynamic": {f"-:^{name.replace('.', chr(92) + '.')}$": {} for name in plain},
    }


class GptqLayout(GroupedLayout):
    """GPTQ: codes down the columns, and an index of the group of each column; see `sqft.formats.gptq`."""

    parts = ("qweight", "qzeros", "scales", "g_idx")

    def codes(self, name: str) -> UInt8[Tensor, "out in"]:
        """The codes of a linear."""
        return to_tensor(unpack_words(self.files.tensor(f"{name}.qweight").numpy().T, self.bits))

    def zero_point(self, name: str) -> UInt8[Tensor, "out groups"]:
        """The stored zero points, plus 1 in version 1."""
        offset = 0 if self.quantization.get("checkpoint_format") == "gptq_v2" else 1
        stored = unpack_words(self.files.tensor(f"{name}.qzeros").numpy(), self.bits)
        return to_tensor((stored.T + np.uint8(offset)) & np.uint8((1 << self.bits) - 1))

    def group_index(self, name: str) -> Int[Tensor, "in"]:
        """The group of every column, as it is stored."""
        return self.files.tensor(f"{name}.g_idx").long()
