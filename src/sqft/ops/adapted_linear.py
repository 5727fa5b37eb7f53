"""The fused adapted layer: one product forward, nothing the size of a weight kept for backward.

    y = x W^T + bias,   W = round(base + mask * (lora_B lora_A) scaling),   mask = (base != 0)

Forward builds W (a transient of one weight) and multiplies once. Backward keeps x, A, B and the resident
base, builds W again block by block of rows, and forms the gradient of W in the same blocks:

    dX = dY W
    exact:    G = mask * unclamped * (dY^T x),   dA = scaling B^T G,   dB = scaling G A^T
              with a trained scale: dscale = sum over a group of (dY^T x) * (codes - zero_point), and
              G times scale / base scale
    lowrank:  dA = scaling (dY B)^T x,   dB = scaling dY^T (x A^T)

so that its transients are two blocks of max(BLOCK_ELEMENTS, MIN_ROWS * in) elements in the compute dtype, and
in both directions four float32 blocks of CACHE_ELEMENTS (at least 16 rows; `weight_blocks`).

Source: SQFT, arXiv 2410.03750, equations 1 to 4; the lowrank gradient is that of LoRS, arXiv 2501.08582.
Differs from the paper: the published layer multiplies twice and keeps the update and the mask for backward.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from sqft.errors import AdapterError
from sqft.kernels.choices import TORCH, Choice
from sqft.ops.adapted import exact_float32
from sqft.ops.grid import QParams
from sqft.ops.kernel_use import KERNELS, kernels_for
from sqft.ops.weight_blocks import WeightBlocks

__all__ = ["GRADIENTS", "adapted_linear", "check_choice", "frozen_linear"]

GRADIENTS = ("exact", "lowrank")


def adapted_linear(
    x: Float[Tensor, "*batch in"],
    base: Shaped[Tensor, "out in"],
    lora_A: Float[Tensor, "rank in"],
    lora_B: Float[Tensor, "out rank"],
    bias: Float[Tensor, " out"] | None = None,
    *,
    scaling: float,
    qparams: QParams | None = None,
    scale: Float[Tensor, "out groups"] | None = None,
    storage_dtype: torch.dtype | None = None,
    gradient: Literal["exact", "lowrank"] = "exact",
    kernels: Literal["auto", "torch", "triton"] | Choice = "auto",
) -> Float[Tensor, "*batch out"]:
    """Multiply with the adapted weight; differentiable in x, A, B, the bias, and a trained scale.

    base: a float weight, or the integer latent of `ops.latent`, for which qparams is its grid. scale: a
    trained one, which the codes are multiplied with in the place of the grid's. The product runs in the dtype
    of x, or in the autocast dtype; the weight is computed in float32 whatever that is.
    gradient: exact, or lowrank, which leaves the mask and the clamp out of the gradients of A and B.
    kernels: triton builds the weight and contracts its gradient by the kernels of `sqft.kernels`; where they
        cannot run (no NVIDIA GPU, no Triton) it is torch, and a warning says so once. auto: what the table in
        `kernels.choices` says is faster for the shape on this kind of card, and torch for trained scales. A
        Choice is taken as it is.

    Raises: AdapterError for an unknown choice, and for a trained scale with gradient="lowrank" or
    kernels="triton".
    """
    check_choice("gradient", gradient, GRADIENTS)
    if not isinstance(kernels, Choice):
        check_choice("kernels", kernels, KERNELS)
    if kernels == "triton" and scale is not None:
        raise AdapterError("trained scales need the torch operation; set kernels: torch")
    if gradient == "lowrank" and scale is not None:
        raise AdapterError("trained scales need the exact gradient; set gradient: exact")
    used = TORCH
    if scale is None:
        used = kernels_for(kernels, x.device, base.shape, quantized=qparams is not None)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    plan = _Plan(
        scaling,
        0 if qparams is None else qparams.bits,
        qparams is not None and qparams.symmetric,
        storage_dtype,
        gradient == "exact",
        dtype,
        used,
    )
    step, zero_point = (None, None) if qparams is None else (qparams.scale, qparams.zero_point)
    out: Tensor = _AdaptedLinear.apply(x, base, lora_A, lora_B, bias, scale, step, zero_point, plan)
    return out


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises: AdapterError if a setting is none of its choices."""
    if value not in choices:
        raise AdapterError(f"{name} '{value}' is unknown; choose from {', '.join(choices)}")


