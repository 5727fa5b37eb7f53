"""Masks in a pattern: chosen from scores, found again, and which swaps of two weights stay inside one.

A pattern (`sqft.patterns`) is a property of the mask: it is chosen when pruning and kept to the end.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sqft.errors import CompressionError
from sqft.patterns import Pattern

__all__ = ["allowed_swaps", "find_pattern", "fits_pattern", "mask_pattern", "parse_pattern"]

AT_ONCE = 1 << 20  # scores; choosing takes some bytes for each
# What `find_pattern` looks for, beside N:M of these blocks: windows of 32 columns, narrow ones first.
BLOCKS = (2, 4, 8, 16, 32)
WINDOWS = {16: ((2,), (3,)), 12: ((3, 3, 2),)}


def parse_pattern(pattern: str) -> Pattern:
    """Read a pattern's name. Raises: CompressionError for what is none."""
    try:
        return Pattern.parse(pattern)
    except ValueError as error:
        raise CompressionError(f"pattern '{pattern}': {error}") from None


def mask_pattern(scores: Float[Tensor, "out in"], pattern: str) -> Bool[Tensor, "out in"]:
    """The mask in a pattern that keeps the highest scores.

    N:M keeps the N highest of every M neighbours in a row. With windows, of all masks in the pattern the one
    with the largest sum of squared scores is taken: a score is the root of the error that pruning makes.

    Raises: CompressionError if M does not divide the number of columns.
    """
    form = parse_pattern(pattern)
    if scores.shape[1] % form.block:
        raise CompressionError(
            f"pattern {pattern} does not fit a width of {scores.shape[1]}: {form.block} does not divide it"
        )
    mask = torch.empty_like(scores, dtype=torch.bool)
    choose = _keep_in_windows if form.window_bits else _keep_highest
    for rows, blocks in _in_parts(scores, form.block):
        mask[rows] = choose(blocks.flatten(0, 1), form).view(blocks.shape).flatten(1)
    return mask


def find_pattern(mask: Bool[Tensor, "out in"]) -> str | None:
    """The pattern of least M up to 32 of which a mask keeps exactly N in every M neighbours, if there is one.

    Of a mask that is 16:32 or 12:32 and nothing narrower, the windows that it fits are told as well.
    """
    for block in BLOCKS:
        if mask.shape[1] % block or not mask.numel():
            return None
        counts = mask.unflatten(1, (-1, block)).sum(-1, dtype=torch.uint8)
        kept = int(counts[0, 0])
        if 0 < kept < block and bool((counts == kept).all()):
            plain = Pattern(kept, block)
            windows = WINDOWS.get(kept, ()) if block == 32 else ()
            forms = [Pattern(kept, block, bits) for bits in windows]
            return str(next((form for form in forms if fits_pattern(mask, str(form))), plain))
    return None


def fits_pattern(mask: Bool[Tensor, "out in"], pattern: str) -> bool:
    """Whether a mask keeps exactly N in every M neighbours, each in its window if there are windows."""
    form = parse_pattern(pattern)
    if mask.shape[1] % form.block:
        return False
    for _, blocks in _in_parts(mask, form.block):
        if not bool((blocks.sum(-1) == form.kept).all()):
            return False
        if form.window_bits and not bool(_fits_window(blocks, form, 0)[blocks].all()):
            return False
    return True


def allowed_swaps(mask: Bool[Tensor, "out in"], form: Pattern) -> Bool[Tensor, "out blocks m m"] | None:
    """Which pairs [take, drop] of a block's columns can be swapped without leaving the pattern.

    Taking p back in place of q moves every kept weight between them one place on (or back), so those must fit
    the next (or last) window as well. Whether p is pruned and q kept is not looked at. None without windows:
    any pair of a block will do.
    """
    if not form.window_bits:
        return None
    blocks = mask.unflatten(1, (-1, form.block))
    column = torch.arange(form.block, device=mask.device)
    # Kept weights that cannot move on, or back, up to each column: none of them may stand in between.
    no_next = blocks & ~_fits_window(blocks, form, 1)
    no_last = blocks & ~_fits_window(blocks, form, -1)
    on, back = (stuck.cumsum(-1, dtype=torch.int16) for stuck in (no_next, no_last))
    # p < q: p takes the place counted at p, those between go one place on.
    forward = (on - no_next.to(torch.int16))[..., None, :] == on[..., :, None]
    forward &= _fits_window(blocks, form, 0)[..., :, None]
    # p > q: those between go one place back, p takes the place before the one counted at p.
    backward = back[..., None, :] == back[..., :, None]
    backward &= _fits_window(blocks, form, -1)[..., :, None]
    return torch.where(column[:, None] < column[None, :], forward, backward)


def _in_parts(values: Tensor, block: int) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time: which, and their values as (rows, blocks, M)."""
    step = max(1, AT_ONCE // max(values.shape[1], 1))
    for start in range(0, values.shape[0], step):
        rows = slice(start, start + step)
        yield rows, values[rows].unflatten(1, (-1, block))


def _keep_highest(blocks: Tensor, form: Pattern) -> Tensor:
    order = torch.argsort(blocks, dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(blocks, dtype=torch.bool)
    return kept.scatter_(-1, order[..., : form.kept], True)


def _keep_in_windows(blocks: Tensor, form: Pattern) -> Tensor:
    """Dynamic programming over the kept weights in order, all blocks at once.

    best[j][o] = the largest sum of j + 1 weights, the last of them at offset o of window j; each goes on from
    the best sum before it that ends left of its own column.
    """
    energy = blocks.double().square()
    none = -torch.inf
    windows = [slice(start, start + width) for start, width in zip(form.starts, form.widths, strict=True)]
    best = energy[:, windows[0]]
    origins = []
    for before, window in pairwise(windows):
        prefix, at = best.cummax(dim=1)
        columns = torch.arange(window.start, window.stop, device=blocks.device)
        last = (columns - 1 - before.start).clamp_max(best.shape[1] - 1)
        reachable = last >= 0
        last = last.clamp_min(0)
        best = energy[:, window] + torch.where(reachable, prefix[:, last], none)
        origins.append(at[:, last])
    offset = best.argmax(dim=1, keepdim=True)
    kept = torch.zeros_like(blocks, dtype=torch.bool)
    for j in range(form.kept - 1, -1, -1):
        kept.scatter_(1, offset + windows[j].start, True)
        if j:
            offset = origins[j - 1].gather(1, offset)
    return kept


def _fits_window(blocks: Tensor, form: Pattern, shift: int) -> Tensor:
    """(…, M) bool: whether each column lies in the window of its place, moved by `shift`.

    A column's place is the number of kept columns before it in its block.
    """
    starts = torch.tensor(form.starts, device=blocks.device)
    ends = starts + torch.tensor(form.widths, device=blocks.device)
    place = blocks.cumsum(-1) - blocks.long() + shift
    inside = place.clamp(0, form.kept - 1)
    column = torch.arange(form.block, device=blocks.device)
    return (place == inside) & (column >= starts[inside]) & (column < ends[inside])
