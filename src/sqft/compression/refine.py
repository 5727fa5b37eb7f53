"""Improves a pruned layer at the same sparsity: better masks by swaps, better values by least squares.

Both look at the layer's squared output error, tr((W' - W) H (W' - W)ᵀ), one output row at a time.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sqft.ops.adapted import exact_float32
from sqft.ops.pattern import allowed_swaps, parse_pattern
from sqft.patterns import Pattern

__all__ = ["fit_kept_weights", "swap_mask"]

CANDIDATES = 16
ROWS = 1024
PAIRS = 1 << 26  # of columns of a block, in all rows that are looked at together


def fit_kept_weights(
    weight: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    *,
    iterations: int,
    start: Float[Tensor, "out in"] | None = None,
) -> Float[Tensor, "out in"]:
    """The kept weights of least error: min over W' on the mask of tr((W' - W) H (W' - W)ᵀ).

    Conjugate gradients on all rows at once, preconditioned by diag H: a matrix product an iteration.
    start: where to begin, by default the weight as it is.

    Source: Meng et al., ALPS, arXiv 2406.07831, section 3.3.
    """
    diagonal = hessian.diagonal()
    values = torch.where(mask, weight if start is None else start, 0.0)
    with exact_float32(weight.device):
        residual = torch.where(mask, (weight - values) @ hessian, 0.0)
        scaled = residual / diagonal
        direction = scaled.clone()
        energy = (residual * scaled).sum(1)
        for _ in range(iterations):
            image = torch.where(mask, direction @ hessian, 0.0)
            step = (energy / (direction * image).sum(1).clamp_min(1e-30))[:, None]
            values.addcmul_(direction, step)
            residual.addcmul_(image, step, value=-1)
            scaled = residual / diagonal
            previous, energy = energy, (residual * scaled).sum(1)
            direction = scaled.addcmul(direction, (energy / previous.clamp_min(1e-30))[:, None])
    return values


def swap_mask(
    weight: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    *,
    max_swaps: int,
    pattern: str | None = None,
) -> Bool[Tensor, "out in"]:
    """Swap a kept and a pruned weight of a row while that lowers its error, at most `max_swaps` times.

    With e = the pruned weights and g = H e, taking p back and pruning q instead changes the error by
    (w_p² H_pp - 2 w_p g_p) + (w_q² H_qq + 2 w_q g_q) - 2 w_p w_q H_pq. pattern: swap inside its blocks only,
    and where it has windows only what leaves every kept weight in its own.

    Source: Zimmer et al., SparseSwaps, arXiv 2512.10922, section 3. Differs from the paper: of each row only
    the 16 best weights to take back and the 16 best to prune are paired, not all (with a pattern: all).
    """
    form = None if pattern is None else parse_pattern(pattern)
    step = ROWS if form is None else max(1, min(ROWS, PAIRS // (weight.shape[1] * form.block)))
    parts = []
    for start in range(0, weight.shape[0], step):
        values, kept = weight[start : start + step].float(), mask[start : start + step].clone()
        if form is None:
            parts.append(_swap_rows(values, kept, hessian, max_swaps))
        else:
            parts.append(_swap_in_blocks(values, kept, hessian, max_swaps, form))
    return torch.cat(parts)


def _swap_rows(weight: Tensor, mask: Tensor, hessian: Tensor, max_swaps: int) -> Tensor:
    gradient = torch.where(mask, 0.0, weight) @ hessian
    square = weight.square() * hessian.diagonal()
    count = min(CANDIDATES, weight.shape[1])
    for _round in range(max_swaps):
        cross = 2 * weight * gradient
        take = torch.where(mask, torch.inf, square - cross)
        drop = torch.where(mask, square + cross, torch.inf)
        take_cost, take_at = take.topk(count, dim=1, largest=False)
        drop_cost, drop_at = drop.topk(count, dim=1, largest=False)
        pair = hessian[take_at[:, :, None], drop_at[:, None, :]]
        pair = pair * weight.gather(1, take_at)[:, :, None] * weight.gather(1, drop_at)[:, None, :]
        change = (take_cost[:, :, None] + drop_cost[:, None, :] - 2 * pair).flatten(1)
        if not _apply(weight, mask, gradient, hessian, change, take_at, drop_at, count):
            break
    return mask


def _swap_in_blocks(weight: Tensor, mask: Tensor, hessian: Tensor, max_swaps: int, form: Pattern) -> Tensor:
    block = form.block
    gradient = torch.where(mask, 0.0, weight) @ hessian
    square = weight.square() * hessian.diagonal()
    columns = torch.arange(weight.shape[1], device=weight.device).view(-1, block)
    inner = hessian[columns[:, :, None], columns[:, None, :]]  # (blocks, M, M)
    blocks = weight.unflatten(1, (-1, block))
    products = blocks[..., :, None] * blocks[..., None, :] * inner
    for _round in range(max_swaps):
        cross = 2 * weight * gradient
        take = torch.where(mask, torch.inf, square - cross).unflatten(1, (-1, block))
        drop = torch.where(mask, square + cross, torch.inf).unflatten(1, (-1, block))
        change = take[..., :, None] + drop[..., None, :] - 2 * products
        allowed = allowed_swaps(mask, form)
        if allowed is not None:
            change = change.masked_fill_(~allowed, torch.inf)
        change = change.flatten(1)
        best, at = change.min(1)
        if not bool((best < 0).any()):
            break
        where, pair = at // (block * block), at % (block * block)
        take_at, drop_at = where * block + pair // block, where * block + pair % block
        _apply(weight, mask, gradient, hessian, best[:, None], take_at[:, None], drop_at[:, None], 1)
    return mask


def _apply(
    weight: Tensor, mask: Tensor, gradient: Tensor, hessian: Tensor,
    change: Tensor, take_at: Tensor, drop_at: Tensor, count: int,
) -> bool:  # fmt: skip
    """Make each row's best swap, if it helps; say whether any row swapped."""
    best, at = change.min(1)
    rows = torch.nonzero(best < -1e-7 * (weight.square() @ hessian.diagonal())).flatten()
    if not len(rows):
        return False
    take = take_at[rows, at[rows] // count]
    drop = drop_at[rows, at[rows] % count]
    mask[rows, take] = True
    mask[rows, drop] = False
    gradient[rows] += (
        weight[rows, drop][:, None] * hessian[drop] - weight[rows, take][:, None] * hessian[take]
    )
    return True
