"""SparseGPT: prune column by column, let the columns to come make up for it; and round in the same pass."""

from collections.abc import Callable
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from sqft.compression.gptq import Rounded, group_width
from sqft.compression.obs import BLOCK, Grid, ObsResult, obs_pass
from sqft.compression.scale_search import GridOptions, search_qparams
from sqft.compression.statistics import Hessian
from sqft.ops import mask_pattern, mask_rows, quantize
from sqft.ops.pattern import parse_pattern

__all__ = ["prune_and_round", "sparsegpt"]


def sparsegpt(
    weight: Float[Tensor, "out in"],
    hessian: Hessian,
    *,
    sparsity: float,
    pattern: str | None = None,
    damping: float = 0.01,
) -> tuple[ObsResult, float]:
    """Prune a weight and update what it keeps; returns the result and the damping that was needed.

    scores = (w / U_jj)², from the compensated weights: in blocks of 128 columns over all rows, or, with a
    pattern, in every M columns of a row.

    Source: Frantar and Alistarh, arXiv 2301.00774, algorithm 1.

    Raises: CompressionError if the pattern does not divide the width or the Hessian cannot be factorised.
    """
    factor, damping = hessian.inverse_factor(damping)
    choose, every = _mask_chooser(sparsity, pattern)
    return obs_pass(weight, factor, choose=choose, choose_every=every), damping


def prune_and_round(
    weight: Float[Tensor, "out in"],
    hessian: Hessian,
    options: GridOptions,
    *,
    sparsity: float,
    pattern: str | None = None,
    damping: float = 0.01,
) -> Rounded:
    """Prune and quantize in one pass, with one factorisation: later columns make up for both.

    Source: SparseGPT, arXiv 2301.00774, section 3.5 ("joint sparsification and quantization").
    Differs from the paper: groups of columns share a grid, taken from what the group keeps where that is
    known when its first column is reached.

    Raises: CompressionError if group size or pattern do not divide the width, or the Hessian cannot be
    factorised.
    """
    size = group_width(weight.shape[1], options)
    factor, damping = hessian.inverse_factor(damping)
    choose, every = _mask_chooser(sparsity, pattern)
    grouped = replace(options, group_size=size)
    grid = Grid(lambda values: search_qparams(values, grouped), size)
    result = obs_pass(weight, factor, choose=choose, choose_every=every, grid=grid)
    assert result.qparams is not None
    return Rounded(
        quantize(result.weight, result.qparams), result.qparams, result.weight, result.mask, damping
    )


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
