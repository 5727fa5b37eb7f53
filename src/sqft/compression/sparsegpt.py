"""SparseGPT: prune column by column, let the columns to come make up for it; and round in the same pass."""

from collections.abc import Callable
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from sqft.compression.compressed import Pruned, Rounded
from sqft.compression.obs import BLOCK, GroupGrids, obs_pass
from sqft.compression.statistics import Hessian
from sqft.ops import GridSpec, mask_pattern, mask_rows, quantize
from sqft.ops.pattern import parse_pattern

__all__ = ["prune_and_round", "sparsegpt"]


def sparsegpt(
    weight: Float[Tensor, "out in"],
    hessian: Hessian,
    *,
    sparsity: float,
    pattern: str | None = None,
    damping: float,
) -> Pruned:
    """Prune a weight and update what it keeps.

    scores = (w / U_jj)², from the compensated weights: in blocks of 128 columns over all rows, or, with a
    pattern, in every M columns of a row.

    Source: Frantar and Alistarh, arXiv 2301.00774, algorithm 1.

    Raises: CompressionError if the pattern does not divide the width or the Hessian cannot be factorised.
    """
    factor, damping = hessian.inverse_factor(damping)
    choose, every = _mask_chooser(sparsity, pattern)
    return replace(obs_pass(weight, factor, choose=choose, choose_every=every), damping=damping)


def prune_and_round(
    weight: Float[Tensor, "out in"],
    hessian: Hessian,
    grid: GridSpec,
    *,
    search_scales: bool = False,
    sparsity: float,
    pattern: str | None = None,
    damping: float,
) -> Rounded:
    """Prune and quantize in one pass, with one factorisation: later columns make up for both.

    Source: SparseGPT, arXiv 2301.00774, section 3.5 ("joint sparsification and quantization").
    Differs from the paper: groups of columns share a grid, taken from what the group keeps where that is
    known when its first column is reached.

    Raises: CompressionError if group size or pattern do not divide the width, or the Hessian cannot be
    factorised.
    """
    grids = GroupGrids(weight, grid, search=search_scales)
    factor, damping = hessian.inverse_factor(damping)
    choose, every = _mask_chooser(sparsity, pattern)
    pruned = obs_pass(weight, factor, choose=choose, choose_every=every, grids=grids)
    qparams = grids.qparams()
    return Rounded(quantize(pruned.weight, qparams), qparams, pruned.weight, pruned.mask, damping)


def _mask_chooser(sparsity: float, pattern: str | None) -> tuple[Callable[[Tensor, Tensor], Tensor], int]:
    if pattern is not None:
        block = parse_pattern(pattern).block

        def choose_pattern(values: Tensor, diagonal: Tensor) -> Tensor:
            return mask_pattern((values / diagonal[:, None]).abs().T, pattern).T

        return choose_pattern, block

    def choose_block(values: Tensor, diagonal: Tensor) -> Tensor:
        scores = (values / diagonal[:, None]).square().T
        return mask_rows(scores.reshape(1, -1), sparsity).view(scores.shape).T

    return choose_block, BLOCK
