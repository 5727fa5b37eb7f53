"""NF4, the 4-bit type of QLoRA: blocks of a flattened weight, each a largest value times one of 16 numbers.

    weight = NF4[code] * absmax of its block, rounded to the 16 bits that the layers multiply in

With double quantization the largest values are themselves 8-bit codes: absmax = map[code] * scale + offset.
Source: arXiv 2305.14314 (QLoRA), section 3 and appendix E. Tested against recorded outputs of bitsandbytes.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from sqft.errors import ModelError
from sqft.models.files import ForeignFiles

__all__ = ["BLOCK", "NF4", "Nf4Layout", "expand_nf4", "round_to_nf4", "unpack_nf4"]

BLOCK = 64
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def round_to_nf4(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """The weight as a layer that was quantized to NF4 on loading multiplies with it, in the weight's dtype.

    Blocks of 64 run along the rows and over their ends; the largest values stay float32.
    """
    values = weight.float().flatten()
    blocks = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    table = torch.tensor(NF4)
    inverse = torch.where(absmax > 0, 1 / absmax, torch.zeros_like(absmax))
    codes = torch.bucketize(blocks * inverse[:, None], (table[1:] + table[:-1]) / 2)
    return expand_nf4(codes.flatten()[: len(values)], absmax).view(weight.shape).to(weight.dtype)


def unpack_nf4(packed: UInt8[Tensor, "..."]) -> UInt8[Tensor, "codes"]:
    """Two codes a byte, the first in the high half."""
    stored = packed.flatten()
    return torch.stack([stored >> 4, stored & 15], dim=1).flatten()


def expand_nf4(
    codes: Tensor,
    absmax: Float[Tensor, "blocks"],
    table: Float[Tensor, "entries"] | None = None,
    block: int = BLOCK,
) -> Float[Tensor, "codes"]:
    """table[code] times the largest value of the code's block, float32."""
    values = torch.tensor(NF4) if table is None else table
    return values[codes.long()] * absmax.repeat_interleave(block)[: len(codes)]


class Nf4Layout:
    """bitsandbytes' NF4, with or without double quantization: two codes a byte over the flattened weight."""

    END = ".weight.quant_state.bitsandbytes__nf4"

    def __init__(self, files: ForeignFiles, quantization: Mapping[str, Any]) -> None:
        self.files = files
        self.names = [name.removesuffix(self.END) for name in files.names if name.endswith(self.END)]
        if not self.names or any("bitsandbytes__fp4" in name for name in files.names):
            raise ModelError(
                f"{files.directory} is quantized by bitsandbytes, but not to NF4, and only that can be read"
            )

    def stored(self, name: str) -> set[str]:
        """The tensors that a linear's weight is stored in."""
        start = f"{name}.weight."
        return {f"{name}.weight", *(stored for stored in self.files.names if stored.startswith(start))}

    def dense(self, name: str, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The weight that the layer multiplies with."""
        state, weight = self._state(name), f"{name}.weight"
        codes = unpack_nf4(self.files.tensor(weight))
        table = self.files.tensor(f"{weight}.quant_map")
        absmax = self.files.tensor(f"{weight}.absmax")
        if "nested_blocksize" in state:
            nested = self.files.tensor(f"{weight}.nested_quant_map")
            scale = self.files.tensor(f"{weight}.nested_absmax")
            absmax = expand_nf4(absmax, scale, nested, state["nested_blocksize"]) + state["nested_offset"]
        rows, columns = state["shape"]
        values = expand_nf4(codes[: rows * columns], absmax.float(), table, state["blocksize"])
        return values.view(rows, columns).to(dtype)

    def dense_dtype(self, name: str, default: torch.dtype) -> torch.dtype:
        """The dtype in which the layer multiplies: the one that the weight had."""
        dtype: torch.dtype = getattr(torch, self._state(name)["dtype"])
        return dtype

    def _state(self, name: str) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(bytes(self.files.tensor(name + self.END).tolist()))
        return state
