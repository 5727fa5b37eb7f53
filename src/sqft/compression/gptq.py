"""GPTQ: round one column after another and let the columns to come make up for the error; keeps a mask.

For columns j in order, with U upper triangular and (H + d·I)⁻¹ = Uᵀ U:

    q_j = mask_j · dequantize(quantize(w_j));   e = (w_j - q_j) / U_jj;   W[:, j+1:] -= e · U[j, j+1:]

A pruned weight has q_j = 0, so that what pruning lost is made up for as well, from the dense weights.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from sqft.compression.statistics import Hessian
from sqft.errors import CompressionError
from sqft.ops import QParams, compute_qparams, quantize
from sqft.ops.adapted import exact_float32

__all__ = ["Rounded", "gptq"]

BLOCK = 128


@dataclass(frozen=True)
class Rounded:
    """A quantized weight: its codes, their grid, the value before rounding, and the damping it took."""

    codes: UInt8[Tensor, "out in"]
    qparams: QParams
    before_rounding: Float[Tensor, "out in"]
    damping: float = 0.0


def gptq(
    weight: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"] | None,
    hessian: Hessian,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_bits: int,
    damping: float = 0.01,
    activation_order: bool = False,
) -> Rounded:
    """Quantize the dense weight onto the mask (True = kept; None keeps all).

    activation_order: columns of large inputs first; groups stay neighbours, and their grid is then taken
    from the weights as they came (static groups). Otherwise a group's grid is taken when its first column
    is reached, from the compensated weights.

    Source: Frantar et al., arXiv 2210.17323, algorithm 1; the mask as in SparseGPT, arXiv 2301.00774,
    section 3.5.
    Differs from the paper: inputs that are always 0 keep their rounded weights.

    Raises: CompressionError if group_size does not divide the width, or the Hessian cannot be factorised.
    """
    columns = weight.shape[1]
    size = columns if group_size == -1 else group_size
    if columns % size:
        raise CompressionError(f"group size {size} does not divide the width {columns}; choose one that does")
    kept = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask

    def grid(values: Tensor) -> QParams:
        return compute_qparams(values, bits=bits, group_size=size, symmetric=symmetric, scale_bits=scale_bits)

    static = grid(torch.where(kept, weight.float(), 0.0))
    order = torch.argsort(hessian.norm, descending=True, stable=True) if activation_order else None
    factor, damping = hessian.inverse_factor(damping, order)
    # Columns lie as rows of contiguous memory while they are worked on.
    work = (weight.float() if order is None else weight.float()[:, order]).T.contiguous()
    keep = (kept if order is None else kept[:, order]).T.contiguous()
    scale, zero_point = static.scale.T.contiguous(), static.zero_point.T.float().contiguous()
    before = torch.empty_like(work)
    groups = torch.arange(columns, device=weight.device) // size
    group_of = (groups if order is None else groups[order]).tolist()
    with exact_float32(weight.device):
        for start in range(0, columns, BLOCK):
            end = min(start + BLOCK, columns)
            local = factor[start:end, start:end]
            errors = torch.empty_like(work[start:end])
            for j in range(start, end):
                group = group_of[j]
                if order is None and j % size == 0:
                    current = _pending(work, factor, errors, start, end, j, min(j + size, columns))
                    fresh = grid(torch.where(keep[j : j + size], current, 0.0).T)
                    scale[group], zero_point[group] = fresh.scale[:, 0], fresh.zero_point[:, 0].float()
                column = work[j]
                before[j] = column
                code = torch.round(column / scale[group]).add_(zero_point[group]).clamp_(0, static.max_code)
                value = code.sub_(zero_point[group]).mul_(scale[group])
                error = torch.where(keep[j], column - value, column) / factor[j, j]
                errors[j - start] = error
                if j + 1 < end:
                    work[j + 1 : end].addr_(local[j - start, j + 1 - start :], error, alpha=-1)
            if end < columns:
                work[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    qparams = QParams(scale.T.contiguous(), zero_point.T.contiguous().to(torch.uint8), bits, symmetric)
    result = before.T
    if order is not None:
        result = torch.empty_like(result).index_copy_(1, order, result)
    result = torch.where(kept, result, 0.0)
    return Rounded(quantize(result, qparams), qparams, result, damping)


def _pending(
    work: Tensor, factor: Tensor, errors: Tensor, start: int, end: int, first: int, last: int
) -> Tensor:
    """Columns first..last as they are now: those behind the block lack its errors up to `first`."""
    if last <= end:
        return work[first:last]
    done = first - start
    behind = work[end:last] - factor[start:first, end:last].T @ errors[:done]
    return torch.cat([work[first:end], behind])
