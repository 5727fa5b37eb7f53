"""The published formulas of SparsePEFT and QA-SparsePEFT written plainly, and the floors of every variant.

Source: SQFT, arXiv 2410.03750, equations 1 to 4: two products for SparsePEFT; straight-through rounding of
the merged weight for the quantization-aware form.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sqft.ops import QParams, decode_latent

__all__ = ["FLOPS", "PublishedLinear", "layer_flops", "published_forward"]


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class PublishedLinear(nn.Module):
    """y = x W^T + x ((B A) s * mask)^T, or x fake_quantize(W + (B A) s * mask)^T if a grid is given."""

    weight: Tensor
    mask: Tensor

    def __init__(
        self,
        weight: Tensor,
        rank: int,
        alpha: float,
        qparams: QParams | None = None,
        latent: Tensor | None = None,
    ) -> None:
        super().__init__()
        if qparams is not None and latent is not None:
            weight = decode_latent(latent, qparams)
        out_features, in_features = weight.shape
        self.register_buffer("weight", weight.detach())
        self.register_buffer("mask", weight.detach() != 0)
        self.lora_A = nn.Parameter(torch.randn(rank, in_features, device=weight.device) * in_features**-0.5)
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=weight.device))
        self.scaling = alpha / rank
        self.grid = qparams

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        return published_forward(x, self.weight, self.mask, self.lora_A, self.lora_B, self.scaling, self.grid)


def published_forward(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    grid: QParams | None,
) -> Tensor:
    """The published output of a layer; grid: round to it, None leaves the weight unrounded."""
    delta = (lora_B @ lora_A) * scaling * mask
    if grid is None:
        return F.linear(x, weight.to(x.dtype)) + F.linear(x, delta.to(x.dtype))
    groups = (weight + delta).unflatten(1, (grid.scale.shape[1], -1))
    scale, zero_point = grid.scale[..., None], grid.zero_point[..., None].float()
    codes = torch.clamp(_Round.apply(groups / scale) + zero_point, 0, grid.max_code)
    return F.linear(x, ((codes - zero_point) * scale).flatten(1).to(x.dtype))


# Multiply-adds of forward and backward, by tokens n, rank r, and the sides o and i; elementwise work is free.
FLOPS = {
    "frozen": lambda n, r, o, i: 4 * n * o * i,
    "peft lora": lambda n, r, o, i: 4 * n * o * i + 6 * n * r * (o + i),
    "published": lambda n, r, o, i: 10 * n * o * i + 6 * r * o * i,
    "exact": lambda n, r, o, i: 6 * n * o * i + 8 * r * o * i,
    "lowrank": lambda n, r, o, i: 4 * n * o * i + 4 * r * o * i + 4 * n * r * (o + i),
    "published qa": lambda n, r, o, i: 6 * n * o * i + 6 * r * o * i,
    "scales": lambda n, r, o, i: 6 * n * o * i,
    "three products": lambda n, r, o, i: 6 * n * o * i,
}


def layer_flops(variant: str, tokens: int, rank: int, out_features: int, in_features: int) -> float:
    """Floating point operations of a layer's forward and backward in a variant."""
    name = variant.removeprefix("qa ") if variant != "published qa" else variant
    if name.startswith("hybrid"):
        parts = [layer_flops(kind, tokens, rank, out_features, in_features) for kind in ("exact", "lowrank")]
        return 0.25 * parts[0] + 0.75 * parts[1]
    return float(FLOPS[name](tokens, rank, out_features, in_features))
