"""The best step of a training, by the loss on items that are not trained on, and when to wait no longer.

Which step is best, and whether to stop, are functions of the record of steps alone, so that a training that
was killed and goes on decides as one that was not.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sqft.errors import TrainingError
from sqft.training.record import StepRecord

__all__ = ["BestState", "best_step", "is_exhausted"]

FILE = "sqft_best.safetensors"


def best_step(steps: Sequence[StepRecord]) -> StepRecord | None:
    """The first of the measured steps with the lowest loss; None if nothing was measured."""
    measured = [step for step in steps if step.eval_loss is not None]
    return min(measured, key=lambda step: step.eval_loss or 0.0, default=None)


def is_exhausted(steps: Sequence[StepRecord], patience: int | None) -> bool:
    """Whether the last `patience` measurements found nothing better; never where patience is None."""
    best = best_step(steps)
    if best is None or patience is None:
        return False
    return sum(step.eval_loss is not None and step.step > best.step for step in steps) >= patience


class BestState:
    """What is trained, as it was after the best step: a copy on the CPU, which goes into every checkpoint."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors: dict[str, Tensor] = {}

    def keep(self) -> None:
        """Remember the trained parameters as they are now."""
        self.tensors = {name: p.detach().to("cpu", copy=True) for name, p in self._parameters().items()}

    def restore(self) -> None:
        """Put the remembered parameters back into the model, if there are any."""
        parameters = self._parameters()
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                parameters[name].copy_(tensor)

    def save(self, checkpoint: Path) -> None:
        """Write them beside a checkpoint, if there are any."""
        if self.tensors:
            save_file(self.tensors, checkpoint / FILE)

    def load(self, checkpoint: Path) -> None:
        """Remember what a checkpoint has of them.

        Raises: TrainingError if they are not parameters of this training.
        """
        path = checkpoint / FILE
        found = load_file(path) if path.is_file() else {}
        shapes = {name: p.shape for name, p in self._parameters().items()}
        if found and {name: tensor.shape for name, tensor in found.items()} != shapes:
            raise TrainingError(f"{path} holds other parameters than this training has; start it anew")
        self.tensors = found

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}
