"""An adapter directory, read a second time: its settings, and its numbers in float64."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sqft.certificate.stored import StoredTensors, read_json
from sqft.errors import CertificateError

__all__ = ["ADAPTER_CONFIG", "Adapter", "read_adapter"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
IN_PLACE = re.compile(r"^(?:base_model\.model\.)?(?P<name>.+)\.sqft_(?P<kind>scale|norm)$")
FACTOR = re.compile(r"^(?:base_model\.model\.)?(?P<name>.+)\.(?:sqft|lora)_(?P<factor>[AB])(?:\.weight)?$")

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Adapter:
    """An adapter as its files state it, by the full name of the linear or norm.

    factors: A (rank, in) and B (out, rank); scales (out, groups) and the weights of norms, as served.
    """

    config: dict[str, Any]
    factors: dict[str, tuple[Float64, Float64]]
    scales: dict[str, Float64] = field(default_factory=dict)
    norms: dict[str, Float64] = field(default_factory=dict)

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

    Raises: CertificateError if a file is missing or damaged, a factor has no partner, a number is not finite,
    or a scale is not positive.
    """
    config = read_json(directory / ADAPTER_CONFIG)
    stored = StoredTensors([directory / ADAPTER_WEIGHTS])
    path = directory / ADAPTER_WEIGHTS
    halves: dict[str, dict[str, Float64]] = {}
    in_place: dict[str, dict[str, Float64]] = {"scale": {}, "norm": {}}
    for key in stored:
        match, place = FACTOR.match(key), IN_PLACE.match(key)
        values = stored.values(key).astype(np.float64)
        if not bool(np.isfinite(values).all()):
            raise CertificateError(f"{path}: {key} holds NaN or infinity")
        if match is not None:
            halves.setdefault(match["name"], {})[match["factor"]] = values
        elif place is not None:
            in_place[place["kind"]][place["name"]] = values
        else:
            raise CertificateError(f"{path}: {key} is not understood")
    for name, scale in in_place["scale"].items():
        if scale.ndim != 2 or not bool((scale > 0).all()):
            raise CertificateError(f"{path}: {name} has a scale that is not positive")
    if not halves and not in_place["scale"]:
        raise CertificateError(f"{path} holds no factors and no scales")
    for name, factors in halves.items():
        fits = set(factors) == {"A", "B"} and all(factor.ndim == 2 for factor in factors.values())
        if not fits or factors["B"].shape[1] != factors["A"].shape[0]:
            raise CertificateError(f"{directory / ADAPTER_WEIGHTS}: A and B of {name} do not fit each other")
    pairs = {name: (factors["A"], factors["B"]) for name, factors in sorted(halves.items())}
    return Adapter(config, pairs, in_place["scale"], in_place["norm"])
