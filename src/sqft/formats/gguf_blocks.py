"""Integer weights as GGUF blocks of 32: which type holds a grid exactly, and packing it.

    Q4_0  weight = (q - 8) * d          q 4 bits,  d float16
    Q4_1  weight = q * d + m            q 4 bits,  d, m float16; exact where m = -zero_point * d is
    Q8_0  weight = q * d                q int8,    d float16

A group of 64 or 128 is two or four blocks with the same scale. Steps (code - zero point) of -8..7 fit Q4_0
whatever the zero point is; those of an asymmetric 4-bit grid fit Q4_1, or else Q8_0 at twice the bytes.
Source: ggml, `ggml-common.h` and `ggml-quants.c`.
"""

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from sqft.errors import ExportError
from sqft.formats.weights import IntegerWeight
from sqft.ops import QuantizedWeight

__all__ = ["BLOCK", "Q4_0", "Q4_1", "Q8_0", "choose_block_type", "pack_blocks", "unpack_blocks"]

BLOCK = 32
Q4_0, Q4_1, Q8_0 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0

Bytes = NDArray[np.uint8]


def choose_block_type(weight: QuantizedWeight) -> GGMLQuantizationType | None:
    """The smallest type that holds a weight exactly; None if there is none.

    The type depends on the grid, not on which codes happen to be used, but for Q4_1, where every minimum
    must be exact in float16.
    """
    qparams, columns = weight.qparams, weight.codes.shape[1]
    scale = qparams.scale.numpy()
    if qparams.group_size(columns) % BLOCK or not _exact(scale):
        return None
    zero_point = qparams.zero_point.numpy().astype(np.int32)
    low, high = -int(zero_point.max()), qparams.max_code - int(zero_point.min())
    if low >= -8 and high <= 7:
        return Q4_0
    if qparams.bits == 4 and _exact(-zero_point * scale):
        return Q4_1
    return Q8_0 if low >= -128 and high <= 127 else None


def pack_blocks(weight: QuantizedWeight, kind: GGMLQuantizationType) -> Bytes:
    """(out, bytes of a row): the weight as blocks of `kind`."""
    integers = IntegerWeight.of(weight)
    rows, columns = integers.steps.shape
    repeats = integers.group_size // BLOCK
    scale = integers.scale.repeat(repeats, axis=1)
    blocks = integers.steps.reshape(rows, columns // BLOCK, BLOCK)
    if kind == Q8_0:
        parts = [_half(scale), blocks.astype(np.int8).view(np.uint8)]
    elif kind == Q4_0:
        parts = [_half(scale), _nibbles((blocks + 8).astype(np.uint8))]
    else:
        zero_point = weight.qparams.zero_point.numpy().astype(np.int16).repeat(repeats, axis=1)
        codes = (blocks + zero_point[..., None]).astype(np.uint8)
        parts = [_half(scale), _half(-zero_point * scale), _nibbles(codes)]
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def unpack_blocks(data: Bytes, kind: GGMLQuantizationType) -> IntegerWeight:
    """Undo `pack_blocks`; for Q4_1 the zero point is -m / d.

    Raises: ExportError if a minimum of Q4_1 is not a whole number of steps, so that it is not a zero point.
    """
    sizes = {Q4_0: 18, Q4_1: 20, Q8_0: 34}
    rows = len(data)
    blocks = np.ascontiguousarray(data).reshape(rows, -1, sizes[kind])
    scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].astype(np.float32)
    if kind == Q8_0:
        steps = blocks[..., 2:].view(np.int8).astype(np.int16)
    elif kind == Q4_0:
        steps = _from_nibbles(blocks[..., 2:]) - 8
    else:
        minimum = np.ascontiguousarray(blocks[..., 2:4]).view(np.float16)[..., 0].astype(np.float32)
        with np.errstate(all="ignore"):  # damaged numbers are refused below
            offset = np.rint(minimum / scale)
            broken = int((~(offset * scale == minimum)).sum())
        if broken:
            raise ExportError(f"the minimum of {broken} blocks of Q4_1 is not a whole number of steps")
        steps = _from_nibbles(blocks[..., 4:]) + offset.astype(np.int16)[..., None]
    return IntegerWeight(steps.reshape(rows, -1).astype(np.int16), scale)


def _exact(values: NDArray[np.floating]) -> bool:
    values = values.astype(np.float32)
    with np.errstate(over="ignore"):
        return bool((values.astype(np.float16).astype(np.float32) == values).all())


def _half(values: NDArray[np.floating]) -> Bytes:
    return values.astype(np.float16)[..., None].view(np.uint8)


def _nibbles(codes: Bytes) -> Bytes:
    """The first sixteen codes of a block in the low nibbles, the last sixteen in the high ones."""
    return (codes[..., :16] | (codes[..., 16:] << 4)).astype(np.uint8)


def _from_nibbles(packed: Bytes) -> NDArray[np.int16]:
    return np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.int16)
