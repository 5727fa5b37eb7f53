"""The output layer left out of a model's forward, so that its loss can be taken in chunks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["separable_head", "without_head"]

# Settings of architectures that change the logits after the output layer.
AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def separable_head(model: nn.Module) -> nn.Linear | None:
    """The output layer if logits are its output and nothing else, and it is whole and frozen; else None."""
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
    """While it lasts the output layer hands its input on, so that a model's logits are its hidden states."""

    def pass_on(hidden: Tensor) -> Tensor:
        return hidden

    head.forward = pass_on  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward
