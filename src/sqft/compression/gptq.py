"""GPTQ that keeps a mask: round column by column, and let the columns to come make up for the error."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sqft.compression.compressed import Rounded
from sqft.compression.obs import GroupGrids, obs_pass
from sqft.compression.scale_search import search_qparams
from sqft.compression.statistics import Hessian
from sqft.ops import GridSpec, quantize

__all__ = ["gptq"]


def gptq(
    weight: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"] | None,
    hessian: Hessian,
    grid: GridSpec,
    *,
    search_scales: bool = False,
    damping: float,
    activation_order: bool = False,
    carry: Callable[[Tensor, Tensor | None], Tensor] | None = None,
) -> Rounded:
    """Quantize the dense weight onto the mask (True = kept; None keeps all).

    A pruned weight counts as rounded to 0, so that what pruning lost is made up for as well.
    activation_order: columns of large inputs first; groups stay neighbours, and their grid is then taken
    from the weights as they came (static groups). Otherwise a group's grid is taken when its first column
    is reached, from the compensated weights. carry: from U and the order of columns, the C of `obs_pass`.

    Source: Frantar et al., arXiv 2210.17323, algorithm 1; the mask as in SparseGPT, arXiv 2301.00774,
    section 3.5. Differs from the paper: inputs that are always 0 keep their rounded weights.

    Raises: CompressionError if group_size does not divide the width, or the Hessian cannot be factorised.
    """
    order = torch.argsort(hessian.norm, descending=True, stable=True) if activation_order else None
    factor, damping = hessian.inverse_factor(damping, order)
    static = None
    if activation_order:
        kept = weight.float() if mask is None else torch.where(mask, weight.float(), 0.0)
        static = search_qparams(kept, grid, search=search_scales)
    grids = GroupGrids(weight, grid, search=search_scales, order=order, static=static)
    carried = None if carry is None else carry(factor, order)
    before = obs_pass(weight, factor, mask=mask, grids=grids, order=order, carry=carried).weight
    qparams = grids.qparams()
    return Rounded(quantize(before, qparams), qparams, before, mask, damping)
