"""GPTQ that keeps a mask: round column by column, and let the columns to come make up for the error."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from sqft.compression.obs import Grid, obs_pass
from sqft.compression.scale_search import GridOptions, search_qparams
from sqft.compression.statistics import Hessian
from sqft.errors import CompressionError
from sqft.ops import QParams, quantize

__all__ = ["Rounded", "gptq"]


@dataclass(frozen=True)
class Rounded:
    """A quantized weight: codes, grid, the value before rounding, its mask (None: all kept), the damping."""

    codes: UInt8[Tensor, "out in"]
    qparams: QParams
    before_rounding: Float[Tensor, "out in"]
    mask: Bool[Tensor, "out in"] | None
    damping: float = 0.0


def gptq(
    weight: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"] | None,
    hessian: Hessian,
    options: GridOptions,
    *,
    damping: float = 0.01,
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
    columns = weight.shape[1]
    size = group_width(columns, options)
    order = torch.argsort(hessian.norm, descending=True, stable=True) if activation_order else None
    factor, damping = hessian.inverse_factor(damping, order)
    grouped = replace(options, group_size=size)
    static = None
    if activation_order:
        kept = weight.float() if mask is None else torch.where(mask, weight.float(), 0.0)
        static = search_qparams(kept, grouped)
    grid = Grid(lambda values: search_qparams(values, grouped), size, static)
    carried = None if carry is None else carry(factor, order)
    result = obs_pass(weight, factor, mask=mask, grid=grid, order=order, carry=carried)
    assert result.qparams is not None
    codes = quantize(result.weight, result.qparams)
    return Rounded(codes, result.qparams, result.weight, mask, damping)


def group_width(columns: int, options: GridOptions) -> int:
    """Columns of a group. Raises: CompressionError if they do not divide the width."""
    size = columns if options.group_size == -1 else options.group_size
    if columns % size:
        raise CompressionError(f"group size {size} does not divide the width {columns}; choose one that does")
    return size
