"""Whether a model keeps the items of a packed row apart; some families know no positions but their own."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sqft.data import Example, collate
from sqft.data.batches import collate_packed
from sqft.errors import TrainingError

__all__ = ["check_packing"]

ITEMS = 3
# Largest difference of logits, as a share of the largest: rounding stays far below, mixed items far above.
ALLOWED = {torch.float32: 1e-3}
ALLOWED_BELOW_FLOAT32 = 5e-2


def check_packing(model: nn.Module, examples: Sequence[Example], place: str) -> None:
    """Run the shortest items one by one and in one row. place: the section, for the message.

    Raises: TrainingError if the logits of an item differ.
    """
    items = sorted(examples, key=lambda example: len(example.token_ids))[:ITEMS]
    if len(items) < 2:
        return
    device = next(model.parameters()).device
    together = collate_packed(items, "text", capacity=sum(len(item.token_ids) for item in items))
    order = sorted(range(len(items)), key=lambda i: -len(items[i].token_ids))
    model.eval()  # as it is found; a training begins by setting its own mode
    try:
        packed = _logits(model, {k: together[k] for k in ("input_ids", "position_ids")}, device)
    except TypeError as error:
        message = f"{place}.packing: this model takes no positions ({error}); leave it out"
        raise TrainingError(message) from error
    apart = [
        _logits(model, {"input_ids": collate([items[index]], "text")["input_ids"]}, device) for index in order
    ]
    alone = torch.cat(apart)
    difference = float((packed - alone).abs().max() / alone.abs().max())
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if not difference <= max(ALLOWED.get(dtype, ALLOWED_BELOW_FLOAT32) for dtype in dtypes):
        raise TrainingError(
            f"{place}.packing: this model lets the items of a row see each other (logits change by "
            f"{difference:.0%} of the largest); leave packing out"
        )


@torch.no_grad()
def _logits(model: nn.Module, inputs: dict[str, Tensor], device: torch.device) -> Tensor:
    """Logits (tokens, vocabulary) of one row."""
    given = {name: values.to(device) for name, values in inputs.items()}
    found: Tensor = model(**given, use_cache=False).logits
    return found[0].float()
