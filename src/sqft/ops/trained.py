"""Tensors that are trained in the place of the base's own: group scales, and the weights of norms.

    scale  = round_significant(base_scale * (1 + change), scale_bits)
    weight = round_storage(base_weight + change)                      of a norm

They are rounded in every forward pass to what is stored, so that the merged file holds the very numbers that
were trained; gradients pass straight through the rounding. A change of 0 is the base, bit for bit.

Source: LSQ, arXiv 1902.08153 (trained step sizes); PEQA, arXiv 2305.14152 (of frozen codes).
Differs from the papers: the scale is trained as a ratio to the base's, so that one learning rate suits all of
them, and LSQ's factor 1/sqrt(n) on its gradient is left out, since Adam does not see it.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sqft.ops.adapted import round_storage
from sqft.ops.grid import SMALLEST_SCALE, round_significant

__all__ = ["significant_bits", "trained_norm", "trained_scale"]


def trained_scale(
    base: Float[Tensor, "out groups"], change: Float[Tensor, "out groups"], scale_bits: int
) -> Float[Tensor, "out groups"]:
    """The scale that is served, float32 of `scale_bits` significant bits; differentiable in the change.

    It stays at or above the smallest normal float16, or the base's own scale where that lies below. A change
    of -1 or less has no meaning, as the scale would not be positive: callers refuse it.
    """
    out: Tensor = _TrainedScale.apply(base, change, scale_bits)
    return out


def trained_norm(
    base: Float[Tensor, " features"], change: Float[Tensor, " features"], dtype: torch.dtype
) -> Float[Tensor, " features"]:
    """The weight of a norm that is served, rounded to its stored dtype, in float32; differentiable."""
    return round_storage(base.float() + change, dtype)


def significant_bits(values: Float[Tensor, "*any"]) -> int:
    """The fewest significant bits that hold every one of the values: 1 to 24, as they are float32."""
    exact = values.float()
    return next((bits for bits in range(1, 24) if torch.equal(round_significant(exact, bits), exact)), 24)


class _TrainedScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, change: Tensor, scale_bits: int) -> Tensor:
        ctx.save_for_backward(base)
        rounded = round_significant(base * (1 + change), scale_bits)
        rounded = torch.maximum(rounded, base.clamp_max(SMALLEST_SCALE))
        return torch.where(change == 0, base, rounded)  # scales of others may have more bits

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (base,) = ctx.saved_tensors
        return None, grad * base, None
