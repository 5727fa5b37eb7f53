"""Masks: choosing them from scores, packing them into bits, keeping them readable from the weights.

A mask is bool and **True means kept**. A weight of shape (out, in) has a mask of the same shape.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

__all__ = ["STRAY_ZEROS", "existing_mask", "keep_nonzero", "mask_rows", "pack_mask", "unpack_mask"]

# A dense checkpoint has a stray exact zero here and there; beyond this share a weight counts as sparse.
STRAY_ZEROS = 0.01
AT_ONCE = 1 << 20  # scores; choosing takes a few bytes for each


def mask_rows(scores: Float[Tensor, "out in"], sparsity: float) -> Bool[Tensor, "out in"]:
    """Prune the lowest scores of each output row (Wanda, arXiv 2306.11695, section 3).

    The pruned count of a row is sparsity * in, rounded such that the counts of the first r rows always
    add up to round(r * sparsity * in): the layer meets its sparsity to one weight, whatever its width.

    Differs from the paper: its code floors the count in every row.
    """
    rows, columns = scores.shape
    ends = torch.round(torch.arange(rows + 1, dtype=torch.float64) * sparsity * columns).long()
    counts = (ends[1:] - ends[:-1]).to(scores.device)
    mask = torch.empty_like(scores, dtype=torch.bool)
    step = max(1, AT_ONCE // max(columns, 1))
    for start in range(0, rows, step):
        part = counts[start : start + step]
        for pruned in part.unique().tolist():
            chosen = start + torch.nonzero(part == pruned).flatten()
            mask[chosen] = _prune_lowest(scores[chosen], pruned)
    return mask


def _prune_lowest(scores: Tensor, pruned: int) -> Tensor:
    """The mask of rows that all lose `pruned` scores; of equal scores the first ones go."""
    if pruned == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(pruned, dim=1, keepdim=True).values
    mask = scores > threshold
    tied = torch.nonzero(mask.sum(1) < scores.shape[1] - pruned).flatten()
    if len(tied):  # only these rows need a sort
        order = torch.argsort(scores[tied], dim=1, stable=True)
        mask[tied] = torch.zeros_like(mask[tied]).scatter_(1, order[:, pruned:], True)
    return mask


def pack_mask(mask: Bool[Tensor, "out in"]) -> UInt8[Tensor, "out bytes"]:
    """Eight columns a byte, lowest column in the lowest bit; the last byte of a row is filled with zeros."""
    # torch has no operation for it: shifts and a sum take twenty times as long
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=1, bitorder="little")).to(mask.device)


def unpack_mask(packed: UInt8[Tensor, "out bytes"], in_features: int) -> Bool[Tensor, "out in"]:
    """Undo `pack_mask`."""
    bits = np.unpackbits(packed.cpu().numpy(), axis=1, count=in_features, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_)).to(packed.device)


def keep_nonzero(weight: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """Apply a mask so that it can be read back as `weight != 0`.

    Pruned weights become 0; a kept weight that is exactly 0 becomes the smallest normal number of its dtype.
    """
    smallest = torch.finfo(weight.dtype).tiny
    return torch.where(mask, torch.where(weight == 0, smallest, weight), 0.0)


def existing_mask(weight: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"] | None:
    """The mask of the zeros that a weight already has; None for a weight that counts as dense.

    A dense weight has an exact 0 here and there by chance; up to STRAY_ZEROS of them do not count as one.
    """
    mask = weight != 0
    zeros = mask.numel() - int(mask.sum())
    return mask if zeros > STRAY_ZEROS * mask.numel() else None
