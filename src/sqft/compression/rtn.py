"""Round to nearest: the baseline that looks at nothing but the weights."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sqft.compression.gptq import Rounded
from sqft.ops import compute_qparams, quantize

__all__ = ["rtn"]


def rtn(
    weight: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"] | None,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_bits: int,
) -> Rounded:
    """Round every kept weight to the grid that just covers its group.

    Raises: CompressionError if group_size does not divide the width.
    """
    kept = weight.float() if mask is None else torch.where(mask, weight.float(), 0.0)
    qparams = compute_qparams(
        kept, bits=bits, group_size=group_size, symmetric=symmetric, scale_bits=scale_bits
    )
    return Rounded(quantize(kept, qparams), qparams, kept)
