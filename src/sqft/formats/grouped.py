"""What GPTQ and AWQ have in common: integer codes in int32 words, whose columns share scales in groups."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from sqft.models.files import ForeignFiles

__all__ = ["GroupedLayout", "to_tensor", "unpack_words"]


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


def unpack_words(words: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """(rows, n * bits / 32) int32 → (rows, n) integers: a stream of bits along a row, lowest first."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    return np.packbits(stream.reshape(len(words), -1, bits), axis=-1, bitorder="little")[..., 0]


def to_tensor(values: NDArray[np.uint8]) -> Tensor:
    """The values as a tensor."""
    return torch.from_numpy(np.ascontiguousarray(values))
