"""One forward pass over padded sequences, with logits at the positions that are asked for alone."""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

__all__ = ["logits_at"]


def logits_at(
    model: nn.Module,
    input_ids: Int[Tensor, "batch length"],
    attention_mask: Int[Tensor, "batch length"],
    positions: Iterable[int],
) -> tuple[Float[Tensor, "batch kept vocab"], dict[int, int]]:
    """Logits of every sequence at these positions, and where in `kept` each position stands; differentiable.

    The sequences are padded on the right. At a position behind a sequence's end the logits mean nothing.
    """
    device = next(model.parameters()).device
    kept = sorted(set(positions))
    logits: Tensor = model(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        logits_to_keep=torch.tensor(kept, device=device),
        use_cache=False,
    ).logits
    return logits, {position: index for index, position in enumerate(kept)}
