"""The integer grid of a quantized weight: one scale and zero point for each group of neighbours in a row.

    codes  = clamp(round(weight / scale) + zero_point, 0, 2^bits - 1)
    weight = (codes - zero_point) * scale

The zero point is an integer inside the code range, so the number 0 is on the grid and a pruned weight
stays exactly 0. Scales are rounded to few significant bits before any code is computed, so that every
runtime that stores them in 16 bits reads the very same grid.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from sqft.errors import CompressionError

__all__ = [
    "GridSpec",
    "QParams",
    "QuantizedWeight",
    "compute_qparams",
    "dequantize",
    "fake_quantize",
    "quantize",
    "round_scale",
    "round_significant",
]

SMALLEST_SCALE = 2.0**-14  # the smallest normal float16, in which GGUF and most runtimes keep scales


@dataclass(frozen=True)
class GridSpec:
    """What a grid is, before it has numbers: all quantized weights of one checkpoint share it.

    bits: 2, 3, 4 or 8. group_size: columns that share a scale; -1 is one group a row. symmetric: every zero
    point is 2^(bits-1). scale_bits: significant bits of a scale. stored_dtype: the dtype of the scales in a
    file that was read; None: the smallest one from which every runtime reads them exactly.
    """

    bits: int
    group_size: int
    symmetric: bool
    scale_bits: int = 8
    stored_dtype: torch.dtype | None = None

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype that scales are stored in. Asymmetric grids take float32 (`models.packing` says why)."""
        if self.stored_dtype is not None:
            return self.stored_dtype
        if not self.symmetric:
            return torch.float32
        return torch.bfloat16 if self.scale_bits <= 8 else torch.float16

    @property
    def layout(self) -> tuple[int, int, bool]:
        """What the weights of one file must share: bits, group size and symmetry."""
        return self.bits, self.group_size, self.symmetric

    def group_width(self, columns: int) -> int:
        """Columns of a group in a weight of so many columns.

        Raises: CompressionError if the group size does not divide them.
        """
        size = columns if self.group_size == -1 else self.group_size
        if columns % size:
            raise CompressionError(
                f"group size {size} does not divide the width {columns}; choose one that does"
            )
        return size


@dataclass(frozen=True)
class QParams:
    """The numbers of the grid of one weight.

    scale (out, groups) float32, already rounded to what is stored; zero_point (out, groups) uint8, the true
    integer in 0..2^bits-1; bits 2, 3, 4 or 8; symmetric: every zero point is 2^(bits-1).
    """

    scale: Float[Tensor, "out groups"]
    zero_point: UInt8[Tensor, "out groups"]
    bits: int
    symmetric: bool

    @property
    def max_code(self) -> int:
        """The largest code, 2^bits - 1."""
        return (1 << self.bits) - 1

    def group_size(self, in_features: int) -> int:
        """Columns that share a scale, for a weight of this width."""
        return in_features // self.scale.shape[1]

    def to(self, device: torch.device | str) -> "QParams":
        """The same grid on another device."""
        return QParams(self.scale.to(device), self.zero_point.to(device), self.bits, self.symmetric)


@dataclass(frozen=True)
class QuantizedWeight:
    """The codes of a weight, and the numbers of their grid."""

    codes: UInt8[Tensor, "out in"]
    qparams: QParams

    def dequantize(self) -> Float[Tensor, "out in"]:
        """The float32 weight."""
        return dequantize(self.codes, self.qparams)

    def grid(self, like: GridSpec | None = None) -> GridSpec:
        """The grid that the weight is on, with 8 or 11 bits of scale, whichever holds its scales.

        A single group a row counts as group size -1, unless the groups of `like` are of that width.
        """
        qparams, columns = self.qparams, self.codes.shape[1]
        size = qparams.group_size(columns)
        exact = torch.equal(qparams.scale.bfloat16().float(), qparams.scale)
        rowwise = size == columns and not (like and like.group_size == size)
        return GridSpec(qparams.bits, -1 if rowwise else size, qparams.symmetric, 8 if exact else 11)


def round_scale(scale: Tensor, scale_bits: int) -> Tensor:
    """Round to `scale_bits` significant bits, and up to the smallest normal float16."""
    return round_significant(scale, scale_bits).clamp_min(SMALLEST_SCALE)


