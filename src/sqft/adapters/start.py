"""An adapter that exists already, as the start of a further training: one of ours, or a stock LoRA.

It goes on only as it was trained: with its method, ranks and scaling, on its linears, and on its base, whose
digests it holds. A stock LoRA holds none, so that only its shapes tell whether it fits.
"""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sqft.adapters.config import PEFT_TYPE, SqftConfig
from sqft.adapters.lora_files import CONFIG, CONFIG_BYTES, TENSORS, ForeignAdapter, open_foreign_adapter
from sqft.errors import AdapterError
from sqft.sections import AdapterSection
from sqft.untrusted import read_bounded

__all__ = ["StartingAdapter", "open_start"]

Shapes = Mapping[str, tuple[int, int]]
PREFIX = "base_model.model."
SHOWN = 4  # names of linears in a message


@dataclass(frozen=True)
class StartingAdapter:
    """What a training goes on from.

    config: as the adapter states it; of a stock LoRA the same in our terms. Its rank_pattern is empty where
    all ranks that were trained are there, so that they are drawn and searched again. tensors: by our names.
    """

    directory: Path
    config: SqftConfig
    tensors: dict[str, Tensor]

    def check_settings(self, section: AdapterSection, low_rank: Shapes, scaled: Collection[str]) -> None:
        """Compare with what a recipe would train.

        low_rank: (out, in) of the linears with a low-rank update, by name; scaled: those with trained scales.

        Raises: AdapterError that names every setting to change, or what of the model does not fit.
        """
        config = self.config
        wanted: dict[str, Any] = {"method": config.method}
        if config.low_rank:
            wanted |= {"ranks": config.ranks, "alpha": config.alpha}
        wanted |= {"train_scales": config.train_scales, "train_norms": config.train_norms}
        given = section.model_dump() | {
            "train_scales": section.trains_scales,
            "train_norms": section.trains_norms,
        }
        differing = [name for name, value in wanted.items() if not _is_same(given[name], value)]
        if "method" in differing:  # which says it of scales and norms too, unless they were chosen
            usual = config.method == "scales"
            differing = [
                name for name in differing if not (name.startswith("train_") and wanted[name] is usual)
            ]
        if differing:
            settings = ", ".join(f"adapters.{name}: {json.dumps(wanted[name])}" for name in differing)
            raise AdapterError(f"{self.directory} goes on only as it was trained: set {settings}")
        self._check_linears(set(low_rank), self.names("A"), "update")
        self._check_linears(set(scaled), self.names("scale"), "trained scales")
        for name, shape in low_rank.items():
            rows, columns = (self.tensors[f"{PREFIX}{name}.sqft_{part}"].shape for part in ("B", "A"))
            if (rows[0], columns[1]) != shape:
                raise AdapterError(
                    f"{self.directory} is of another model: its adapter of {name} is for a weight of "
                    f"{rows[0]} x {columns[1]}, the model has {shape[0]} x {shape[1]}"
                )

    def load_into(self, model: nn.Module) -> None:
        """Give an attached adapter these weights.

        Raises: AdapterError if one is missing, or does not fit its layer.
        """
        set_peft_model_state_dict(model, dict(self.tensors))

    def names(self, part: str) -> set[str]:
        """The modules that have an A, a B, a scale or a norm here."""
        end = f".sqft_{part}"
        return {key.removeprefix(PREFIX).removesuffix(end) for key in self.tensors if key.endswith(end)}

    def _check_linears(self, chosen: set[str], trained: set[str], what: str) -> None:
        if chosen == trained:
            return
        missing, beyond = sorted(trained - chosen), sorted(chosen - trained)
        there = f"it has {what} on {missing[0]}, which the recipe leaves out" if missing else ""
        not_there = f"it has no {what} on {beyond[0]}, which the recipe chooses" if beyond else ""
        both = ", and ".join(filter(None, (there, not_there)))
        ends = sorted({name.rpartition(".")[2] for name in trained})
        raise AdapterError(
            f"{self.directory} goes on only as it was trained: {both}; name its linears in "
            f"adapters.target_modules ({', '.join(ends[:SHOWN])}{', ...' if len(ends) > SHOWN else ''})"
        )


