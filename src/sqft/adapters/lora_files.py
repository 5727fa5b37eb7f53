"""Adapters trained elsewhere: plain LoRA, rsLoRA and DoRA in PEFT's files, one linear at a time.

    lora    adapted = base + B A alpha / rank
    rslora  adapted = base + B A alpha / sqrt(rank)
    dora    adapted = magnitude * (base + B A scaling) / ||base + B A scaling||     norm of each output row

Source: PEFT 0.21, `tuners/lora`; arXiv 2106.09685, 2312.03732, 2402.09353 (equation 5).
Differs from the papers: a row of DoRA that is all 0 stays 0 (PEFT divides 0 by 0).
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sqft.artifacts import digest_file
from sqft.errors import AdapterError
from sqft.ops.adapted import low_rank_delta
from sqft.untrusted import read_bounded, time_limit

__all__ = ["ForeignAdapter", "adapter_digests", "open_foreign_adapter"]

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

CONFIG_BYTES = 16 * 2**20
PATTERN_SECONDS = 2.0
KEY = re.compile(
    r"^(?:base_model\.model\.)?(?P<name>.+?)\.lora_(?P<part>A|B|magnitude_vector)(?:\.default)?(?:\.weight)?$"
)
COPY = re.compile(  # PEFT's default saving adds embedding and head where one of them is adapted
    r"^(?:base_model\.model\.)?(?P<name>(?:.+\.)?(?:embed_tokens|wte|lm_head))(?:\.base_layer)?\.weight$"
)


@dataclass(frozen=True)
class ForeignAdapter:
    """An opened adapter. keys: the file's key of every part of every linear; copied: of base weights."""

    directory: Path
    config: dict[str, Any]
    keys: dict[str, dict[str, str]]
    copied: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The linears it adapts."""
        return sorted(self.keys)

    def scaling(self, name: str) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
        try:
            rank = _of_module(self.config.get("rank_pattern"), name, self.config["r"])
            alpha = _of_module(self.config.get("alpha_pattern"), name, self.config["lora_alpha"])
            scaling = float(alpha / (rank**0.5 if self.config.get("use_rslora") else rank))
            if isinstance(rank, bool) or rank <= 0 or not math.isfinite(scaling):
                raise ValueError(f"rank {rank}, alpha {alpha}")
        except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError, re.error, OSError) as error:
            reason = " ".join(str(error).split())
            raise AdapterError(f"{self.directory} states no scaling of {name} ({reason})") from None
        return scaling

    def factors(self, name: str) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
        """A and B of a linear, float32."""
        with safe_open(self.directory / TENSORS, framework="pt") as file:
            parts = {part: file.get_tensor(self.keys[name][part]).float() for part in ("A", "B")}
        return parts["A"], parts["B"]

    def check_shape(self, name: str, shape: tuple[int, int]) -> None:
        """Raises: AdapterError if the adapter is for a weight of another shape than this (out, in)."""
        with safe_open(self.directory / TENSORS, framework="pt") as file:
            shape_A, shape_B = (file.get_slice(self.keys[name][part]).get_shape() for part in ("A", "B"))
        if (shape_B[0], shape_A[1]) != shape:
            raise AdapterError(
                f"the adapter of {name} is for a weight of {shape_B[0]} x {shape_A[1]}, "
                f"the base has {shape[0]} x {shape[1]}"
            )

    def copies(self) -> Iterator[tuple[str, Tensor]]:
        """Weights of the base that stand in the file too, by their name in the base."""
        with safe_open(self.directory / TENSORS, framework="pt") as file:
            for name, key in self.copied.items():
                yield name, file.get_tensor(key)

    def adapted(self, name: str, base: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The float32 weight that the unmerged model multiplies with."""
        self.check_shape(name, (base.shape[0], base.shape[1]))
        lora_A, lora_B = self.factors(name)
        adapted = base.float() + low_rank_delta(lora_A, lora_B, self.scaling(name))
        if not self.config.get("use_dora"):
            return adapted
        with safe_open(self.directory / TENSORS, framework="pt") as file:
            magnitude = file.get_tensor(self.keys[name]["magnitude_vector"]).float().reshape(-1, 1)
        norm = adapted.norm(dim=1, keepdim=True)
        return torch.where(norm > 0, adapted * (magnitude / norm.clamp_min(1e-30)), adapted)


