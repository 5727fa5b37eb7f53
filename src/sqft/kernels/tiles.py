"""Triton kernels of the adapted weight: built in one pass, and its masked gradient contracted tile by tile.

    build_weight        base, A, B -> W, and on a grid which weights have a gradient: 4 bytes of traffic a
                        weight in 16 bits, 4 from a latent with what has a gradient, else 3
    contract_gradient   dY, X -> dA, dB; a tile of dY^T X is masked and multiplied with the factors at once,
                        so the gradient of the weight is never written
    contract_product    the same from a dY^T X in 16 bits that the vendor's library has multiplied

A tile of the adapted weight is computed in float32 with true division and without fused multiply-add, as
`ops.adapted` defines it. Partial sums are added in a fixed order, so results do not change from run to run.
How the tiles are cut is a `Tiling`, which `kernels.choices` takes from its table for each shape.

State: checked in Triton's interpreter and compiled for sm_90; not yet run on a GPU. The interpreter
multiplies the bits of bfloat16 as whole numbers, so there (WIDEN) operands are widened to float32 first, and
no product changes.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from sqft.kernels.choices import GRADIENT_TILING, PRODUCT_TILING, WEIGHT_TILING, Tiling

__all__ = ["build_weight", "contract_gradient", "contract_product"]

STORAGE = {None: 0, torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
RANKS_AT_ONCE = 32


@triton.jit
def _spread(few, SPAN: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr):
    """One value for each group of a tile, repeated for the SPAN columns of the group."""
    wide = tl.broadcast_to(few[:, :, None], (TILE_M, TILE_N // SPAN, SPAN))
    return tl.reshape(wide, (TILE_M, TILE_N))


@triton.jit
def _weight_kernel(
    weight_ptr, keep_ptr, base_ptr, scale_ptr, zero_ptr, a_ptr, b_ptr,
    out, columns, groups, rank, a_stride, b_stride, scaling,
    GROUP: tl.constexpr, SPAN: tl.constexpr, MAX_CODE: tl.constexpr, QUANT: tl.constexpr,
    SYMMETRIC: tl.constexpr, LATENT: tl.constexpr, STORE: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr, R: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    first_column = tl.program_id(0) * TILE_N
    m = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)
    n = first_column + tl.arange(0, TILE_N)
    inside = (m[:, None] < out) & (n[None, :] < columns)
    at = m.to(tl.int64)[:, None] * columns + n[None, :]
    base = tl.load(base_ptr + at, mask=inside, other=0).to(tl.float32)
    if QUANT:
        # The grid is read once for each group of a row, or for each weight where groups and tiles do not fit.
        if SPAN:
            g = first_column // GROUP + tl.arange(0, TILE_N // SPAN)
        else:
            g = n // GROUP
        known = (m[:, None] < out) & (g[None, :] < groups)
        grid_at = m[:, None] * groups + g[None, :]
        scale = tl.load(scale_ptr + grid_at, mask=known, other=1.0)
        inverse, sixteenth = tl.div_rn(1.0, scale), scale * 0.0625
        if SYMMETRIC:
            zero = (MAX_CODE + 1) // 2 + 0.0
        else:
            zero = tl.load(zero_ptr + grid_at, mask=known, other=0).to(tl.float32)
            if SPAN:
                zero = _spread(zero, SPAN, TILE_M, TILE_N)
        if SPAN:
            scale = _spread(scale, SPAN, TILE_M, TILE_N)
            inverse = _spread(inverse, SPAN, TILE_M, TILE_N)
            sixteenth = _spread(sixteenth, SPAN, TILE_M, TILE_N)
        if LATENT:
            base = (base - (zero * 16.0 + 8.0)) * sixteenth
    keep = base != 0.0
    delta = tl.full((TILE_M, TILE_N), 0.0, dtype=tl.float32)
    for first in range(0, rank, R):
        r = first + tl.arange(0, R)
        a_mask = (r[:, None] < rank) & (n[None, :] < columns)
        b_mask = (m[:, None] < out) & (r[None, :] < rank)
        a = tl.load(a_ptr + r[:, None] * a_stride + n[None, :], mask=a_mask, other=0.0)
        b = tl.load(b_ptr + m[:, None] * b_stride + r[None, :], mask=b_mask, other=0.0)
        delta = tl.dot(b, a, acc=delta, input_precision=PRECISION)
    weight = base + tl.where(keep, delta * scaling, 0.0)
    if QUANT:
        # weight / scale, correctly rounded: a step of Newton with the rounded inverse (Markstein). Then
        # rounded half to even, by adding 1.5 * 2^23.
        quotient = weight * inverse
        quotient = tl.fma(tl.fma(-quotient, scale, weight), inverse, quotient)
        steps = (quotient + 12582912.0) - 12582912.0
        clamped = tl.minimum(tl.maximum(steps, 0.0 - zero), MAX_CODE - zero)
        keep = keep & (steps == clamped)
        weight = clamped * scale
    if STORE == 1:
        weight = weight.to(tl.bfloat16).to(tl.float32)
    if STORE == 2:
        weight = weight.to(tl.float16).to(tl.float32)
    tl.store(weight_ptr + at, weight, mask=inside)
    if KEEP:
        tl.store(keep_ptr + at, keep.to(tl.uint8), mask=inside)


@triton.jit
def _gradient_kernel(
    da_ptr, db_ptr, dy_ptr, x_ptr, product_ptr, keep_ptr, a_ptr, b_ptr,
    tokens, out, columns, rank, dy_stride, a_stride, b_stride, strips,
    MULTIPLY: tl.constexpr, WIDEN: tl.constexpr, STRIP: tl.constexpr, DEPTH: tl.constexpr,
    R: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """One tile of columns, and STRIP tiles of rows one after the other."""
    # Programs that run at the same time share rows of dY and X: BAND strips of rows, then the next columns.
    column_tiles = tl.cdiv(columns, TILE_N)
    band = tl.program_id(0) // (BAND * column_tiles)
    place = tl.program_id(0) % (BAND * column_tiles)
    height = min(strips - band * BAND, BAND)
    strip, column_tile = band * BAND + place % height, place // height
    n = column_tile * TILE_N + tl.arange(0, TILE_N)
    r = tl.arange(0, R)
    kind = product_ptr.dtype.element_ty
    wide = tl.float32 if WIDEN else kind
    a_mask = (n[:, None] < columns) & (r[None, :] < rank)
    a = tl.load(a_ptr + r[None, :] * a_stride + n[:, None], mask=a_mask, other=0.0).to(kind).to(wide)
    da = tl.full((TILE_N, R), 0.0, dtype=tl.float32)
    for tile in range(STRIP):
        m = (strip * STRIP + tile) * TILE_M + tl.arange(0, TILE_M)
        inside = (m[:, None] < out) & (n[None, :] < columns)
        at = m.to(tl.int64)[:, None] * columns + n[None, :]
        if MULTIPLY:
            product = tl.full((TILE_M, TILE_N), 0.0, dtype=tl.float32)
            for start in range(0, tokens, DEPTH):
                t = start + tl.arange(0, DEPTH)
                row = t.to(tl.int64)[:, None]
                dy_mask = (t[:, None] < tokens) & (m[None, :] < out)
                x_mask = (t[:, None] < tokens) & (n[None, :] < columns)
                dy = tl.load(dy_ptr + row * dy_stride + m[None, :], mask=dy_mask, other=0.0).to(wide)
                x = tl.load(x_ptr + row * columns + n[None, :], mask=x_mask, other=0.0).to(wide)
                product = tl.dot(tl.trans(dy), x, acc=product, input_precision="ieee")
        else:
            product = tl.load(product_ptr + at, mask=inside, other=0.0).to(tl.float32)
        keep = tl.load(keep_ptr + at, mask=inside, other=0) != 0
        gradient = tl.where(keep, product, 0.0).to(kind).to(wide)
        b_mask = (m[:, None] < out) & (r[None, :] < rank)
        b = tl.load(b_ptr + m[:, None] * b_stride + r[None, :], mask=b_mask, other=0.0).to(kind).to(wide)
        db = tl.dot(gradient, a, input_precision="ieee")
        tl.store(db_ptr + (column_tile * out + m[:, None]) * rank + r[None, :], db, mask=b_mask)
        da = tl.dot(tl.trans(gradient), b, acc=da, input_precision="ieee")
    tl.store(da_ptr + (strip * columns + n[:, None]) * rank + r[None, :], da, mask=a_mask)


def build_weight(
    base: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    max_code: int = 0,
    symmetric: bool = False,
    storage_dtype: torch.dtype | None = None,
    keep: Tensor | None = None,
    tiling: Tiling = WEIGHT_TILING,
) -> Tensor:
    """The adapted weight (out, in) in a compute dtype.

    base: (out, in), a float weight or an integer latent; lora_A (rank, in), lora_B (out, rank), float32, a
    slice of ranks is fine, or none at all; scale and zero_point (out, groups) of the grid to round to;
    storage_dtype: the 16-bit type to round to instead. keep: uint8 (out, in), set to which weights have a
    gradient.
    """
    (out, columns), rank = base.shape, lora_A.shape[0]
    weight = torch.empty(out, columns, dtype=dtype, device=base.device)
    a, b = _plain_rows(lora_A.float()), _plain_rows(lora_B.float())
    groups = 1 if scale is None else scale.shape[1]
    group = columns // groups
    s, z = (a, a) if scale is None or zero_point is None else (scale.contiguous(), zero_point.contiguous())
    grid = (triton.cdiv(columns, tiling.columns), triton.cdiv(out, tiling.rows))
    _weight_kernel[grid](
        weight, weight if keep is None else keep, base.contiguous(), s, z, a, b,
        out, columns, groups, rank, a.stride(0), b.stride(0), scaling,
        GROUP=group, SPAN=_span(group, tiling.columns), MAX_CODE=max_code, QUANT=scale is not None,
        SYMMETRIC=symmetric, LATENT=not base.is_floating_point(),
        STORE=0 if storage_dtype == dtype else STORAGE[storage_dtype], KEEP=keep is not None,
        PRECISION=tiling.precision, R=16 if rank <= 16 else RANKS_AT_ONCE,
        TILE_M=tiling.rows, TILE_N=tiling.columns,
        num_warps=tiling.warps, num_stages=tiling.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return weight


def contract_gradient(
    dy: Tensor,
    x: Tensor,
    keep: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    tiling: Tiling = GRADIENT_TILING,
) -> tuple[Tensor, Tensor]:
    """dA = scaling B^T G, dB = scaling G A^T in float32; G = mask * (dY^T X) is never stored.

    dy (tokens, out), a column slice is fine; x (tokens, in) of the same dtype; keep (out, in): a weight has a
    gradient where it is not 0. G is rounded to the dtype of x before it meets the factors. The partial sums
    take rank * (1 / (tile rows * strip) + 1 / tile columns) of the weight's elements, in float32.
    """
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    return _contract(dy, x.contiguous(), None, keep, lora_A, lora_B, scaling, tiling)


def contract_product(
    product: Tensor,
    keep: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    tiling: Tiling = PRODUCT_TILING,
) -> tuple[Tensor, Tensor]:
    """`contract_gradient` of a dY^T X that is in memory, (out, in) in the compute dtype; read once."""
    return _contract(None, None, product.contiguous(), keep, lora_A, lora_B, scaling, tiling)


def _contract(
    dy: Tensor | None,
    x: Tensor | None,
    product: Tensor | None,
    keep: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    tiling: Tiling,
) -> tuple[Tensor, Tensor]:
    (out, columns), rank, device = keep.shape, lora_A.shape[0], keep.device
    tokens = 0 if x is None else x.shape[0]
    a, b = _plain_rows(lora_A), _plain_rows(lora_B)
    strips = triton.cdiv(out, tiling.rows * tiling.strip)
    column_tiles = triton.cdiv(columns, tiling.columns)
    da = torch.empty(strips, columns, rank, device=device)
    db = torch.empty(column_tiles, out, rank, device=device)
    typed = x if product is None else product
    _gradient_kernel[(strips * column_tiles,)](
        da, db, typed if dy is None else dy, typed, typed, keep.contiguous(), a, b,
        tokens, out, columns, rank, 0 if dy is None else dy.stride(0), a.stride(0), b.stride(0), strips,
        MULTIPLY=product is None, WIDEN=device.type == "cpu", STRIP=tiling.strip, DEPTH=tiling.depth,
        R=max(16, triton.next_power_of_2(rank)), TILE_M=tiling.rows, TILE_N=tiling.columns, BAND=8,
        num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
    return da.sum(0).t().mul(scaling), db.sum(0).mul_(scaling)


def _plain_rows(matrix: Tensor) -> Tensor:
    """The matrix with rows of contiguous elements."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _span(group: int, tile_columns: int) -> int:
    """Columns of a tile that share a group, where tiles and groups fit; else 0."""
    if tile_columns % group == 0:
        return group
    return tile_columns if group % tile_columns == 0 else 0
