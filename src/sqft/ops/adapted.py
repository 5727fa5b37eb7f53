"""The adapted weight: the one formula behind training, merging, export and the kernels' tests.

    delta   = (lora_B @ lora_A) * scaling
    adapted = base + where(mask, delta, 0)
    codes   = clamp(round(adapted / base_scale) + zero_point, 0, 2^bits - 1)   if a grid is given
    weight  = (codes - zero_point) * scale          the base's scale, or the one trained in its place

All of it in float32 with autocast and TF32 off, true division, in this order: a product in bfloat16 flips
160 codes in a million.

Source: SQFT, arXiv 2410.03750, equations 1 to 4.
Differs from the paper: the gradient respects the clamp, and the mask is applied to the update only, since
the base already holds its zeros.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from sqft.ops.grid import QParams, fake_quantize, quantize

__all__ = [
    "adapted_codes",
    "adapted_weight",
    "exact_float32",
    "low_rank_delta",
    "masked_update",
    "round_storage",
    "updated_weight",
]


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Float32 products as IEEE defines them: no autocast, no TF32."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        matmul = torch.backends.cuda.matmul  # the older allow_tf32 cannot be read once this one was set
        precision, matmul.fp32_precision = matmul.fp32_precision, "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = precision


def low_rank_delta(
    lora_A: Float[Tensor, "rank in"], lora_B: Float[Tensor, "out rank"], scaling: float
) -> Float[Tensor, "out in"]:
    """(lora_B @ lora_A) * scaling in float32."""
    with exact_float32(lora_A.device):
        return (lora_B.float() @ lora_A.float()) * scaling


def adapted_weight(
    base: Float[Tensor, "out in"],
    lora_A: Float[Tensor, "rank in"],
    lora_B: Float[Tensor, "out rank"],
    *,
    scaling: float,
    mask: Bool[Tensor, "out in"] | None = None,
    qparams: QParams | None = None,
    scale: Float[Tensor, "out groups"] | None = None,
    storage_dtype: torch.dtype | None = None,
) -> Float[Tensor, "out in"]:
    """The float32 weight that the adapted layer multiplies with, differentiable in A, B and the scale.

    mask: True = kept; None adapts every weight. qparams: round to this grid. scale: multiply the codes with
    this trained scale in the place of the grid's. storage_dtype: round to this 16-bit type instead of a grid,
    so that a merged 16-bit file holds the very weights that were trained.
    A sub-adapter of rank r passes lora_A[:r], lora_B[:, :r] and the scaling of the maximal rank.
    """
    delta = low_rank_delta(lora_A, lora_B, scaling)
    return updated_weight(base, delta, mask=mask, qparams=qparams, scale=scale, storage_dtype=storage_dtype)


def updated_weight(
    base: Float[Tensor, "out in"],
    delta: Float[Tensor, "out in"],
    *,
    mask: Bool[Tensor, "out in"] | None = None,
    qparams: QParams | None = None,
    scale: Float[Tensor, "out groups"] | None = None,
    storage_dtype: torch.dtype | None = None,
) -> Float[Tensor, "out in"]:
    """The adapted weight of an update given as a whole; differentiable in the update and the scale."""
    adapted = masked_update(base, delta, mask)
    if qparams is not None:
        return fake_quantize(adapted, qparams, scale)
    return adapted if storage_dtype is None else round_storage(adapted, storage_dtype)


def adapted_codes(
    base: Float[Tensor, "out in"],
    lora_A: Float[Tensor, "rank in"],
    lora_B: Float[Tensor, "out rank"],
    *,
    scaling: float,
    mask: Bool[Tensor, "out in"] | None = None,
    qparams: QParams,
) -> UInt8[Tensor, "out in"]:
    """The codes of the adapted weight: what a merge writes."""
    with torch.no_grad():
        return quantize(masked_update(base, low_rank_delta(lora_A, lora_B, scaling), mask), qparams)


def round_storage(weight: Float[Tensor, "*any"], dtype: torch.dtype) -> Float[Tensor, "*any"]:
    """Round to a storage dtype and return float32; the gradient passes straight through."""
    out: Tensor = _RoundStorage.apply(weight, dtype)
    return out


def masked_update(
    base: Float[Tensor, "out in"], delta: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"] | None
) -> Float[Tensor, "out in"]:
    """base + where(mask, delta, 0) in float32: the adapted weight before it is rounded."""
    if mask is not None:
        delta = torch.where(mask, delta, torch.zeros_like(delta))
    return base.float() + delta


class _RoundStorage(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return weight.to(dtype).float()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
