"""A linear layer held as integers: a byte a weight, or half of one, dequantized on the fly."""

from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor, nn

from sqft.ops import QParams, decode_latent, dequantize, latent_codes, quantize
from sqft.ops.adapted import exact_float32
from sqft.ops.kernel_use import kernels_for
from sqft.ops.packed import pack_codes, unpack_codes
from sqft.ops.scaled_linear import scaled_linear
from sqft.ops.weight_blocks import WeightBlocks

__all__ = ["GridLinear", "PackedLinear", "QuantizedLinear"]


class GridLinear(nn.Module, ABC):
    """y = x @ dequantize(codes).T + bias, for codes however they are kept.

    Buffers: `scale` (out, groups) float32; `zero_point` (out, groups) uint8. Backward keeps no weight, it
    decodes again.
    """

    is_quantized_linear = True

    def __init__(
        self, out_features: int, in_features: int, qparams: QParams, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.bits, self.symmetric = qparams.bits, qparams.symmetric
        self.compute_dtype = dtype
        self.register_buffer("scale", qparams.scale)
        self.register_buffer("zero_point", qparams.zero_point)
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        self.scale: Tensor
        self.zero_point: Tensor

    @property
    def qparams(self) -> QParams:
        """The grid."""
        return QParams(self.scale.float(), self.zero_point, self.bits, self.symmetric)

    @abstractmethod
    def codes(self) -> UInt8[Tensor, "out in"]:
        """The codes."""

    @abstractmethod
    def base_weight(self) -> Float[Tensor, "out in"]:
        """The float32 weight on which adapters build."""

    def quantized_weight(self) -> Float[Tensor, "out in"]:
        """The float32 weight that the layer multiplies with."""
        return dequantize(self.codes(), self.qparams)

    def built_weight(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """`quantized_weight` in a compute dtype."""
        return self.quantized_weight().to(dtype)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Multiply with the dequantized weight, in the dtype of x, or in the autocast dtype."""
        y: Tensor = _Multiply.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        size = self.in_features // self.scale.shape[1]
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={size}"


class QuantizedLinear(GridLinear):
    """Codes together with what rounding lost, on which quantization-aware training builds.

    Buffer `latent` (out, in), the weights before rounding: uint8 up to 4 bits and int16 for 8 (`ops.latent`),
    or the float32 numbers that those decode to. Integers cost a byte a weight; float32 costs 4 and saves
    decoding.
    """

    def __init__(
        self,
        latent: Integer[Tensor, "out in"] | Float[Tensor, "out in"],
        qparams: QParams,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(latent.shape[0], latent.shape[1], qparams, bias, dtype)
        self.register_buffer("latent", latent)
        self.latent: Tensor

    def base_weight(self) -> Float[Tensor, "out in"]:
        """The float32 weight before rounding."""
        return decode_latent(self.latent, self.qparams)

    def codes(self) -> UInt8[Tensor, "out in"]:
        """The codes."""
        if self.latent.is_floating_point():
            return quantize(self.latent, self.qparams)
        return latent_codes(self.latent)

    def built_weight(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """`quantized_weight` in a compute dtype, never whole in float32: an adapted weight of rank 0."""
        base, qparams = self.latent, self.qparams
        kernels = kernels_for("auto", base.device, base.shape, quantized=True)
        factors = self.scale.new_empty(0, self.in_features), self.scale.new_empty(self.out_features, 0)
        blocks = WeightBlocks(base, *factors, 1.0, qparams, None, kernels)
        with exact_float32(base.device):
            return blocks.build(slice(0, self.out_features), dtype)


class PackedLinear(GridLinear):
    """Codes alone, as `ops.packed` packs them: half a byte a weight at 4 bits. For scales, and for running.

    Buffer `packed` (out, bytes) uint8.
    """

    def __init__(
        self,
        packed: UInt8[Tensor, "out bytes"],
        in_features: int,
        qparams: QParams,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(packed.shape[0], in_features, qparams, bias, dtype)
        self.register_buffer("packed", packed)
        self.packed: Tensor

    @classmethod
    def pack(
        cls,
        codes: UInt8[Tensor, "out in"],
        qparams: QParams,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """The layer of these codes."""
        return cls(pack_codes(codes, qparams.bits), codes.shape[1], qparams, bias, dtype=dtype)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Multiply with the dequantized weight, in the dtype of x."""
        return scaled_linear(x, self.packed, self.qparams, self.bias)

    def base_weight(self) -> Float[Tensor, "out in"]:
        """The float32 weight of the codes; a packed layer has no weight before rounding."""
        return self.quantized_weight()

    def codes(self) -> UInt8[Tensor, "out in"]:
        """The codes."""
        return unpack_codes(self.packed, self.bits, self.in_features)


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: GridLinear) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.layer, ctx.dtype = layer, x.dtype
        return nn.functional.linear(x.to(dtype), layer.built_weight(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad @ ctx.layer.built_weight(grad.dtype)).to(ctx.dtype), None
