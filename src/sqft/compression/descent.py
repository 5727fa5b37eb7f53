"""Coordinate descent over the codes and the scales of a weight that is already rounded."""

from dataclasses import replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from sqft.compression.compressed import Rounded
from sqft.ops import QParams, dequantize, quantize
from sqft.ops.adapted import exact_float32
from sqft.ops.grid import round_scale

__all__ = ["descend", "descend_codes", "fit_scales"]

BLOCK = 128
SCALE_RANGE = (0.5, 1.5)  # a fitted scale over the one before


def descend(
    target: Float[Tensor, "out in"],
    rounded: Rounded,
    hessian: Float[Tensor, "in in"],
    *,
    sweeps: int,
    scale_bits: int | None = None,
) -> Rounded:
    """Sweeps over the codes; with scale_bits, the scales are fitted to the codes before each sweep."""
    for _ in range(sweeps):
        if scale_bits is not None:
            qparams = fit_scales(target, rounded.codes, rounded.qparams, hessian, scale_bits=scale_bits)
            rounded = replace(rounded, qparams=qparams)
        rounded = descend_codes(target, rounded, hessian)
    return rounded


def descend_codes(
    target: Float[Tensor, "out in"], rounded: Rounded, hessian: Float[Tensor, "in in"]
) -> Rounded:
    """Round every kept weight once more, column after column, to what is best given all the others.

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


def fit_scales(
    target: Float[Tensor, "out in"],
    codes: UInt8[Tensor, "out in"],
    qparams: QParams,
    hessian: Float[Tensor, "in in"],
    *,
    scale_bits: int,
) -> QParams:
    """The scales of least error for codes that are given, each row's groups fitted together.

    With c_g the steps of group g, the error of a row is sᵀ N s - 2 bᵀ s + const with N_gk = c_gᵀ H_gk c_k and
    b_g = c_gᵀ (H w)_g: a small linear system a row. Rows that rounding the scales makes worse keep theirs.

    Source: the least-squares step of COMQ, Zhang et al., arXiv 2403.07134, section 3; differs in that all
    groups of a row are solved for at once, with the inputs' full Gram matrix.
    """
    groups = qparams.scale.shape[1]
    steps = codes.unflatten(1, (groups, -1)).float() - qparams.zero_point[..., None].float()
    with exact_float32(target.device):
        wanted = (target.float() @ hessian).unflatten(1, (groups, -1))
        right = (wanted * steps).sum(-1)
        normal = torch.stack(
            [
                ((steps[:, g] @ block).unflatten(1, (groups, -1)) * steps).sum(-1)
                for g, block in enumerate(hessian.unflatten(0, (groups, -1)))
            ],
            dim=2,
        )
        normal = (normal + normal.mT) / 2
        diagonal = normal.diagonal(dim1=1, dim2=2)
        mean = diagonal.mean(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        pull = 1e-3 * mean
        old = qparams.scale
        solved = torch.linalg.solve(normal + torch.diag_embed(pull.expand_as(old)), right + pull * old)
        low, high = SCALE_RANGE
        new = round_scale(torch.minimum(torch.maximum(solved, old * low), old * high), scale_bits)

        def error(scale: Tensor) -> Tensor:
            return (scale * ((normal @ scale[..., None])[..., 0] - 2 * right)).sum(1)

        better = (error(new) < error(old))[:, None]
    return QParams(torch.where(better, new, old), qparams.zero_point, qparams.bits, qparams.symmetric)
