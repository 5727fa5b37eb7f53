"""The base of quantization-aware training: each weight as its code plus four fractional bits.

    latent = code * 16 + fraction + 8,   fraction in [-7, 7]
    weight = (code + fraction / 16 - zero_point) * scale

One byte a weight up to 4 bits (int16 for 8). `latent >> 4` is the code, so training starts from exactly the
quantized model on any device, while the fraction keeps what GPTQ's compensation wanted before rounding.
A pruned weight has the zero point's code and fraction 0; every other weight differs from 0 (a kept weight
that would be 0 gets fraction 1), so the mask is `decode_latent(...) != 0`.

The fraction -8 is not used: code - 0.5 would round to an even neighbour.
"""

import torch
from jaxtyping import Bool, Float, Integer, UInt8
from torch import Tensor

from sqft.ops.grid import QParams

__all__ = ["decode_latent", "encode_latent", "latent_codes"]


def encode_latent(
    weight: Float[Tensor, "out in"],
    codes: UInt8[Tensor, "out in"],
    mask: Bool[Tensor, "out in"] | None,
    qparams: QParams,
) -> Integer[Tensor, "out in"]:
    """Store a weight before rounding together with the codes that it was rounded to.

    weight: what the quantizer rounded (compensated by GPTQ); a distance to its code of more than 7/16 step
    is cut to 7/16. mask: True = kept; None keeps everything.
    """
    groups = (qparams.scale.shape[1], -1)
    offset = codes.unflatten(1, groups).float() - qparams.zero_point[..., None].float()
    steps = weight.float().unflatten(1, groups) / qparams.scale[..., None]
    fraction = torch.round((steps - offset) * 16).clamp_(-7, 7)
    fraction = torch.where((offset == 0) & (fraction == 0), torch.ones_like(fraction), fraction).flatten(1)
    code_values = codes.int()
    if mask is not None:
        zero = (
            qparams.zero_point[..., None].expand(-1, -1, qparams.group_size(weight.shape[1])).flatten(1).int()
        )
        fraction = torch.where(mask, fraction, torch.zeros_like(fraction))
        code_values = torch.where(mask, code_values, zero)
    latent = code_values * 16 + fraction.int() + 8
    return latent.to(torch.uint8 if qparams.bits <= 4 else torch.int16)


def latent_codes(latent: Integer[Tensor, "out in"]) -> UInt8[Tensor, "out in"]:
    """The code of every weight."""
    return (latent >> 4).to(torch.uint8)


def decode_latent(
    latent: Integer[Tensor, "out in"] | Float[Tensor, "out in"], qparams: QParams
) -> Float[Tensor, "out in"]:
    """The float32 weight before rounding. Exact: a sixteenth of a step times a scale of at most 11 bits.

    A base that is kept decoded, in floats, is that weight already.
    """
    if latent.is_floating_point():
        return latent.float()
    sixteenths = latent.unflatten(1, (qparams.scale.shape[1], -1)).float() - 8
    steps = sixteenths / 16 - qparams.zero_point[..., None].float()
    return (steps * qparams.scale[..., None]).flatten(1)
