"""The zeros that a model already has when it arrives."""

from collections.abc import Iterator, Mapping

from jaxtyping import Bool
from torch import Tensor

from sqft.models.checkpoint import Checkpoint
from sqft.ops.mask import existing_mask

__all__ = ["ExistingMasks"]


class ExistingMasks(Mapping[str, Tensor]):
    """Masks (True = kept) of the linears in the blocks that are sparse as they came, by full name.

    Every weight is read once to find them (`ops.mask.existing_mask`), and again when its mask is asked for.
    Quantized linears have none: a code of 0 may be a weight that was rounded to it.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        quantized = set(checkpoint.quantized_names)
        inside = tuple(f"{block}." for block in checkpoint.block_names)
        self._names = [
            name
            for name in checkpoint.linears
            if name.startswith(inside)
            and name not in quantized
            and existing_mask(checkpoint.weight(name)) is not None
        ]

    def __getitem__(self, name: str) -> Bool[Tensor, "out in"]:
        if name not in self._names:
            raise KeyError(name)
        return self._checkpoint.weight(name) != 0

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
