"""Whether an adapter belongs on a model."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sqft.adapters.lora_files import ForeignAdapter
from sqft.errors import AdapterError
from sqft.models import Checkpoint

__all__ = ["check_fit", "check_shapes"]


def check_shapes(shapes: Mapping[str, tuple[int, int]], adapter: ForeignAdapter) -> None:
    """`check_fit` as far as the shapes (out, in) of a model's linears tell, before its weights are there.

    Raises: AdapterError.
    """
    for name in adapter.names:
        _check_name(name, shapes)
        adapter.check_shape(name, shapes[name])


def check_fit(checkpoint: Checkpoint, adapter: ForeignAdapter) -> None:
    """Raises: AdapterError if an adapter changes what a model does not have, or cannot have on its own."""
    for name in adapter.names:
        _check_name(name, checkpoint.linears)
        key = f"{name}.weight"
        if name not in checkpoint.quantized_names and (
            key in checkpoint.tied_weights or key not in checkpoint.names
        ):
            raise AdapterError(
                f"the adapter is for {name}, which the base ties to its embedding; one weight cannot serve "
                "both: train without it, or merge onto a copy with tie_word_embeddings false and its own head"
            )
    for name, stored in adapter.copies():
        if name not in checkpoint.names or not _same(checkpoint.tensor(name), stored):
            raise AdapterError(
                f"the adapter has a {name} of its own, which differs from the base's; save it with "
                "save_embedding_layers=False if it was not trained"
            )


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, or become so when one is rounded to the dtype of the other."""
    if one.shape != other.shape:
        return False
    return torch.equal(one.to(other.dtype), other) or torch.equal(other.to(one.dtype), one)


def _check_name(name: str, shapes: Mapping[str, tuple[int, int]]) -> None:
    if name not in shapes:
        raise AdapterError(f"the adapter is for {name}, which the base does not have")
