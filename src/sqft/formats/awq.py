"""AWQ checkpoints, as AutoAWQ writes them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from sqft.errors import ModelError
from sqft.formats.grouped import GroupedLayout, to_tensor, unpack_words
from sqft.models.files import ForeignFiles

__all__ = ["AwqLayout"]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ's interleaving of eight 4-bit values in a word


class AwqLayout(GroupedLayout):
    """AWQ: codes along the rows of the transposed weight, interleaved."""

    def __init__(self, files: ForeignFiles, quantization: Mapping[str, Any]) -> None:
        super().__init__(files, quantization)
        if self.bits != 4:
            raise ModelError(f"{files.directory} is AWQ with {self.bits} bits, and only 4 bits can be read")

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
        return to_tensor(
            words.reshape(len(words), -1, 8)[..., np.argsort(AWQ_ORDER)].reshape(len(words), -1).T
        )