def open_start(directory: Path) -> StartingAdapter:
    """Open an adapter that a training is to go on from: one that sqft trained, or a stock LoRA.

    Raises: AdapterError if it is missing, damaged or of another kind.
    """
    path = directory / CONFIG
    try:
        values = json.loads(read_bounded(path, CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AdapterError(f"{directory} is not an adapter: {path.name} cannot be read ({reason})") from None
    if isinstance(values, dict) and values.get("peft_type") == "LORA":
        return _from_lora(open_foreign_adapter(directory))
    if not isinstance(values, dict) or values.get("peft_type") != PEFT_TYPE:
        kind = values.get("peft_type") if isinstance(values, dict) else None
        raise AdapterError(f"{directory} is an adapter of the type {kind}; SQFT and LORA can go on")
    if values.get("modules_to_save"):
        raise AdapterError(f"{directory} trains whole modules (modules_to_save), which a recipe does not")
    known = {field.name for field in fields(SqftConfig) if field.init}
    try:
        config = SqftConfig(**{name: value for name, value in values.items() if name in known})
        if not _is_plain(config):
            raise TypeError("a value is of another kind")
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise AdapterError(f"{path} is damaged ({reason})") from None
    try:
        tensors = load_file(directory / TENSORS)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise AdapterError(f"{directory / TENSORS} cannot be read ({error})") from None
    return _checked(directory, config, tensors)


def _from_lora(adapter: ForeignAdapter) -> StartingAdapter:
    """A stock LoRA in our terms: rank and scaling of every linear are kept.

    Raises: AdapterError for DoRA, and where the linears are scaled differently.
    """
    directory = adapter.directory
    if adapter.copied:
        raise AdapterError(
            f"{directory} holds embeddings beside its linears, which cannot go on; train without"
        )
    if adapter.config.get("use_dora"):
        raise AdapterError(
            f"{directory} is a DoRA, and method lora trains no magnitudes; only LoRA can go on"
        )
    scalings = {name: adapter.scaling(name) for name in adapter.names}
    first = next(iter(scalings.values()), 0.0)
    if not all(math.isclose(scaling, first) for scaling in scalings.values()):
        raise AdapterError(f"{directory} scales its linears differently (alpha_pattern); that cannot go on")
    tensors: dict[str, Tensor] = {}
    for name in adapter.names:
        lora_A, lora_B = adapter.factors(name)
        tensors |= {f"{PREFIX}{name}.sqft_A": lora_A, f"{PREFIX}{name}.sqft_B": lora_B}
    ranks = {name: tensors[f"{PREFIX}{name}.sqft_A"].shape[0] for name in adapter.names}
    largest = (
        int(adapter.config["r"]) if adapter.config.get("rank_pattern") else max(ranks.values(), default=1)
    )
    config = SqftConfig(method="lora", ranks=[largest], alpha=first * largest, rank_pattern=ranks)
    return _checked(directory, config, tensors)


def _checked(directory: Path, config: SqftConfig, tensors: dict[str, Tensor]) -> StartingAdapter:
    start = StartingAdapter(directory, config, tensors)
    for name in start.names("A") | start.names("B") | set(config.rank_pattern):
        rank = config.rank_of(name)
        for part, side in (("A", 0), ("B", 1)):
            factor = tensors.get(f"{PREFIX}{name}.sqft_{part}")
            if factor is None or factor.ndim != 2 or factor.shape[side] != rank:
                raise AdapterError(f"{directory} is damaged: it has no sqft_{part} of rank {rank} for {name}")
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{directory} cannot go on: {key} is not finite; train it again")
    if len(config.ranks) == 1 and set(config.rank_pattern.values()) == set(config.ranks):
        config.rank_pattern = {}  # nothing was left out of it
    return start


def _is_same(given: Any, wanted: Any) -> bool:
    if isinstance(wanted, float) and isinstance(given, float | int):
        return math.isclose(given, wanted)
    return bool(given == wanted)


def _is_plain(config: SqftConfig) -> bool:
    pattern, identity = config.rank_pattern, config.identity
    return (
        isinstance(pattern, dict)
        and isinstance(identity, dict)
        and all(isinstance(rank, int) and rank >= 0 for rank in pattern.values())
        and all(isinstance(digest, str) for digest in identity.values())
    )
