"""What linears of a block read during a calibration: a statistic of it, and a sample."""

from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["InputGroup", "Statistic"]


class Statistic(Protocol):
    """A running statistic of the inputs of a linear."""

    num_tokens: int

    def update(self, inputs: Tensor, dense_inputs: Tensor | None = None) -> None:
        """Take in (tokens, in), and what the uncompressed model has there, where that is kept."""

    def reduce(self) -> None:
        """Take in what other processes have seen."""

    def check(self, name: str) -> None:
        """Raises: CompressionError if the inputs were not finite."""

    @property
    def num_dead(self) -> int:
        """Inputs that were 0 in every token."""


class InputGroup:
    """Linears of one block that read the same tensor: their names, statistic, and a sample of inputs."""

    def __init__(self, names: list[str], statistic: Any, columns: int, device: torch.device) -> None:
        self.names = names
        self.statistic = statistic
        self.sample = torch.zeros(0, columns, device=device)

    def error(self, dense: Tensor, compressed: Tensor) -> float | None:
        """Relative squared error of a layer's output on the sample, against the dense layer's."""
        if not len(self.sample):
            return None
        expected = self.sample @ dense.float().T
        difference = self.sample @ (dense - compressed).float().T
        return float(difference.square().sum() / expected.square().sum().clamp_min(1e-30))
