"""How much of an adapter's update a base's grid or mask would erase, layer by layer."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sqft.adapters.lora_files import ForeignAdapter
from sqft.errors import AdapterError
from sqft.models import Checkpoint
from sqft.ops import QuantizedWeight, dequantize, quantize

__all__ = ["LayerErasure", "VisibleMasks", "adapted_layers", "layer_erasure", "round_update"]

SPARSE_FROM = 0.01  # share of exact zeros from which a base without stored masks counts as sparse
Weight = Tensor | QuantizedWeight


@dataclass(frozen=True)
class LayerErasure:
    """What plain rounding does to one update.

    erased: 1 - <kept update, update> / <update, update>; 1 is all of it, and rounding noise can push it
    below 0. masked: share of the update's energy that falls on pruned weights. changed: share of the
    weights that change at all. update_in_steps: root mean square of the update, in steps of the grid.
    """

    name: str
    erased: float
    masked: float
    changed: float
    update_in_steps: float | None


def adapted_layers(
    checkpoint: Checkpoint,
    adapter: ForeignAdapter,
    masks: Mapping[str, Tensor],
    names: Iterable[str] | None = None,
) -> Iterator[tuple[str, Weight, Float[Tensor, "out in"], Bool[Tensor, "out in"] | None]]:
    """One layer at a time: name, base, the unmerged model's float32 weight, and mask (True = kept).

    names: of the adapted layers, default all.

    Raises: AdapterError if a weight would not be finite in the base's dtype.
    """
    quantized = set(checkpoint.quantized_names)
    for name in adapter.names if names is None else names:
        base: Weight = checkpoint.quantized(name) if name in quantized else checkpoint.weight(name)
        plain = base.dequantize() if isinstance(base, QuantizedWeight) else base.float()
        adapted = adapter.adapted(name, plain)
        stored = adapted if isinstance(base, QuantizedWeight) else adapted.to(base.dtype)
        if not bool(stored.isfinite().all()):
            raise AdapterError(
                f"{adapter.directory} cannot be merged: {name} would not be finite; its update is too large"
            )
        yield name, base, adapted, masks.get(name)


def round_update(base: Weight, adapted: Tensor, mask: Tensor | None) -> Weight:
    """Keep grid and mask, and round: codes of the adapted weight, or the weight in the base's dtype."""
    if mask is not None:
        adapted = torch.where(mask, adapted, torch.zeros_like(adapted))
    if isinstance(base, QuantizedWeight):
        return QuantizedWeight(quantize(adapted, base.qparams), base.qparams)
    return adapted.to(base.dtype)


def layer_erasure(name: str, base: Weight, adapted: Tensor, mask: Tensor | None) -> LayerErasure:
    """Compare the update with what plain rounding keeps of it."""
    rounded = round_update(base, adapted, mask)
    steps = None
    if isinstance(base, QuantizedWeight) and isinstance(rounded, QuantizedWeight):
        before, after = base.dequantize(), dequantize(rounded.codes, rounded.qparams)
        groups = (base.qparams.scale.shape[1], -1)
        in_steps = (adapted - before).unflatten(1, groups) / base.qparams.scale[..., None]
        steps = float(in_steps.square().mean().sqrt())
    else:
        assert isinstance(base, Tensor)
        assert isinstance(rounded, Tensor)
        before, after = base.float(), rounded.float()
    update, kept = (adapted - before).double(), (after - before).double()  # squares of float32 overflow
    energy = float(update.square().sum())
    if energy == 0:
        return LayerErasure(name, 0.0, 0.0, 0.0, steps)
    masked = 0.0 if mask is None else float(update[~mask].square().sum()) / energy
    erased = 1 - float((kept * update).sum()) / energy
    return LayerErasure(name, erased, masked, float((kept != 0).float().mean()), steps)


class VisibleMasks(Mapping[str, Tensor]):
    """The zeros of a sparse 16-bit base whose masks were not stored; codes may be 0 by rounding only."""

    def __init__(self, checkpoint: Checkpoint, names: list[str]) -> None:
        self.checkpoint = checkpoint
        plain = [name for name in names if name not in checkpoint.quantized_names]
        zeros = {name: float((checkpoint.weight(name) == 0).float().mean()) for name in plain}
        self.names = [name for name in plain if zeros[name] > SPARSE_FROM]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.checkpoint.weight(name) != 0

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
