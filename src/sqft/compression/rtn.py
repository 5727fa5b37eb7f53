"""Round to nearest: the baseline that uses nothing but the weights."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sqft.compression.compressed import Rounded
from sqft.compression.scale_search import search_qparams
from sqft.ops import GridSpec, quantize

__all__ = ["rtn"]


def rtn(
    weight: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"] | None,
    grid: GridSpec,
    *,
    search_scales: bool = False,
) -> Rounded:
    """Round every kept weight to the grid of its group.

    Raises: CompressionError if group_size does not divide the width.
    """
    kept = weight.float() if mask is None else torch.where(mask, weight.float(), 0.0)
    qparams = search_qparams(kept, grid, search=search_scales)
    return Rounded(quantize(kept, qparams), qparams, kept, mask)
