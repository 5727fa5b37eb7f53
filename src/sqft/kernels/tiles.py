"""Triton kernels of the adapted weight: built tile by tile, and its masked gradient contracted tile by tile.

Both compute a tile of the adapted weight in registers from the base and the two low-rank factors, in float32
with IEEE products, true division and no fused multiply-add, as `ops.adapted` defines it. The gradient kernel
forms a tile of dY^T X, masks it, and multiplies it with the factors at once: the dense gradient is never
written. Partial sums are added in a fixed order, so results do not change from run to run.

State: checked in Triton's interpreter; not yet run on a GPU. The interpreter multiplies the bits of bfloat16
as whole numbers, so there (WIDEN) operands are widened to float32 first, which changes no product.
"""

# mypy: disable-error-code="untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["build_weight", "contract_gradient"]

TILE = 64
STORAGE = {None: 0, torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@triton.jit
def _factors(a_ptr, b_ptr, m, n, out, columns, rank, b_stride, R: tl.constexpr):  # type: ignore[no-untyped-def]
    r = tl.arange(0, R)
    a_mask = (r[:, None] < rank) & (n[None, :] < columns)
    b_mask = (m[:, None] < out) & (r[None, :] < rank)
    a = tl.load(a_ptr + r[:, None] * columns + n[None, :], mask=a_mask, other=0.0)
    b = tl.load(b_ptr + m[:, None] * b_stride + r[None, :], mask=b_mask, other=0.0)
    return a, b


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    base_ptr, scale_ptr, zero_ptr, a, b, m, n, out, columns, groups, scaling,
    GROUP: tl.constexpr, MAX_CODE: tl.constexpr, QUANT: tl.constexpr, LATENT: tl.constexpr,
    STORE: tl.constexpr,
):  # fmt: skip
    """A tile of the adapted weight, and which of its weights have a gradient."""
    inside = (m[:, None] < out) & (n[None, :] < columns)
    base = tl.load(base_ptr + m[:, None] * columns + n[None, :], mask=inside, other=0).to(tl.float32)
    if QUANT:
        at = m[:, None] * groups + n[None, :] // GROUP
        scale = tl.load(scale_ptr + at, mask=inside, other=1.0)
        zero = tl.load(zero_ptr + at, mask=inside, other=0).to(tl.float32)
        if LATENT:
            base = ((base - 8.0) * 0.0625 - zero) * scale
    keep = inside & (base != 0.0)
    delta = tl.dot(b, a, input_precision="ieee") * scaling
    weight = base + tl.where(keep, delta, 0.0)
    if QUANT:
        # Rounding half to even by adding 1.5 * 2^23, after a clamp one step wider than the codes.
        steps = tl.minimum(tl.maximum(tl.div_rn(weight, scale), -zero - 1.0), MAX_CODE - zero + 1.0)
        steps = (steps + 12582912.0) - 12582912.0
        low, high = -zero, MAX_CODE - zero
        keep = keep & (steps >= low) & (steps <= high)
        weight = tl.minimum(tl.maximum(steps, low), high) * scale
    if STORE == 1:
        weight = weight.to(tl.bfloat16).to(tl.float32)
    if STORE == 2:
        weight = weight.to(tl.float16).to(tl.float32)
    return weight, keep


