"""How GPTQ, AWQ and bitsandbytes lay out a quantized linear, one class each."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from sqft.errors import ModelError
from sqft.models.files import ForeignFiles
from sqft.formats.gptq import unpack_words
from sqft.formats.nf4 import expand_nf4, unpack_nf4

__all__ = ["LAYOUTS", "AwqLayout", "GptqLayout", "GroupedLayout", "Layout", "Nf4Layout"]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ's interleaving of eight 4-bit values in a word


class GroupedLayout(ABC):
    """Integer codes whose columns share scales in groups: what GPTQ and AWQ have in common."""

    parts: tuple[str, ...] = ("qweight", "qzeros", "scales")

    def __init__(self, files: ForeignFiles, quantization: Mapping[str, Any]) -> None:
        self.files, self.quantization = files, quantization
        self.bits = int(quantization.get("bits", 4))
        self.names = [name.removesuffix(".qweight") for name in files.names if name.endswith(".qweight")]

    def stored(self, name: str) -> set[str]:
        """The tensors that a linear's weight is stored in."""
        return {f"{name}.{part}" for part in self.parts}

    @abstractmethod
    def codes(self, name: str) -> UInt8[Tensor, "out in"]:
        """The codes of a linear."""

    @abstractmethod
    def zero_point(self, name: str) -> UInt8[Tensor, "out groups"]:
        """The integer zero points of a linear."""

    def scale(self, name: str) -> Float[Tensor, "out groups"]:
        """The scales of a linear, float32."""
        return self.files.tensor(f"{name}.scales").float().T.contiguous()

    @abstractmethod
    def group_index(self, name: str) -> Int[Tensor, "in"]:
        """The group of every column."""

    def num_groups(self, name: str) -> int:
        """Groups in a row."""
        return self.files.spec(f"{name}.scales")[1][0]

    def dense(self, name: str, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """(code - zero point) * scale, rounded to dtype."""
        index = self.group_index(name)
        steps = self.codes(name).float() - self.zero_point(name).float()[:, index]
        return (steps * self.scale(name)[:, index]).to(dtype)

    def dense_dtype(self, name: str, default: torch.dtype) -> torch.dtype:
        """The dtype in which the layer multiplies."""
        return default


class GptqLayout(GroupedLayout):
    """GPTQ: codes down the columns, and an index of the group of each column; see `sqft.formats.gptq`."""

    parts = ("qweight", "qzeros", "scales", "g_idx")

    def codes(self, name: str) -> UInt8[Tensor, "out in"]:
        """The codes of a linear."""
        return _tensor(unpack_words(self.files.tensor(f"{name}.qweight").numpy().T, self.bits))

    def zero_point(self, name: str) -> UInt8[Tensor, "out groups"]:
        """The stored zero points, plus 1 in version 1."""
        offset = 0 if self.quantization.get("checkpoint_format") == "gptq_v2" else 1
        stored = unpack_words(self.files.tensor(f"{name}.qzeros").numpy(), self.bits)
        return _tensor((stored.T + np.uint8(offset)) & np.uint8((1 << self.bits) - 1))

    def group_index(self, name: str) -> Int[Tensor, "in"]:
        """The group of every column, as it is stored."""
        return self.files.tensor(f"{name}.g_idx").long()


class AwqLayout(GroupedLayout):
    """AWQ: codes along the rows of the transposed weight, interleaved."""

    def __init__(self, files: ForeignFiles, quantization: Mapping[str, Any]) -> None:
        super().__init__(files, quantization)
        if self.bits != 4:
            raise ModelError(
                f"{files.directory} is AWQ with {self.bits} bits, which is not understood, only 4"
            )

    def codes(self, name: str) -> UInt8[Tensor, "out in"]:
        """The codes of a linear."""
        return self._unpack(f"{name}.qweight")

    def zero_point(self, name: str) -> UInt8[Tensor, "out groups"]:
        """The integer zero points of a linear."""
        return self._unpack(f"{name}.qzeros")

    def group_index(self, name: str) -> Int[Tensor, "in"]:
        """The group of every column: runs of equal size."""
        columns = self.files.spec(f"{name}.qweight")[1][0]
        return torch.arange(columns) // (columns // self.num_groups(name))

    def _unpack(self, name: str) -> UInt8[Tensor, "out n"]:
        words = unpack_words(self.files.tensor(name).numpy(), self.bits)
        return _tensor(words.reshape(len(words), -1, 8)[..., np.argsort(AWQ_ORDER)].reshape(len(words), -1).T)


class Nf4Layout:
    """bitsandbytes' NF4, with or without double quantization: two codes a byte over the flattened weight."""

    END = ".weight.quant_state.bitsandbytes__nf4"

    def __init__(self, files: ForeignFiles, quantization: Mapping[str, Any]) -> None:
        self.files = files
        self.names = [name.removesuffix(self.END) for name in files.names if name.endswith(self.END)]
        if not self.names or any("bitsandbytes__fp4" in name for name in files.names):
            raise ModelError(
                f"{files.directory} is quantized by bitsandbytes, but not to NF4; only that is read"
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


Layout = GroupedLayout | Nf4Layout
LAYOUTS: dict[str, type[Layout]] = {"gptq": GptqLayout, "awq": AwqLayout, "bitsandbytes": Nf4Layout}


def _tensor(values: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))
