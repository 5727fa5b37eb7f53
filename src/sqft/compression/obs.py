"""One pass of optimal brain surgery over the columns of a weight: prune, round, or both.

For columns j in order, with U upper triangular and (H + d·I)⁻¹ = Uᵀ U, what a column loses is made up for
by the columns to come:

    v_j = keep_j · round(w_j);   e = (w_j - v_j) / U_jj;   W[:, j+1:] -= e · U[j, j+1:]

Source: Frantar and Alistarh, SparseGPT, arXiv 2301.00774, algorithm 1; GPTQ, arXiv 2210.17323, algorithm 1.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sqft.compression.compressed import Pruned
from sqft.compression.scale_search import search_qparams
from sqft.ops import GridSpec, QParams
from sqft.ops.adapted import exact_float32

__all__ = ["GroupGrids", "obs_pass"]

BLOCK = 128
# (values (columns, out), diagonal of U (columns,)) → keep (columns, out)
ChooseMask = Callable[[Tensor, Tensor], Tensor]


def obs_pass(
    weight: Float[Tensor, "out in"],
    factor: Float[Tensor, "in in"],
    *,
    mask: Bool[Tensor, "out in"] | None = None,
    choose: ChooseMask | None = None,
    choose_every: int = BLOCK,
    grids: "GroupGrids | None" = None,
    order: Tensor | None = None,
    carry: Float[Tensor, "in in"] | None = None,
) -> Pruned:
    """Walk the columns once.

    factor: U, in `order`. mask: True = kept, where it is given; else `choose` picks it from the compensated
    weights of `choose_every` columns at a time (any number of columns). grids: round to them, in the same
    `order`. carry: C, in `order`, zero up to its diagonal: each column j, as it is before it is rounded or
    pruned, also adds w_j · C[j, j+1:] to the columns to come.

    Returns: the compensated weight before rounding (0 where pruned), and the mask.
    """
    columns = weight.shape[1]
    # Columns lie as rows of contiguous memory while they are worked on.
    work = (weight.float() if order is None else weight.float()[:, order]).T.contiguous()
    keep = torch.ones_like(work, dtype=torch.bool)
    if mask is not None:
        keep = (mask if order is None else mask[:, order]).T.contiguous()
    diagonal = factor.diagonal()
    prunes, nothing = mask is not None or choose is not None, work.new_zeros(())
    divisors = diagonal.tolist()
    with exact_float32(weight.device):
        for start in range(0, columns, BLOCK):
            end = min(start + BLOCK, columns)
            errors = torch.zeros_like(work[start:end])

            def pending(
                first: int, last: int, start: int = start, end: int = end, errors: Tensor = errors
            ) -> Tensor:
                """Columns first..last as they are now; those behind the block still lack its errors."""
                if last <= end:
                    return work[first:last]
                behind = work[end:last] - factor[start:first, end:last].T @ errors[: first - start]
                if carry is not None:
                    behind = behind + carry[start:first, end:last].T @ work[start:first]
                return torch.cat([work[first:end], behind])

            for j in range(start, end):
                if choose is not None and mask is None and j % choose_every == 0:
                    last = min(j + choose_every, columns)
                    keep[j:last] = choose(pending(j, last), diagonal[j:last])
                column = work[j]
                if grids is not None:
                    grids.enter(j, pending, keep)
                    error = torch.sub(column, grids.round(j, column), out=errors[j - start])
                    if prunes:
                        torch.where(keep[j], error, column, out=error)
                else:
                    error = torch.where(keep[j], nothing, column, out=errors[j - start])
                error.div_(divisors[j])
                if j + 1 < end:
                    work[j + 1 : end].addr_(factor[j, j + 1 : end], error, alpha=-1)
                    if carry is not None:
                        work[j + 1 : end].addr_(carry[j, j + 1 : end], column)
            if end < columns:
                work[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
                if carry is not None:
                    work[end:].addmm_(carry[start:end, end:].T, work[start:end])
    result = torch.where(keep, work, 0.0).T
    kept = keep.T
    if order is not None:
        result = torch.empty_like(result).index_copy_(1, order, result)
        kept = torch.empty_like(kept).index_copy_(1, order, kept)
    return Pruned(result.contiguous(), kept.contiguous())


class GroupGrids:
    """The numbers of a grid, taken group by group as a pass over the columns reaches them.

    weight: what the pass starts from. search: for smaller scales too (`search_qparams`). static: numbers that
    are known before the pass, as an `order` of the columns needs them.
    """

    def __init__(
        self,
        weight: Float[Tensor, "out in"],
        grid: GridSpec,
        *,
        search: bool = False,
        order: Tensor | None = None,
        static: QParams | None = None,
    ) -> None:
        columns = weight.shape[1]
        self.size = grid.group_width(columns)
        self.grid = replace(grid, group_size=self.size)
        self.search, self.static = search, static is not None
        groups = torch.arange(columns, device=weight.device) // self.size
        self.group_of = (groups if order is None else groups[order]).tolist()
        self.max_code = (1 << grid.bits) - 1
        # Both are (groups, out), so that those of a group lie side by side.
        if static is not None:
            self.scale, self.zero = static.scale.T.contiguous(), static.zero_point.T.float().contiguous()
        else:
            shape = (columns // self.size, weight.shape[0])
            self.scale = torch.ones(shape, device=weight.device)
            self.zero = torch.zeros(shape, device=weight.device)
        # codes - zero_point lies between these
        self.low, self.high = -self.zero, self.max_code - self.zero
        self.steps = torch.empty(weight.shape[0], device=weight.device)
        self._use(self.group_of[0])

    def enter(self, j: int, pending: Callable[[int, int], Tensor], keep: Tensor) -> None:
        """Take the grid of a group whose first column this is."""
        size = self.size
        if not self.static and j % size == 0:
            values = torch.where(keep[j : j + size], pending(j, j + size), 0.0).T
            fresh = search_qparams(values, self.grid, search=self.search)
            group, zero = j // size, fresh.zero_point[:, 0].float()
            self.scale[group], self.zero[group] = fresh.scale[:, 0], zero
            self.low[group], self.high[group] = -zero, self.max_code - zero
            self._use(group)

    def round(self, j: int, column: Tensor) -> Tensor:
        """The column on its grid, by the formula of `ops.quantize`; overwritten by the next call."""
        if self.group_of[j] != self.group:
            self._use(self.group_of[j])
        scale, low, high = self.of_group
        return torch.div(column, scale, out=self.steps).round_().clamp_(low, high).mul_(scale)

    def _use(self, group: int) -> None:
        self.group, self.of_group = group, (self.scale[group], self.low[group], self.high[group])

    def qparams(self) -> QParams:
        """All of them, once the pass is over."""
        zero_point = self.zero.T.contiguous().to(torch.uint8)
        return QParams(self.scale.T.contiguous(), zero_point, self.grid.bits, self.grid.symmetric)