def open_foreign_adapter(directory: Path) -> ForeignAdapter:
    """Open a PEFT LoRA directory.

    Raises: AdapterError if it is missing, damaged, of another kind, or changes more than linears.
    """
    path = directory / CONFIG
    try:
        config = json.loads(read_bounded(path, CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(
            f"{directory} is not a PEFT adapter: {path.name} cannot be read ({error})"
        ) from None
    if not isinstance(config, dict):
        raise AdapterError(f"{directory} is not a PEFT adapter: {path.name} holds no settings")
    kind = config.get("peft_type")
    if kind != "LORA":
        hint = "merge it with the recipe that trained it" if kind == "SQFT" else "only LORA can be merged"
        raise AdapterError(f"{directory} is an adapter of the type {kind}; {hint}")
    for key in (
        "modules_to_save",
        "trainable_token_indices",
        "lora_bias",
        "target_parameters",
        "alora_invocation_tokens",
        "use_qalora",
        "use_bdlora",
        "layer_replication",
        "arrow_config",
        "kasa_config",
        "monteclora_config",
    ):
        if config.get(key):
            raise AdapterError(f"{directory} sets {key}, which no linear can hold; train without it")
    if config.get("bias", "none") != "none":
        raise AdapterError(
            f"{directory} trains biases, which the merge does not hold; train with bias='none'"
        )
    _check_start(directory, config.get("init_lora_weights", True))
    keys: dict[str, dict[str, str]] = {}
    copied: dict[str, str] = {}
    try:
        with safe_open(directory / TENSORS, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                match, copy = KEY.match(key), COPY.match(key)
                if copy is not None:
                    copied[f"{copy['name']}.weight"] = key
                    continue
                if match is None:
                    raise AdapterError(f"{directory}: the tensor {key} is not understood")
                keys.setdefault(match["name"], {})[match["part"]] = key
                factor = file.get_tensor(key)
                place = f"{directory}: lora_{match['part']} of {match['name']}"
                if match["part"] in ("A", "B") and factor.ndim != 2:
                    raise AdapterError(f"{place} is not a matrix")
                if not bool(factor.float().isfinite().all()):
                    raise AdapterError(f"{place} is not finite; train it again")
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise AdapterError(f"{directory / TENSORS} cannot be read ({error})") from None
    needed = {"A", "B"} | ({"magnitude_vector"} if config.get("use_dora") else set())
    for name, parts in keys.items():
        if not needed <= set(parts):
            raise AdapterError(f"{directory}: {name} lacks lora_{sorted(needed - set(parts))[0]}")
    return ForeignAdapter(directory, config, keys, copied)


def adapter_digests(directory: Path) -> dict[str, str]:
    """The sha256 of the files that an adapter is made of. Raises: AdapterError if one is not there."""
    try:
        return {name: digest_file(directory / name) for name in (CONFIG, TENSORS)}
    except OSError as error:
        raise AdapterError(f"{directory} is not a PEFT adapter: {error.filename} cannot be read") from None


def _check_start(directory: Path, start: Any) -> None:
    """Raises: AdapterError for an initialisation that changed the base, since the adapter fits only that."""
    name = str(start).lower()
    if not name.startswith(("pissa", "corda")) and name not in {"olora", "loftq", "lora_ga"}:
        return
    way = "save it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=FIRST_ADAPTER)"
    if name == "loftq":
        way = "save that base when training, set init_lora_weights to true, and merge onto it"
    raise AdapterError(
        f"{directory} was started by {start}, which changed the base that it was trained on; {way}"
    )


def _of_module(pattern: dict[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: a pattern is a regular expression for the end of a module's name."""
    with time_limit(PATTERN_SECONDS):
        for key, value in (pattern or {}).items():
            if re.match(rf"(.*\.)?({key})$", name):
                return value
    return default
