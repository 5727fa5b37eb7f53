"""A linear layer held as integers: one byte a weight, dequantized on the fly."""

from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from sqft.ops import QParams, decode_latent, dequantize, latent_codes, quantize

__all__ = ["QuantizedLinear"]


class QuantizedLinear(nn.Module):
    """y = x @ dequantize(codes).T + bias.

    Buffers: `latent` (out, in), uint8 up to 4 bits and int16 for 8 (`ops.latent`), or float32, the decoded
    base; `scale` (out, groups) float32; `zero_point` (out, groups) uint8. The integer base costs a byte a
    weight; the float32 base 4 bytes, and saves decoding. Backward keeps no weight, it decodes again.
    """

    is_quantized_linear = True

    def __init__(
        self,
        latent: Integer[Tensor, "out in"] | Float[Tensor, "out in"],
        qparams: QParams,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = latent.shape
        self.bits, self.symmetric = qparams.bits, qparams.symmetric
        self.compute_dtype = dtype
        self.register_buffer("latent", latent)
        self.register_buffer("scale", qparams.scale)
        self.register_buffer("zero_point", qparams.zero_point)
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        self.latent: Tensor
        self.scale: Tensor
        self.zero_point: Tensor

    @property
    def qparams(self) -> QParams:
        """The grid."""
        return QParams(self.scale.float(), self.zero_point, self.bits, self.symmetric)

    def base_weight(self) -> Float[Tensor, "out in"]:
        """The float32 weight before rounding, on which quantization-aware training builds."""
        return decode_latent(self.latent, self.qparams)

    def codes(self) -> Tensor:
        """The codes, uint8 (out, in)."""
        if self.latent.is_floating_point():
            return quantize(self.latent, self.qparams)
        return latent_codes(self.latent)

    def quantized_weight(self) -> Float[Tensor, "out in"]:
        """The float32 weight that the layer multiplies with."""
        return dequantize(self.codes(), self.qparams)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Multiply with the dequantized weight, in the dtype of x."""
        y: Tensor = _Multiply.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        size = self.in_features // self.scale.shape[1]
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={size}"


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.quantized_weight().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.quantized_weight().to(grad.dtype), None
