"""Quantized weights as compressed-tensors keeps them on disk (format pack-quantized).

A quantized linear NAME has NAME.weight_packed int32 (codes, little-endian bit stream along a row),
NAME.weight_scale 16 bit (out, groups), NAME.weight_shape int64 (2,), and, where the grid is asymmetric,
NAME.weight_zero_point int32 (zero points packed along the rows). Scales of an asymmetric grid are float32:
transformers 5.23 opens these only with `CompressedTensorsConfig(dequantize=True)`, which multiplies in the
dtype of the scale, and 16 bits do not hold the product.
Source: compressed-tensors 0.20, `compressors/pack_quantized`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)
from torch import Tensor

from sqft.errors import CompressionError, ModelError
from sqft.models.tensorfile import TensorSpec
from sqft.ops import GridSpec, QParams, QuantizedWeight

__all__ = [
    "PACKED_METHOD",
    "PACKED_VERSION",
    "check_packed_version",
    "pack_weight",
    "packed_specs",
    "quantization_config",
    "read_grid",
    "unpack_qparams",
    "unpack_weight",
]


# What config.json calls a model whose weights `sparse_packing` packed, and the version of that format.
PACKED_METHOD, PACKED_VERSION = "sqft_packed", 1


def packed_specs(name: str, shape: tuple[int, int], grid: GridSpec) -> dict[str, TensorSpec]:
    """Names, dtypes and shapes of the tensors that a quantized linear has on disk."""
    rows, columns = shape
    groups = 1 if grid.group_size == -1 else columns // grid.group_size
    specs: dict[str, TensorSpec] = {
        f"{name}.weight_packed": (torch.int32, (rows, math.ceil(columns * grid.bits / 32))),
        f"{name}.weight_scale": (grid.scale_dtype, (rows, groups)),
        f"{name}.weight_shape": (torch.int64, (2,)),
    }
    if not grid.symmetric:
        specs[f"{name}.weight_zero_point"] = (torch.int32, (math.ceil(rows * grid.bits / 32), groups))
    return specs


def pack_weight(name: str, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a quantized linear, with scales in `dtype`.

    Raises: CompressionError if a scale is not exact in it.
    """
    codes, qparams = weight.codes, weight.qparams
    middle = 1 << (qparams.bits - 1)
    scale = qparams.scale.to(dtype)
    if not torch.equal(scale.float(), qparams.scale):
        kind = str(dtype).removeprefix("torch.")
        raise CompressionError(
            f"{name}: a scale is not exact in {kind}; lower scale_bits or check the weights"
        )
    packed = {
        f"{name}.weight_packed": pack_to_int32((codes.int() - middle).to(torch.int8), qparams.bits),
        f"{name}.weight_scale": scale,
        f"{name}.weight_shape": torch.tensor(codes.shape),
    }
    if not qparams.symmetric:
        signed = (qparams.zero_point.int() - middle).to(torch.int8)
        packed[f"{name}.weight_zero_point"] = pack_to_int32(signed, qparams.bits, packed_dim=0).contiguous()
    return packed


def unpack_weight(name: str, tensor: Callable[[str], Tensor], grid: GridSpec) -> QuantizedWeight:
    """Undo `pack_weight`; `tensor` gives a stored tensor by its full name."""
    middle = 1 << (grid.bits - 1)
    rows, columns = (int(n) for n in tensor(f"{name}.weight_shape"))
    signed = unpack_from_int32(tensor(f"{name}.weight_packed"), grid.bits, torch.Size((rows, columns)))
    codes = (signed.int() + middle).to(torch.uint8).contiguous()
    return QuantizedWeight(codes, unpack_qparams(name, tensor, grid))


def unpack_qparams(name: str, tensor: Callable[[str], Tensor], grid: GridSpec) -> QParams:
    """The grid of a quantized linear: its scales, and its zero points where they are stored."""
    middle = 1 << (grid.bits - 1)
    scale = tensor(f"{name}.weight_scale").float()
    if grid.symmetric:
        zero_point = torch.full(scale.shape, middle, dtype=torch.uint8)
    else:
        packed = tensor(f"{name}.weight_zero_point")
        stored = unpack_from_int32(packed, grid.bits, torch.Size(scale.shape), packed_dim=0)
        zero_point = (stored.int() + middle).to(torch.uint8).contiguous()
    return QParams(scale, zero_point, grid.bits, grid.symmetric)


def quantization_config(grid: GridSpec, ignore: list[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json: every Linear but those in `ignore` (full names)."""
    weights = QuantizationArgs(
        num_bits=grid.bits,
        type="int",
        symmetric=grid.symmetric,
        strategy="channel" if grid.group_size == -1 else "group",
        group_size=None if grid.group_size == -1 else grid.group_size,
        observer=None,
    )
    config = QuantizationConfig(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        format="pack-quantized",
        ignore=ignore,
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    return dict(config.model_dump(mode="json"))


def check_packed_version(values: Mapping[str, Any]) -> None:
    """Raises: ModelError if what sqft packed is of a version that is not read here."""
    if values.get("version") != PACKED_VERSION:
        raise ModelError(
            f"the model is packed in version {values.get('version')} of the format, this sqft reads version "
            f"{PACKED_VERSION}; install a newer sqft, or pack the model again"
        )


def read_grid(config: Mapping[str, Any]) -> GridSpec:
    """The grid that a `quantization_config` describes.

    Raises: ModelError for a format other than pack-quantized integers with one scheme, or such packed by
    sqft.
    """
    try:
        groups = list((config.get("config_groups") or {}).values())
        weights = groups[0].get("weights") if len(groups) == 1 else None
        grid = (
            (weights["num_bits"], weights.get("group_size") or -1, weights["symmetric"]) if weights else None
        )
    except (AttributeError, KeyError, TypeError):
        raise ModelError("the quantization_config of the model is damaged; fetch it again") from None
    form = (config.get("quant_method"), config.get("format"))
    if form[0] == PACKED_METHOD:
        check_packed_version(config)
    elif form != ("compressed-tensors", "pack-quantized"):
        weights = None
    if not weights or grid is None:
        raise ModelError(
            f"quantization '{form[0]}' of format '{form[1]}' cannot be read; "
            "only compressed-tensors pack-quantized with one scheme can"
        )
    if [type(value) for value in grid] != [int, int, bool] or not 0 < grid[0] <= 16 or grid[1] < -1:
        raise ModelError(
            f"the quantization_config of the model names no grid: bits, group, symmetric = {grid}"
        )
    return GridSpec(*grid)
