"""GPTAQ: GPTQ that aims at what the layer put out in the uncompressed model."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sqft.compression.compressed import Rounded
from sqft.compression.gptq import gptq
from sqft.compression.statistics import DenseTargetHessian
from sqft.ops import GridSpec
from sqft.ops.adapted import exact_float32

__all__ = ["ALPHA", "gptaq", "residual_carry"]

ALPHA = 0.25  # of the residual that is made up for; the authors' code has this share throughout


def gptaq(
    weight: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"] | None,
    statistic: DenseTargetHessian,
    grid: GridSpec,
    *,
    search_scales: bool = False,
    damping: float,
    activation_order: bool = False,
) -> Rounded:
    """Quantize as `gptq` does; columns to come also make up for the inputs that compression has changed.

    With X the inputs as they are and X + ΔX those of the uncompressed model, column j leaves the residual
    w_j ΔX_j, whatever it is rounded to, and the columns behind it take over what they can of it:

        P = alpha · triu(ΔXᵀ X Uᵀ, 1) U;   W[:, j+1:] += w_j · P[j, j+1:]

    beside the compensation of rounding, with U of `obs.py`. Row j of triu(..., 1) U is that of ΔXᵀ X behind j
    times the inverse of the Hessian of the columns behind j.

    Source: Li et al., GPTAQ, arXiv 2504.02692; P and alpha = 0.25 as in the authors' code. Differs from the
    paper: pruned columns are masked as in `gptq`, their residual included. Differs from its code: columns
    behind the block of 128 get w_j · P, as those inside it do, and not its rounding times P.

    Raises: CompressionError if group_size does not divide the width, or the Hessian cannot be factorised.
    """

    def carry(factor: Tensor, order: Tensor | None) -> Tensor:
        return residual_carry(statistic, factor, order)

    return gptq(
        weight,
        mask,
        statistic,
        grid,
        search_scales=search_scales,
        damping=damping,
        activation_order=activation_order,
        carry=carry,
    )


def residual_carry(
    statistic: DenseTargetHessian, factor: Float[Tensor, "in in"], order: Tensor | None
) -> Float[Tensor, "in in"]:
    """P, with rows and columns in `order`, as `factor` has them."""
    shift = statistic.shift()
    if order is not None:
        shift = shift[order][:, order]
    with exact_float32(shift.device):
        return ALPHA * torch.triu(shift @ factor.T, 1) @ factor