@triton.jit
def _weight_kernel(  # type: ignore[no-untyped-def]
    weight_ptr, base_ptr, scale_ptr, zero_ptr, a_ptr, b_ptr, out, columns, groups, rank, b_stride, scaling,
    GROUP: tl.constexpr, MAX_CODE: tl.constexpr, QUANT: tl.constexpr, LATENT: tl.constexpr,
    STORE: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * TILE + tl.arange(0, TILE)
    n = tl.program_id(1) * TILE + tl.arange(0, TILE)
    a, b = _factors(a_ptr, b_ptr, m, n, out, columns, rank, b_stride, R)
    weight, _ = _tile(base_ptr, scale_ptr, zero_ptr, a, b, m, n, out, columns, groups, scaling,
                      GROUP, MAX_CODE, QUANT, LATENT, STORE)  # fmt: skip
    inside = (m[:, None] < out) & (n[None, :] < columns)
    tl.store(weight_ptr + m[:, None] * columns + n[None, :], weight, mask=inside)


@triton.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    da_ptr, db_ptr, dy_ptr, x_ptr, base_ptr, scale_ptr, zero_ptr, a_ptr, b_ptr,
    tokens, out, columns, groups, rank, dy_stride, b_stride, scaling,
    GROUP: tl.constexpr, MAX_CODE: tl.constexpr, QUANT: tl.constexpr, LATENT: tl.constexpr,
    STORE: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * TILE + tl.arange(0, TILE)
    n = tl.program_id(1) * TILE + tl.arange(0, TILE)
    gradient = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, tokens, TILE):
        t = start + tl.arange(0, TILE)
        dy_mask = (m[:, None] < out) & (t[None, :] < tokens)
        x_mask = (t[:, None] < tokens) & (n[None, :] < columns)
        dy = tl.load(dy_ptr + t[None, :] * dy_stride + m[:, None], mask=dy_mask, other=0.0)
        x = tl.load(x_ptr + t[:, None] * columns + n[None, :], mask=x_mask, other=0.0)
        if WIDEN:
            dy, x = dy.to(tl.float32), x.to(tl.float32)
        gradient += tl.dot(dy, x, input_precision="ieee")
    a, b = _factors(a_ptr, b_ptr, m, n, out, columns, rank, b_stride, R)
    _, keep = _tile(base_ptr, scale_ptr, zero_ptr, a, b, m, n, out, columns, groups, scaling,
                    GROUP, MAX_CODE, QUANT, LATENT, STORE)  # fmt: skip
    gradient = tl.where(keep, gradient, 0.0)
    r = tl.arange(0, R)
    da = tl.dot(tl.trans(b), gradient, input_precision="ieee") * scaling
    db = tl.dot(gradient, tl.trans(a), input_precision="ieee") * scaling
    da_at = (tl.program_id(0) * rank + r[:, None]) * columns + n[None, :]
    db_at = (tl.program_id(1) * out + m[:, None]) * rank + r[None, :]
    tl.store(da_ptr + da_at, da, mask=(r[:, None] < rank) & (n[None, :] < columns))
    tl.store(db_ptr + db_at, db, mask=(m[:, None] < out) & (r[None, :] < rank))


def _settings(
    base: Tensor, scale: Tensor | None, rank: int, max_code: int, storage: torch.dtype | None
) -> dict[str, Any]:
    groups = 1 if scale is None else scale.shape[1]
    return {
        "GROUP": base.shape[1] // groups,
        "MAX_CODE": max_code,
        "QUANT": scale is not None,
        "LATENT": not base.is_floating_point(),
        "STORE": STORAGE[storage],
        "R": max(16, triton.next_power_of_2(rank)),
        "TILE": TILE,
        "enable_fp_fusion": False,
    }


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
    storage_dtype: torch.dtype | None = None,
) -> Tensor:
    """The adapted weight (out, in) in a compute dtype.

    base: (out, in), a float weight or an integer latent; lora_A (rank, in), lora_B (out, rank); scale and
    zero_point (out, groups) of the grid to round to; storage_dtype: the 16-bit type to round to instead.
    """
    (out, columns), rank = base.shape, lora_A.shape[0]
    weight = torch.empty(out, columns, dtype=dtype, device=base.device)
    a, b = lora_A.float().contiguous(), lora_B.float().contiguous()
    grid = (triton.cdiv(out, TILE), triton.cdiv(columns, TILE))
    s, z = (a, a) if scale is None or zero_point is None else (scale.contiguous(), zero_point.contiguous())
    groups = 1 if scale is None else scale.shape[1]
    settings = _settings(base, scale, rank, max_code, storage_dtype)
    _weight_kernel[grid](
        weight, base.contiguous(), s, z, a, b, out, columns, groups, rank, b.stride(0), scaling, **settings
    )
    return weight


def contract_gradient(
    dy: Tensor,
    x: Tensor,
    base: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    max_code: int = 0,
) -> tuple[Tensor, Tensor]:
    """dA = scaling B^T G, dB = scaling G A^T in float32; G = mask * unclamped * (dY^T X) is never stored.

    dy (tokens, out), a column slice is fine; x (tokens, in); the rest as in `build_weight`. The partial sums
    take rank / TILE of the base's elements twice, in float32.
    """
    (out, columns), rank = base.shape, lora_A.shape[0]
    a, b = lora_A.float().contiguous(), lora_B.float().contiguous()
    grid = (triton.cdiv(out, TILE), triton.cdiv(columns, TILE))
    da = torch.empty(grid[0], rank, columns, device=base.device)
    db = torch.empty(grid[1], out, rank, device=base.device)
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    s, z = (a, a) if scale is None or zero_point is None else (scale.contiguous(), zero_point.contiguous())
    groups = 1 if scale is None else scale.shape[1]
    settings = _settings(base, scale, rank, max_code, None)
    _gradient_kernel[grid](
        da, db, dy, x.contiguous(), base.contiguous(), s, z, a, b,
        x.shape[0], out, columns, groups, rank, dy.stride(0), b.stride(0), scaling,
        WIDEN=base.device.type == "cpu", **settings,
    )  # fmt: skip
    return da.sum(0), db.sum(0)
