"""What a method makes of one weight."""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from sqft.ops import QuantizedWeight

__all__ = ["Pruned", "Rounded"]


@dataclass(frozen=True)
class Pruned:
    """A pruned weight (its kept values may be updated), its mask (True = kept), and the damping it took."""

    weight: Float[Tensor, "out in"]
    mask: Bool[Tensor, "out in"]
    damping: float = 0.0


@dataclass(frozen=True)
class Rounded(QuantizedWeight):
    """A quantized weight with the value before rounding (0 where pruned), its mask, and the damping it took.

    mask: True = kept; None: all are.
    """

    before_rounding: Float[Tensor, "out in"]
    mask: Bool[Tensor, "out in"] | None
    damping: float = 0.0

    @property
    def quantized(self) -> QuantizedWeight:
        """Codes and grid alone, so that the rest can leave memory."""
        return QuantizedWeight(self.codes, self.qparams)
