"""What is exported: a model directory whose linears are integer grids or plain weights."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from sqft.models import Checkpoint, load_tokenizer, open_checkpoint
from sqft.ops import QuantizedWeight

__all__ = ["ExportSource", "IntegerWeight", "open_source"]


@dataclass(frozen=True)
class IntegerWeight:
    """A quantized weight in the form that all formats share: weight = steps * scale.

    steps (out, in) int16 = codes - zero_point; scale (out, groups) float32.
    """

    steps: NDArray[np.int16]
    scale: NDArray[np.float32]

    @classmethod
    def of(cls, weight: QuantizedWeight) -> "IntegerWeight":
        """The steps and scales of codes on a grid."""
        columns = weight.codes.shape[1] // weight.qparams.scale.shape[1]
        zero_point = weight.qparams.zero_point.numpy().astype(np.int16).repeat(columns, axis=1)
        steps = weight.codes.numpy().astype(np.int16) - zero_point
        return cls(steps, weight.qparams.scale.numpy())

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return int(self.steps.shape[1] // self.scale.shape[1])

    def changed(self, other: "IntegerWeight") -> int:
        """Weights whose step or scale differs, whatever the group sizes."""
        if self.steps.shape != other.steps.shape:
            return int(self.steps.size)
        scales = [w.scale.repeat(w.group_size, axis=1) for w in (self, other)]
        return int(((self.steps != other.steps) | (scales[0] != scales[1])).sum())


@dataclass(frozen=True)
class ExportSource:
    """An opened model directory, with some quantized weights replaced where a format needs another grid.

    A linear goes by its module's full name, as in `Checkpoint`; a tensor by the name under which a model that
    is not quantized stores it, which of a linear is LINEAR.weight.
    """

    checkpoint: Checkpoint
    replaced: Mapping[str, QuantizedWeight] = field(default_factory=dict)

    @property
    def directory(self) -> Path:
        """The model directory."""
        return self.checkpoint.directory

    @property
    def config(self) -> dict[str, Any]:
        """config.json as it stands, without a quantization, and without where it lies on this machine."""
        values: dict[str, Any] = self.checkpoint.config.to_dict()
        values.pop("quantization_config", None)
        values.pop("_name_or_path", None)
        return values

    @property
    def architecture(self) -> str:
        """The model type, for instance llama."""
        return str(self.checkpoint.config.model_type)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the model."""
        return load_tokenizer(self.directory)

    @property
    def quantized_names(self) -> tuple[str, ...]:
        """The linears that hold codes."""
        return self.checkpoint.quantized_names

    @property
    def plain_names(self) -> list[str]:
        """Stored tensors that are not part of a quantized linear, biases included."""
        quantized = set(self.quantized_names)
        return [
            name
            for name in self.checkpoint.names
            if name.rpartition(".")[0] not in quantized or name.endswith(".bias")
        ]

    def quantized(self, name: str) -> QuantizedWeight:
        """The codes and grid of one linear."""
        return self.replaced.get(name) or self.checkpoint.quantized(name)

    def integers(self) -> Iterator[tuple[str, IntegerWeight]]:
        """The tensors of the quantized linears, one at a time."""
        for name in self.quantized_names:
            yield f"{name}.weight", IntegerWeight.of(self.quantized(name))

    def tensor(self, name: str) -> Float[Tensor, "..."]:
        """A stored tensor, or the float32 weight of a quantized linear."""
        linear = name.removesuffix(".weight")
        if linear in self.quantized_names:
            return self.quantized(linear).dequantize()
        return self.checkpoint.tensor(name)

    def tensor_names(self) -> list[str]:
        """Tensors of the model were it not quantized."""
        return sorted([*self.plain_names, *(f"{name}.weight" for name in self.quantized_names)])


def open_source(directory: Path) -> ExportSource:
    """Open a model directory for export.

    Raises: ModelError if it is not a whole model.
    """
    return ExportSource(open_checkpoint(directory))


def exact_in(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor keeps every value in another dtype."""
    return bool(torch.equal(tensor.to(dtype).float(), tensor.float()))
