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

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor
from torch.autograd.function import once_differentiable

from sqft.ops.adapted import exact_float32
from sqft.ops.grid import QParams
from sqft.ops.packed import code_steps
from sqft.ops.weight_blocks import cache_blocks, transient_blocks

__all__ = ["scaled_linear", "scaled_weight"]


def scaled_linear(
    x: Float[Tensor, "*batch in"],
    stored: Integer[Tensor, "out stored"],
    qparams: QParams,
    bias: Float[Tensor, " out"] | None = None,
    *,
    latent: bool = False,
) -> Float[Tensor, "*batch out"]:
    """Multiply with the weight of codes; differentiable in x, the scale of the grid, and the bias.

    stored: the codes as `ops.packed.pack_codes` packs them, or with latent=True as `ops.latent` keeps them,
    in the upper part of each integer. The product runs in the dtype of x, or in the autocast dtype; the
    weight is computed in float32 whatever that is.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    plan = _Plan(qparams.bits, qparams.symmetric, latent, dtype)
    out: Tensor = _ScaledLinear.apply(x, stored, qparams.scale, qparams.zero_point, bias, plan)
    return out


def scaled_weight(
    stored: Integer[Tensor, "out stored"], qparams: QParams, columns: int, *, latent: bool = False
) -> Float[Tensor, "out in"]:
    """The float32 weight that `scaled_linear` multiplies with; it has no gradient."""
    plan = _Plan(qparams.bits, qparams.symmetric, latent, torch.float32)
    return plan.build(stored, qparams.scale.detach(), qparams.zero_point, columns)


@dataclass(frozen=True)
class _Plan:
    bits: int
    symmetric: bool
    latent: bool
    dtype: torch.dtype

    def build(
        self,
        stored: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        columns: int,
        gradient: Tensor | None = None,
        dscale: Tensor | None = None,
    ) -> Tensor:
        """Rows of the weight; gradient: that of these rows; dscale receives its sums over the groups."""
        weight = torch.empty(len(stored), columns, dtype=self.dtype, device=stored.device)
        for part in cache_blocks(len(stored), columns, stored.device.type):
            target = weight[part]
            block = target if self.dtype == torch.float32 else torch.empty_like(target, dtype=torch.float32)
            grid = QParams(scale[part], zero_point[part], self.bits, self.symmetric)
            code_steps(stored[part], grid, block, latent=self.latent)
            steps = block.unflatten(1, (scale.shape[1], -1))
            if gradient is not None and dscale is not None:
                grouped = gradient[part].unflatten(1, (scale.shape[1], -1))
                dscale[part] = (grouped * steps).sum(-1, dtype=torch.float32)
            steps.mul_(grid.scale[..., None])
            if block is not target:
                target.copy_(block)
        return weight


class _ScaledLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        stored: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bias: Tensor | None,
        plan: _Plan,
    ) -> Tensor:
        ctx.save_for_backward(x, stored, scale, zero_point)
        ctx.plan = plan
        with exact_float32(x.device):
            weight = plan.build(stored, scale, zero_point, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(plan.dtype), weight, None if bias is None else bias.to(plan.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, stored, scale, zero_point = ctx.saved_tensors
        plan: _Plan = ctx.plan
        needs_x, _, needs_scale, _, needs_bias = ctx.needs_input_grad[:5]
        rows, columns = len(stored), x.shape[-1]
        with torch.autocast(x.device.type, enabled=False):
            dy = grad_output.reshape(-1, rows).to(plan.dtype)
            flat = x.reshape(-1, columns).to(plan.dtype)
            dx = torch.empty_like(flat) if needs_x else None
            dscale = torch.empty_like(scale) if needs_scale else None
            for block in transient_blocks(rows, columns, x.device.type):
                gradient = part = None
                if dscale is not None:
                    gradient, part = torch.mm(dy[:, block].t(), flat), dscale[block]
                with exact_float32(x.device):
                    weight = plan.build(
                        stored[block], scale[block], zero_point[block], columns, gradient, part
                    )
                if dx is not None and block.start == 0:
                    torch.mm(dy[:, block], weight, out=dx)
                elif dx is not None:
                    dx.addmm_(dy[:, block], weight)
            dbias = dy.sum(0) if needs_bias else None
        dx = None if dx is None else dx.view_as(x).to(x.dtype)
        return dx, None, dscale, None, dbias, None
