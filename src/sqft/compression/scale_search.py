"""Choosing the scale of a group: the one that just covers it, or a smaller one that cuts the ends off."""

import torch
from jaxtyping import Float
from torch import Tensor

from sqft.ops import GridSpec, QParams, compute_qparams, dequantize, quantize
from sqft.ops.grid import round_scale

__all__ = ["search_qparams"]

SHRINKS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)


def search_qparams(weight: Float[Tensor, "out in"], grid: GridSpec, *, search: bool = True) -> QParams:
    """The numbers of a grid for a weight: of each group the scale of least error.

    That is the scale s · c of least sum of |w - fake_quantize(w)|^2.4, with c from 1 down to 0.65 and s the
    scale that just covers the group, which it is without `search`.

    Source: the exponent and the search are those of GPTQ's code (arXiv 2210.17323, option mse).

    Raises: CompressionError if the group size does not divide the width.
    """
    full = compute_qparams(weight, grid)
    if not search:
        return full
    scale, best = full.scale.clone(), _error(weight, full)
    zero_point = full.zero_point.clone()
    for shrink in SHRINKS:
        smaller = round_scale(full.scale * shrink, grid.scale_bits)
        zero = full.zero_point
        if not grid.symmetric:
            low = -(full.zero_point.float() * full.scale) * shrink
            zero = torch.round(-low / smaller).clamp(0, full.max_code).to(torch.uint8)
        trial = QParams(smaller, zero, full.bits, full.symmetric)
        error = _error(weight, trial)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, smaller, scale)
        zero_point = torch.where(better, zero, zero_point)
    return QParams(scale, zero_point, full.bits, full.symmetric)


def _error(weight: Tensor, qparams: QParams) -> Tensor:
    difference = (dequantize(quantize(weight, qparams), qparams) - weight.float()).abs_().pow_(2.4)
    return difference.unflatten(1, (qparams.scale.shape[1], -1)).sum(-1)
