"""An adapter directory, read a second time: its settings and low-rank factors in float64."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sqft.certificate.stored import StoredTensors, read_json
from sqft.errors import CertificateError

__all__ = ["ADAPTER_CONFIG", "Adapter", "read_adapter"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
FACTOR = re.compile(r"^(?:base_model\.model\.)?(?P<name>.+)\.(?:sqft|lora)_(?P<factor>[AB])(?:\.weight)?$")

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Adapter:
    """An adapter as its files state it: low-rank factors by the full name of the linear."""

    config: dict[str, Any]
    factors: dict[str, tuple[Float64, Float64]]

    @property
    def masked(self) -> bool:
        """Whether the update is masked, and so depends on the zeros of its base."""
        return self.config.get("peft_type") == "SQFT"

    def scaling(self, name: str) -> float:
        """alpha / max_rank, the same for every sub-adapter.

        A stock LoRA states it module by module, as PEFT reads it: alpha_pattern / rank_pattern.
        """
        config = self.config
        try:
            if self.masked:
                return _finite(float(config["alpha"]) / max(config["ranks"]))
            if config.get("use_rslora") or config.get("use_dora"):
                raise CertificateError(
                    f"{ADAPTER_CONFIG} states rsLoRA or DoRA, whose merge has no certificate"
                )
            rank = (config.get("rank_pattern") or {}).get(name, config["r"])
            alpha = (config.get("alpha_pattern") or {}).get(name, config["lora_alpha"])
            return _finite(float(alpha) / float(rank))
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise CertificateError(f"{ADAPTER_CONFIG} does not state the scaling ({error!r})") from None


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("not finite")
    return value


def read_adapter(directory: Path) -> Adapter:
    """The adapter of a PEFT directory.

    Raises: CertificateError if a file is missing or damaged, a factor has no partner, or is not finite.
    """
    config = read_json(directory / ADAPTER_CONFIG)
    stored = StoredTensors([directory / ADAPTER_WEIGHTS])
    halves: dict[str, dict[str, Float64]] = {}
    for key in stored:
        match = FACTOR.match(key)
        if match is None:
            raise CertificateError(f"{directory / ADAPTER_WEIGHTS}: {key} is not understood")
        factor = stored.values(key).astype(np.float64)
        if not bool(np.isfinite(factor).all()):
            raise CertificateError(f"{directory / ADAPTER_WEIGHTS}: {key} holds NaN or infinity")
        halves.setdefault(match["name"], {})[match["factor"]] = factor
    if not halves:
        raise CertificateError(f"{directory / ADAPTER_WEIGHTS} holds no factors")
    for name, factors in halves.items():
        fits = set(factors) == {"A", "B"} and all(factor.ndim == 2 for factor in factors.values())
        if not fits or factors["B"].shape[1] != factors["A"].shape[0]:
            raise CertificateError(f"{directory / ADAPTER_WEIGHTS}: A and B of {name} do not fit each other")
    return Adapter(config, {name: (factors["A"], factors["B"]) for name, factors in sorted(halves.items())})
