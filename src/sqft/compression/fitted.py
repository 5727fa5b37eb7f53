"""One linear, or norm, of a compressed model whose numbers are fitted while its zeros and its grid stay.

    weight = base + where(mask, change * unit, 0)         unit: root mean square of the row's kept weights
    scale  = round(base_scale * (1 + change))             of a grid
    norm   = round(base + change * unit)                          unit: root mean square of the norm

rounded in every pass to what is stored, by `ops.adapted.updated_weight` and `ops.trained`. Changes are shares
of what is there, so that one learning rate suits every layer: norms of a first block may be a tenth of those
of the last. Changes of 0 leave the compressed model, bit for bit.
"""

from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from sqft.ops import (
    QParams,
    QuantizedWeight,
    decode_latent,
    dequantize,
    encode_latent,
    keep_nonzero,
    quantize,
)
from sqft.ops.adapted import exact_float32, masked_update, updated_weight
from sqft.ops.trained import significant_bits, trained_norm, trained_scale

__all__ = ["FittedLinear", "FittedNorm", "FittedPart"]

SMALLEST_RATIO = 0.01  # of a trained scale to the one before: it stays positive


class FittedPart(ABC):
    """What a linear and a norm have in common: their changes by kind, which an optimizer trains."""

    def __init__(self) -> None:
        self.changes: dict[str, Tensor] = {}

    @abstractmethod
    def value(self) -> Tensor:
        """The float32 parameter that the block computes with, differentiable in the changes."""

    def train(self, kind: str, like: Tensor) -> None:
        """Begin with a change of 0."""
        self.changes[kind] = torch.zeros_like(like, dtype=torch.float32).requires_grad_()

    def keep(self) -> dict[str, Tensor]:
        """A copy of the changes."""
        return {kind: change.detach().clone() for kind, change in self.changes.items()}

    @torch.no_grad()
    def restore(self, kept: dict[str, Tensor]) -> None:
        """Go back to what `keep` returned."""
        for kind, change in self.changes.items():
            change.copy_(kept[kind])


class FittedLinear(FittedPart):
    """A sparse or quantized linear. fits: which of "weights" and "scales" change.

    mask: True = kept; None keeps all. latent: the weight before rounding of a quantized one, as `ops.latent`
    has it; None: there is none but the codes. dtype: in which a weight without a grid is stored.
    """

    def __init__(
        self,
        stored: Float[Tensor, "out in"] | QuantizedWeight,
        mask: Bool[Tensor, "out in"] | None,
        latent: Integer[Tensor, "out in"] | None,
        dtype: torch.dtype,
        fits: set[str],
    ) -> None:
        super().__init__()
        self.mask, self.latent, self.dtype = mask, latent, dtype
        self.quantized = stored if isinstance(stored, QuantizedWeight) else None
        if self.quantized is None:
            assert isinstance(stored, Tensor)
            self.base = stored.float()
        elif latent is None:
            self.base = self.quantized.dequantize()
        else:
            self.base = decode_latent(latent, self.quantized.qparams)
        if "weights" in fits:
            kept = self.base.shape[1] if mask is None else mask.sum(1, keepdim=True).clamp_min(1)
            self.unit = (self.base.square().sum(1, keepdim=True) / kept).sqrt()
            self.train("weights", self.base)
        if "scales" in fits and self.quantized is not None:
            self.scale_bits = significant_bits(self.quantized.qparams.scale)
            self.train("scales", self.quantized.qparams.scale)

    def value(self) -> Float[Tensor, "out in"]:
        """The weight as it is stored, in float32."""
        qparams = None if self.quantized is None else self.quantized.qparams
        with exact_float32(self.base.device):
            scale = self._scale()
            if "weights" in self.changes:
                update = self.changes["weights"] * self.unit
                return updated_weight(
                    self.base, update, mask=self.mask, qparams=qparams, scale=scale, storage_dtype=self.dtype
                )
            return (
                self.base if self.quantized is None else dequantize(self.quantized.codes, self._grid(scale))
            )

    @torch.no_grad()
    def stored(self) -> tuple[Tensor | QuantizedWeight, Integer[Tensor, "out in"] | None]:
        """What is written: the weight, and of a quantized one the latent codes."""
        if self.quantized is None:
            weight = self.value().to(self.dtype)
            return weight if self.mask is None else keep_nonzero(weight, self.mask), None
        codes, latent, qparams = self.quantized.codes, self.latent, self.quantized.qparams
        with exact_float32(self.base.device):
            if "weights" in self.changes:
                before = masked_update(self.base, self.changes["weights"] * self.unit, self.mask)
                codes = quantize(before, qparams)
                latent = encode_latent(before, codes, self.mask, qparams)
            return QuantizedWeight(codes, self._grid(self._scale())), latent

    def _scale(self) -> Float[Tensor, "out groups"] | None:
        if "scales" not in self.changes or self.quantized is None:
            return None
        change = self.changes["scales"].clamp_min(SMALLEST_RATIO - 1)
        return trained_scale(self.quantized.qparams.scale, change, self.scale_bits)

    def _grid(self, scale: Float[Tensor, "out groups"] | None) -> QParams:
        assert self.quantized is not None
        qparams = self.quantized.qparams
        return qparams if scale is None else replace(qparams, scale=scale)


class FittedNorm(FittedPart):
    """The weight of a norm, stored in a dtype."""

    def __init__(self, stored: Float[Tensor, " features"]) -> None:
        super().__init__()
        self.base, self.dtype = stored.float(), stored.dtype
        size = self.base.square().mean().sqrt()
        self.unit = torch.where(size > 0, size, 1.0)  # a norm that multiplies with 1 + weight may hold zeros
        self.train("norms", self.base)

    def value(self) -> Float[Tensor, " features"]:
        """The weight as it is stored, in float32."""
        return trained_norm(self.base, self.changes["norms"] * self.unit, self.dtype)
