"""Codes packed into bytes, for a frozen base in memory: half a byte a weight at 4 and 3 bits.

A byte holds 8 / width codes, where width is 2, 4 or 8 bits (3-bit codes take 4). The codes of a row are cut
into as many planes of equal length, and plane p lies in the bits [p * width, (p + 1) * width): unpacking
writes whole stretches of a row, which the vector units of any processor do at the speed of memory. On disk
codes lie in the order of compressed-tensors (`models.packing`).
"""

import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from sqft.ops.grid import QParams

__all__ = ["code_steps", "pack_codes", "unpack_codes"]


def pack_codes(codes: UInt8[Tensor, "out in"], bits: int) -> UInt8[Tensor, "out bytes"]:
    """Codes 0..2^bits-1 in ceil(in / codes a byte) bytes a row; the last plane is filled up with code 0."""
    width = _width(bits)
    planes = 8 // width
    rows, columns = codes.shape
    length = -(-columns // planes)
    packed = torch.zeros(rows, length, dtype=torch.uint8, device=codes.device)
    for plane in range(planes):
        part = codes[:, plane * length : (plane + 1) * length]
        packed[:, : part.shape[1]] |= part << (plane * width)
    return packed


def unpack_codes(packed: UInt8[Tensor, "out bytes"], bits: int, columns: int) -> UInt8[Tensor, "out in"]:
    """Undo `pack_codes`; columns: the number of codes in a row."""
    codes = torch.empty(packed.shape[0], columns, dtype=torch.uint8, device=packed.device)
    _unpack_into(codes, packed, bits)
    return codes


def code_steps(
    stored: Integer[Tensor, "out stored"],
    qparams: QParams,
    out: Float[Tensor, "out in"],
    *,
    latent: bool = False,
) -> Float[Tensor, "out in"]:
    """codes - zero_point as float32, written into `out`; times the scale it is the weight.

    stored and qparams: of the same rows. stored: packed codes, or with latent=True those of `ops.latent`.
    """
    if latent:
        out.copy_(stored >> 4)
    else:
        _unpack_into(out, stored, qparams.bits)
    if qparams.symmetric:
        return out.sub_(1 << (qparams.bits - 1))
    out.unflatten(1, (qparams.zero_point.shape[1], -1)).sub_(qparams.zero_point[..., None].float())
    return out


def _unpack_into(target: Tensor, packed: Tensor, bits: int) -> None:
    width = _width(bits)
    planes, length, columns = 8 // width, packed.shape[1], target.shape[1]
    for plane in range(planes):
        part = target[:, plane * length : (plane + 1) * length]
        codes = packed[:, : min(length, columns - plane * length)]
        if plane:
            codes = codes >> (plane * width)
        if plane < planes - 1:
            codes = codes & ((1 << width) - 1)
        part.copy_(codes)


def _width(bits: int) -> int:
    """The bits that a code takes: the smallest of 2, 4 and 8 that holds it, so that codes fill a byte."""
    return next(width for width in (2, 4, 8) if width >= bits)
