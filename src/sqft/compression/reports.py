"""The per-layer report, and the checks that all methods share."""

import logging
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sqft.errors import CompressionError

__all__ = ["LayerReport", "check_finite", "warn_damping", "warn_few_tokens"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerReport:
    """One compressed linear.

    error: squared error of its output relative to the dense layer's, on calibration tokens that the
    statistics did not see (where there are 8 sequences or more); None without calibration. damping: share of
    the Hessian's mean diagonal that had to be added, 0 where no Hessian is used.
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    error: float | None
    damping: float
    num_tokens: int
    dead_inputs: int
    seconds: float

    @classmethod
    def of(
        cls,
        name: str,
        group: Any,
        dense: Tensor,
        compressed: Tensor,
        mask: Tensor | None,
        damping: float,
        seconds: float,
    ) -> "LayerReport":
        """The report of a linear of `group` (an InputGroup)."""
        statistic = group.statistic
        return cls(
            name,
            (dense.shape[0], dense.shape[1]),
            0.0 if mask is None else 1 - int(mask.sum(dtype=torch.int64)) / mask.numel(),
            group.error(dense, compressed),
            damping,
            0 if statistic is None else statistic.num_tokens,
            0 if statistic is None else statistic.num_dead,
            seconds,
        )

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "LayerReport":
        """The report that `to_json` was read from."""
        return cls(**values | {"shape": tuple(values["shape"])})


def check_finite(name: str, weight: Tensor) -> None:
    """Raises: CompressionError if a weight is NaN or infinite."""
    # The sum of finite weights is finite, except for enormous ones; only then is each looked at.
    if not bool(torch.isfinite(weight.sum())) and not bool(torch.isfinite(weight).all()):
        raise CompressionError(f"{name} holds NaN or infinite weights; fetch the model again")


def warn_damping(name: str, asked: float, needed: float) -> None:
    """Warn if a Hessian was singular and took more damping than was asked for."""
    if needed > asked:
        logger.warning(
            "%s: the Hessian is singular; it took a damping of %g in place of %g. "
            "Give more calibration tokens",
            name, needed, asked,
        )  # fmt: skip


def warn_few_tokens(names: list[str], num_tokens: int, width: int) -> None:
    """Warn if a Hessian of this width has seen fewer tokens than columns."""
    if num_tokens < width:
        logger.warning(
            "%s: %d calibration tokens for a width of %d leave the Hessian singular; give at least %d",
            names[0], num_tokens, width, 2 * width,
        )  # fmt: skip
