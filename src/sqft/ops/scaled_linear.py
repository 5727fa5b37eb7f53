"""The linear layer whose group scales are trained and whose codes are frozen.

    y = x W^T + bias,   W[o, i] = (codes[o, i] - zero_point[o, g(i)]) * scale[o, g(i)]
    dscale[o, g] = sum over i in group g of (dY^T x)[o, i] * (codes[o, i] - zero_point[o, g])
    dX = dY W

`ops.grid.dequantize` is the definition, differentiable in the scale; here the weight is built from packed
codes block by block, and backward keeps x, the packed codes and the scale: nothing the size of a weight
stays between the passes. The gradient of W is formed in the blocks of `ops.weight_blocks` and summed at once.

Source: PEQA, arXiv 2305.14152, equation 2 (only the scales are trained); EfficientQAT, arXiv 2407.11062,
section 3.3.
Differs from the papers: the scale is rounded to what is stored in every forward pass, by `rounded_scale`.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.autograd.function import once_differentiable

from sqft.ops.adapted import exact_float32
from sqft.ops.grid import QParams
from sqft.ops.packed import code_steps
from sqft.ops.weight_blocks import cache_blocks, transient_blocks

__all__ = ["scaled_linear"]


def scaled_linear(
    x: Float[Tensor, "*batch in"],
    packed: UInt8[Tensor, "out bytes"],
    qparams: QParams,
    bias: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "*batch out"]:
    """Multiply with the weight of packed codes; differentiable in x, the scale of the grid, and the bias.

    packed: as `ops.packed.pack_codes` gives it. The product runs in the dtype of x, or in the autocast dtype;
    the weight is computed in float32 whatever that is.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    grid = replace(qparams, scale=qparams.scale.detach())
    out: Tensor = _ScaledLinear.apply(x, packed, qparams.scale, qparams.zero_point, bias, grid, dtype)
    return out


class _ScaledLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bias: Tensor | None,
        grid: QParams,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x, packed, scale, zero_point)
        ctx.bits, ctx.symmetric, ctx.dtype = grid.bits, grid.symmetric, dtype
        with exact_float32(x.device):
            weight = _build(packed, grid, slice(0, len(packed)), x.shape[-1], dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, packed, scale, zero_point = ctx.saved_tensors
        needs_x, _, needs_scale, _, needs_bias = ctx.needs_input_grad[:5]
        rows, columns = len(packed), x.shape[-1]
        grid = QParams(scale, zero_point, ctx.bits, ctx.symmetric)
        with torch.autocast(x.device.type, enabled=False):
            dy = grad_output.reshape(-1, rows).to(ctx.dtype)
            flat = x.reshape(-1, columns).to(ctx.dtype)
            dx = torch.empty_like(flat) if needs_x else None
            dscale = torch.empty_like(scale) if needs_scale else None
            for block in transient_blocks(rows, columns, x.device.type):
                gradient = torch.mm(dy[:, block].t(), flat) if needs_scale else None
                with exact_float32(x.device):
                    weight = _build(packed, grid, block, columns, ctx.dtype, gradient, dscale)
                if dx is not None and block.start == 0:
                    torch.mm(dy[:, block], weight, out=dx)
                elif dx is not None:
                    dx.addmm_(dy[:, block], weight)
            dbias = dy.sum(0) if needs_bias else None
        dx = None if dx is None else dx.view_as(x).to(x.dtype)
        return dx, None, dscale, None, dbias, None, None


def _build(
    packed: Tensor,
    grid: QParams,
    rows: slice,
    columns: int,
    dtype: torch.dtype,
    gradient: Tensor | None = None,
    dscale: Tensor | None = None,
) -> Tensor:
    """Rows of the weight; gradient: that of these rows, of which dscale receives the sums over the groups."""
    weight = torch.empty(rows.stop - rows.start, columns, dtype=dtype, device=packed.device)
    groups = (grid.scale.shape[1], -1)
    for part in cache_blocks(len(weight), columns, packed.device.type):
        whole = slice(rows.start + part.start, rows.start + part.stop)
        target = weight[part]
        block = target if dtype == torch.float32 else torch.empty_like(target, dtype=torch.float32)
        scale = grid.scale[whole]
        code_steps(packed[whole], replace(grid, scale=scale, zero_point=grid.zero_point[whole]), block)
        steps = block.unflatten(1, groups)
        if gradient is not None and dscale is not None:
            dscale[whole] = (gradient[part].unflatten(1, groups) * steps).sum(-1, dtype=torch.float32)
        steps.mul_(scale[..., None])
        if block is not target:
            target.copy_(block)
    return weight
