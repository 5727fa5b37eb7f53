"""Coordinate descent over the codes of a weight that is already rounded."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from sqft.compression.gptq import Rounded
from sqft.ops import dequantize, quantize
from sqft.ops.adapted import exact_float32

__all__ = ["descend_codes"]

BLOCK = 128


def descend_codes(
    target: Float[Tensor, "out in"], rounded: Rounded, hessian: Float[Tensor, "in in"], *, sweeps: int
) -> Rounded:
    """Round every kept weight again, column after column, to what is best given all the others.

    With V the rounded weight and E = (W - V) H, the best value of column j is v_j + E_j / H_jj, of which the
    grid point next to it is taken: the error tr((W - V) H (W - V)ᵀ) never rises. GPTQ decides on a column
    before it knows the columns to come, and spends compensation on pruned weights; this does neither.

    Source: Nair and Suggala, CDQuant, arXiv 2406.17542, section 3 (cyclic order).
    """
    qparams = rounded.qparams
    columns = target.shape[1]
    size = qparams.group_size(columns)
    value = dequantize(rounded.codes, qparams).T.contiguous()
    wanted = rounded.before_rounding.T.contiguous()
    keep = torch.ones_like(value, dtype=torch.bool) if rounded.mask is None else rounded.mask.T.contiguous()
    scale, zero = qparams.scale.T.contiguous(), qparams.zero_point.T.float().contiguous()
    diagonal = hessian.diagonal()
    with exact_float32(target.device):
        for _ in range(sweeps):
            error = hessian @ (target.float().T - value)
            for start in range(0, columns, BLOCK):
                end = min(start + BLOCK, columns)
                moved = torch.zeros_like(value[start:end])
                for j in range(start, end):
                    group = j // size
                    best = value[j] + error[j] / diagonal[j]
                    code = torch.round(best / scale[group]).add_(zero[group]).clamp_(0, qparams.max_code)
                    new = torch.where(keep[j], code.sub_(zero[group]).mul_(scale[group]), 0.0)
                    wanted[j] = torch.where(keep[j], best, 0.0)
                    moved[j - start] = new - value[j]
                    value[j] = new
                    error[j:end].addr_(hessian[j, j:end], moved[j - start], alpha=-1)
                error[end:].addmm_(hessian[end:, start:end], moved, alpha=-1)
    before = wanted.T.contiguous()
    return replace(rounded, codes=quantize(before, qparams), before_rounding=before)
