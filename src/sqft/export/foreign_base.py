"""Quantized bases made elsewhere (GPTQ, AWQ), converted once to the layout that sqft opens."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sqft.artifacts import new_directory, write_json
from sqft.errors import ModelError
from sqft.models import GridSpec, QuantizedWeight
from sqft.models.packing import pack_weight, quantization_config
from sqft.models.writer import KEPT_FILES
from sqft.ops import QParams

__all__ = ["convert_base"]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ's interleaving of eight 4-bit values in a word
Read = Callable[[str], Tensor]


def convert_base(directory: Path, output_dir: Path) -> Path:
    """A directory that sqft opens: this one, or a copy of a GPTQ or AWQ model as compressed-tensors.

    The integers and scales are taken over as they are.

    Raises: ModelError if the quantization is not understood.
    """
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{directory} is not a model directory: config.json cannot be read ({error})"
        ) from None
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    if method in {None, "compressed-tensors"}:
        return directory
    if method not in {"gptq", "awq"}:
        raise ModelError(f"{directory} is quantized by {method}; merge onto GPTQ, AWQ or compressed-tensors")
    with new_directory(output_dir) as partial:
        _convert(directory, partial, config, quantization)
    return output_dir


def _convert(directory: Path, partial: Path, config: dict[str, Any], quantization: dict[str, Any]) -> None:
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{directory} has no safetensors files; only these are read")
    handles = {path: safe_open(path, framework="pt") for path in files}
    place = {name: path for path, handle in handles.items() for name in handle.keys()}  # noqa: SIM118

    def read(name: str) -> Tensor:
        if name not in place:
            raise ModelError(f"{directory} lacks the tensor {name}")
        tensor: Tensor = handles[place[name]].get_tensor(name)
        return tensor

    names = sorted(name.removesuffix(".qweight") for name in place if name.endswith(".qweight"))
    unpack = _from_gptq if quantization["quant_method"] == "gptq" else _from_awq
    weights = {name: unpack(name, read, quantization) for name in names}
    if not weights:
        raise ModelError(f"{directory} states a quantization but holds no quantized weights")
    grid = next((g for g in map(GridSpec.of, weights.values()) if g.scale_dtype == torch.float16), None)
    grid = grid or GridSpec.of(next(iter(weights.values())))
    parts = ("qweight", "qzeros", "scales", "g_idx")
    tensors = {
        name: read(name).contiguous()
        for name in place
        if not (name.rpartition(".")[0] in weights and name.rpartition(".")[2] in parts)
    }
    for name, weight in weights.items():
        tensors |= pack_weight(name, weight, grid.scale_dtype)
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    plain = {n.removesuffix(".weight") for n in tensors if n.endswith("proj.weight")} | {"lm_head"}
    config["quantization_config"] = quantization_config(grid, sorted(plain - set(weights)))
    write_json(partial / "config.json", config)
    for file in KEPT_FILES:
        if (directory / file).is_file():
            (partial / file).write_bytes((directory / file).read_bytes())


def _from_gptq(name: str, read: Read, quantization: dict[str, Any]) -> QuantizedWeight:
    bits = int(quantization["bits"])
    offset = 0 if quantization.get("checkpoint_format") == "gptq_v2" else 1
    codes = _unpack(read(f"{name}.qweight").numpy().T, bits)
    scale = read(f"{name}.scales").float().T.contiguous()
    zero_point = (_unpack(read(f"{name}.qzeros").numpy(), bits).T + offset) & ((1 << bits) - 1)
    columns, groups = codes.shape[1], scale.shape[1]
    expected = torch.arange(columns) // (columns // groups)
    if not torch.equal(read(f"{name}.g_idx").long(), expected):
        raise ModelError(
            f"{name} has its groups in activation order, which no merge can keep; quantize without it"
        )
    return _weight(codes, scale, zero_point, bits)


def _from_awq(name: str, read: Read, quantization: dict[str, Any]) -> QuantizedWeight:
    bits = int(quantization.get("bits", 4))
    if bits != 4:
        raise ModelError(f"{name}: AWQ with {bits} bits is not understood, only 4")

    def unpack(part: str) -> NDArray[np.int32]:
        words = _unpack(read(f"{name}.{part}").numpy(), bits)
        return words.reshape(len(words), -1, 8)[..., np.argsort(AWQ_ORDER)].reshape(len(words), -1)

    scale = read(f"{name}.scales").float().T.contiguous()
    return _weight(unpack("qweight").T, scale, unpack("qzeros").T, bits)


def _weight(codes: Any, scale: Tensor, zero_point: Any, bits: int) -> QuantizedWeight:
    zeros = torch.from_numpy(np.ascontiguousarray(zero_point)).to(torch.uint8)
    symmetric = bool((zeros == 1 << (bits - 1)).all())
    stored = torch.from_numpy(np.ascontiguousarray(codes)).to(torch.uint8)
    return QuantizedWeight(stored, QParams(scale, zeros, bits, symmetric))


def _unpack(words: NDArray[np.int32], bits: int) -> NDArray[np.int32]:
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    values = stream.reshape(len(words), -1, bits).astype(np.int32)
    return (values << np.arange(bits)).sum(-1, dtype=np.int32)