def round_significant(values: Tensor, bits: int) -> Tensor:
    """The nearest float32 numbers of so many significant bits, ties to even."""
    mantissa, exponent = torch.frexp(values.float())
    steps = 2.0**bits
    return torch.ldexp(torch.round(mantissa * steps) / steps, exponent)


def compute_qparams(weight: Float[Tensor, "out in"], grid: GridSpec) -> QParams:
    """The grid that just covers every group of a weight.

    symmetric: scale = max|w| / (2^(bits-1) - 1); asymmetric: the range, extended to hold 0, over 2^bits - 1.
    With 8 significant bits, the weights of a 4-bit symmetric grid are exact in float16 and its scales in
    bfloat16; 7 bits make an asymmetric grid exact in GGUF's Q4_1.

    Raises: CompressionError if group_size does not divide the width.
    """
    bits = grid.bits
    groups = weight.float().unflatten(1, (-1, grid.group_width(weight.shape[1])))
    if grid.symmetric:
        scale = round_scale(groups.abs().amax(-1) / (2 ** (bits - 1) - 1), grid.scale_bits)
        zero_point = torch.full_like(scale, 2 ** (bits - 1))
    else:
        low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
        scale = round_scale((high - low) / (2**bits - 1), grid.scale_bits)
        zero_point = torch.round(-low / scale).clamp(0, 2**bits - 1)
    return QParams(scale, zero_point.to(torch.uint8), bits, grid.symmetric)


def quantize(weight: Float[Tensor, "out in"], qparams: QParams) -> UInt8[Tensor, "out in"]:
    """The codes of a weight: clamp(round(weight / scale) + zero_point, 0, 2^bits - 1)."""
    codes = _unclamped_codes(weight, qparams.scale, qparams.zero_point)
    return codes.clamp_(0, qparams.max_code).flatten(1).to(torch.uint8)


def dequantize(codes: UInt8[Tensor, "out in"], qparams: QParams) -> Float[Tensor, "out in"]:
    """The float32 weight of codes: (codes - zero_point) * scale."""
    steps = codes.unflatten(1, (qparams.scale.shape[1], -1)).float() - qparams.zero_point[..., None].float()
    return (steps * qparams.scale[..., None]).flatten(1)


def fake_quantize(
    weight: Float[Tensor, "out in"], qparams: QParams, scale: Float[Tensor, "out groups"] | None = None
) -> Float[Tensor, "out in"]:
    """The codes of a weight times a scale, differentiable in the weight and that scale.

    scale: what the codes are multiplied with, where it is trained; None: that of the grid, which makes it
    dequantize(quantize(weight)). The value is the hard one, bit for bit. The gradient passes straight through
    the rounding, times scale / qparams.scale, and is 0 where the code was clamped; the scale's is
    sum(gradient * (codes - zero_point)) over its group.
    """
    trained = qparams.scale if scale is None else scale
    out: Tensor = _FakeQuantize.apply(weight, trained, qparams.scale, qparams.zero_point, qparams.max_code)
    return out


def _unclamped_codes(weight: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """(out, groups, group_size) float32."""
    groups = weight.float().unflatten(1, (scale.shape[1], -1))
    return torch.round(groups / scale[..., None]) + zero_point[..., None].float()


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor, step: Tensor, zero_point: Tensor, max_code: int
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, step, zero_point)
        ctx.max_code = max_code
        codes = _unclamped_codes(weight, step, zero_point).clamp_(0, max_code)
        return ((codes - zero_point[..., None].float()) * scale[..., None]).flatten(1)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        weight, scale, step, zero_point = ctx.saved_tensors
        unclamped = _unclamped_codes(weight, step, zero_point)
        inside = (unclamped >= 0) & (unclamped <= ctx.max_code)
        grad = grad_output.unflatten(1, (scale.shape[1], -1))
        grad_scale = None
        if ctx.needs_input_grad[1]:
            steps = unclamped.clamp(0, ctx.max_code) - zero_point[..., None].float()
            grad_scale = (grad * steps).sum(-1)
        grad_weight = grad * inside * (scale / step)[..., None]
        return grad_weight.flatten(1).to(weight.dtype), grad_scale, None, None, None