def frozen_linear(
    x: Float[Tensor, "*batch in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "*batch out"]:
    """x weight^T + bias in the dtype of x for a frozen weight stored in another; no cast copy is kept."""
    out: Tensor = _FrozenLinear.apply(x, weight, None if bias is None else bias.to(x.dtype))
    return out


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return grad_output @ weight.to(grad_output.dtype), None, None


@dataclass(frozen=True)
class _Plan:
    scaling: float
    bits: int
    symmetric: bool
    storage_dtype: torch.dtype | None
    exact: bool
    dtype: torch.dtype
    kernels: Choice

    def blocks(
        self,
        base: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scale: Tensor | None,
        step: Tensor | None,
        zero_point: Tensor | None,
    ) -> WeightBlocks:
        grid = None
        if step is not None and zero_point is not None:
            grid = QParams(step, zero_point, self.bits, self.symmetric)
        return WeightBlocks(base, lora_A, lora_B, self.scaling, grid, self.storage_dtype, self.kernels, scale)


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        step: Tensor | None,
        zero_point: Tensor | None,
        plan: _Plan,
    ) -> Tensor:
        # Every tensor is an input as it came: FSDP frees and refills the storage of the base in between.
        ctx.save_for_backward(x, base, lora_A, lora_B, scale, step, zero_point)
        ctx.plan = plan
        with exact_float32(x.device):
            blocks = plan.blocks(base, lora_A, lora_B, scale, step, zero_point)
            weight = blocks.build(slice(0, base.shape[0]), plan.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(plan.dtype), weight, None if bias is None else bias.to(plan.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, base, lora_A, lora_B, scale, step, zero_point = ctx.saved_tensors
        plan: _Plan = ctx.plan
        with torch.autocast(x.device.type, enabled=False):
            blocks = plan.blocks(base, lora_A, lora_B, scale, step, zero_point)
            dy = grad_output.reshape(-1, base.shape[0]).to(plan.dtype)
            flat = x.reshape(-1, base.shape[1]).to(plan.dtype)
            needs_x, _, needs_A, needs_B, needs_bias, needs_scale = ctx.needs_input_grad[:6]
            dx = torch.empty_like(flat) if needs_x else None
            dA = dB = dscale = None
            if plan.exact and (needs_A or needs_B or needs_scale):
                dA, dB = torch.zeros_like(lora_A), torch.empty_like(lora_B)
                dscale = torch.empty_like(scale) if needs_scale and scale is not None else None
            elif not plan.exact and (needs_A or needs_B):
                dA, dB = _lowrank_gradients(dy, flat, lora_A, lora_B, plan.scaling)
            if dx is not None or plan.exact:
                for rows in blocks.transient_blocks():
                    _backward_block(blocks, rows, dy, flat, dx, dA, dB, dscale, plan)
            dbias = dy.sum(0) if needs_bias else None
        dx = None if dx is None else dx.view_as(x).to(x.dtype)
        return dx, None, dA, dB, dbias, dscale, None, None, None


def _backward_block(
    blocks: WeightBlocks,
    rows: slice,
    dy: Tensor,
    x: Tensor,
    dx: Tensor | None,
    dA: Tensor | None,
    dB: Tensor | None,
    dscale: Tensor | None,
    plan: _Plan,
) -> None:
    """Add what a block of rows of the weight contributes to every gradient."""
    dy_rows, gradient = dy[:, rows], None
    if plan.exact and dA is not None and dB is not None and plan.kernels.gradient is not None:
        weight, keep = blocks.build_with_mask(rows, plan.dtype)
        part, dB[rows] = blocks.contract_gradient(rows, dy_rows, x, keep)
        dA.add_(part)
    else:
        gradient = torch.mm(dy_rows.t(), x) if plan.exact and dB is not None else None
        with exact_float32(x.device):
            weight = blocks.build(rows, plan.dtype, gradient, dscale)
    if dx is not None and rows.start == 0:
        torch.mm(dy_rows, weight, out=dx)
    elif dx is not None:
        dx.addmm_(dy_rows, weight)
    if gradient is not None and dA is not None and dB is not None:
        lora_A, lora_B = blocks.lora_A.to(plan.dtype), blocks.lora_B[rows].to(plan.dtype)
        dB[rows] = torch.mm(gradient, lora_A.t()).to(dB.dtype).mul_(plan.scaling)
        # Not add_(..., alpha=scaling): Inductor of torch 2.13 leaves the alpha of an added product out.
        dA.add_(torch.mm(lora_B.t(), gradient).to(dA.dtype).mul_(plan.scaling))


def _lowrank_gradients(
    dy: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """dA = scaling (dY B)^T x and dB = scaling dY^T (x A^T): no gradient of the weight is formed."""
    A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    dA = torch.mm(torch.mm(dy, B).t(), x).to(lora_A.dtype).mul_(scaling)
    dB = torch.mm(dy.t(), torch.mm(x, A.t())).to(lora_B.dtype).mul_(scaling)
    return dA, dB
