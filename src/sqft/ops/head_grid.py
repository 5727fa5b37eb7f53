"""Embedding and output head on a grid of 8 bits, held in an ordinary float16 tensor.

    scale  = max|w| / 127 of 32 neighbours in a row, rounded up to 4 significant bits
    weight = round(w / scale) * scale                            (`ops.grid`, symmetric)

A step has 7 bits and a sign and its scale 4 bits, so their product has at most 11, as many as float16: the
rounded weight is stored as it always was, and whatever opens the model computes with the very same numbers.
A format with blocks of 8 bits reads the steps off the values: the scale is the largest number of which
all 32 are whole multiples, whichever scale they were made with.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sqft.errors import CompressionError
from sqft.ops.grid import SMALLEST_SCALE, QParams, QuantizedWeight, dequantize, fake_quantize

__all__ = ["HEAD_GROUP", "head_codes", "head_qparams", "head_weight", "round_head"]

HEAD_GROUP = 32  # as in GGUF's Q8_0
BITS = 8
LARGEST = 127
SCALE_BITS = 4
TINIEST = 2.0**-24  # the smallest positive float16: all others are multiples of it
FIRST = 16
ROWS = 8192  # looked at together: the whole numbers behind float16 take four times its memory


def round_head(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """The nearest weight on the grid, float16.

    Raises: CompressionError if a weight is beyond float16.
    """
    rounded = torch.cat([_round_rows(rows) for rows in weight.split(ROWS)])
    if not bool(rounded.isfinite().all()):
        raise CompressionError("quantize.head: the embedding or head has weights beyond float16's 65504")
    return rounded


def head_codes(weight: Float[Tensor, "..."]) -> QuantizedWeight | None:
    """Codes and a grid whose weights are these very values, steps of at most 127; None if there are none."""
    if weight.ndim != 2 or weight.dtype != torch.float16 or weight.shape[1] % HEAD_GROUP:
        return None
    if _codes_of_rows(weight[:FIRST]) is None:  # as of nearly every weight that was not put on a grid
        return None
    parts = []
    for rows in weight.split(ROWS):
        found = _codes_of_rows(rows)
        if found is None:
            return None
        parts.append(found)
    codes, scale = (torch.cat(part) for part in zip(*parts, strict=True))
    return QuantizedWeight(codes, head_qparams(scale))


def head_qparams(scale: Float[Tensor, "out groups"]) -> QParams:
    """The grid of 8 bits with these scales."""
    middle = torch.full(scale.shape, 1 << (BITS - 1), dtype=torch.uint8, device=scale.device)
    return QParams(scale.float(), middle, BITS, symmetric=True)


def head_weight(weight: QuantizedWeight) -> Float[Tensor, "out in"]:
    """Undo `head_codes`: the float16 weight."""
    parts = zip(weight.codes.split(ROWS), weight.qparams.scale.split(ROWS), strict=True)
    return torch.cat([dequantize(codes, head_qparams(scale)).half() for codes, scale in parts])


def _round_rows(weight: Tensor) -> Tensor:
    covering = weight.float().unflatten(1, (-1, HEAD_GROUP)).abs().amax(-1) / LARGEST
    mantissa, exponent = torch.frexp(covering)
    scale = torch.ldexp(torch.ceil(mantissa * 2**SCALE_BITS) / 2**SCALE_BITS, exponent)
    return fake_quantize(weight, head_qparams(scale.clamp_min(SMALLEST_SCALE))).half()


def _codes_of_rows(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    if not bool(weight.isfinite().all()):
        return None
    multiples = (weight.double() / TINIEST).long().unflatten(1, (-1, HEAD_GROUP))
    unit = multiples.abs()
    while unit.shape[-1] > 1:
        half = unit.shape[-1] // 2
        unit = torch.gcd(unit[..., :half], unit[..., half:])
    unit = unit.clamp_min(1)  # of a group of zeros any will do
    steps = multiples // unit
    if int(steps.abs().max()) > LARGEST:
        return None
    codes = (steps + (1 << (BITS - 1))).flatten(1).to(torch.uint8)
    scale = (unit.double() * TINIEST).squeeze(-1).float()
    same = torch.equal(
        dequantize(codes, head_qparams(scale)).half().view(torch.int16), weight.view(torch.int16)
    )
    return (codes, scale) if same else None  # a zero with a sign has no code
