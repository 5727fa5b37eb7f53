"""Leaves the output layer out of a model's forward pass, so that the loss can be computed in chunks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sqft.models.shapes import AFTER_HEAD
from sqft.ops.cross_entropy import chunk_elements

__all__ = ["chunked_head", "separable_head", "without_head"]


def chunked_head(model: nn.Module, num_tokens: int) -> nn.Linear | None:
    """The output layer, if the logits of so many tokens are too many to hold, and it can be left out."""
    head = separable_head(model)
    device = next(model.parameters()).device.type
    too_many = head is not None and num_tokens * head.out_features > chunk_elements(device)
    return head if too_many else None


def separable_head(model: nn.Module) -> nn.Linear | None:
    """The output layer if the logits are exactly its output and it is unsharded and frozen; else None."""
    unwrap: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
    base = model if unwrap is None else unwrap()
    find_head: Callable[[], nn.Module] | None = getattr(base, "get_output_embeddings", None)
    head = None if find_head is None else find_head()
    if not isinstance(head, nn.Linear) or isinstance(head.weight, DTensor) or head.weight.requires_grad:
        return None
    config = getattr(base, "config", None)
    return None if any(getattr(config, name, None) for name in AFTER_HEAD) else head


@contextmanager
def without_head(head: nn.Linear) -> Iterator[None]:
    """In this context the output layer returns its input: a model's logits are then its hidden states."""

    def pass_on(hidden: Tensor) -> Tensor:
        return hidden

    head.forward = pass_on  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward
