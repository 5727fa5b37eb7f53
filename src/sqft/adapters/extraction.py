"""Writing one sub-adapter of a super-adapter as an adapter of its own."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from sqft.adapters.config import SqftConfig
from sqft.adapters.space import SearchSpace, SubAdapter, adapter_config, adapter_layers
from sqft.artifacts import write_json
from sqft.directories import new_directory
from sqft.errors import AdapterError

__all__ = ["extract_sub_adapter"]


def extract_sub_adapter(peft_model: nn.Module, sub_adapter: SubAdapter, directory: Path) -> None:
    """Write the slices lora_A[:r], lora_B[:, :r] of every module as an adapter directory.

    A lora adapter becomes a stock PEFT one, in names and configuration, that loads without sqft; a masked or
    quantization-aware one keeps the type SQFT, since a loader that ignores the mask would run it dense.
    Trained scales and norms, and modules that were trained whole (`modules_to_save`), go along. PEFT knows no
    rank 0, so a stock adapter leaves such modules out.

    Of an extracted sub-adapter, which leaves no choice, every rank is written.

    Raises: AdapterError if the sub-adapter does not fit the search space, or has rank 0 everywhere.
    """
    config = adapter_config(peft_model)
    ranks = SearchSpace.of(peft_model).modules(sub_adapter) or config.rank_pattern
    plain = config.method == "lora"
    if ranks and not any(ranks.values()):
        raise AdapterError("a sub-adapter with rank 0 everywhere adapts nothing; choose another")
    if plain:
        ranks = {name: rank for name, rank in ranks.items() if rank}
    tensors = _beside_factors(peft_model)
    for name, layer in adapter_layers(peft_model).items():
        adapter = layer.active_name()
        assert adapter is not None
        key = f"base_model.model.{name}"
        if adapter not in layer.sqft_A or name not in ranks:
            continue
        for kind, tensor in (
            ("A", layer.sqft_A[adapter][: ranks[name]]),
            ("B", layer.sqft_B[adapter][:, : ranks[name]]),
        ):
            full = f"{key}.lora_{kind}.weight" if plain else f"{key}.sqft_{kind}"
            tensors[full] = tensor
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    values = (
        _lora_values(config, ranks)
        if plain
        else replace(config, rank_pattern=ranks, inference_mode=True).to_dict()
    )
    with new_directory(directory) as partial:
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(partial / "adapter_config.json", values)


def _beside_factors(peft_model: nn.Module) -> dict[str, Tensor]:
    """What PEFT saves of an adapter beside its low-rank factors: scales, norms, modules trained whole."""
    layers = adapter_layers(peft_model)
    adapter = next(iter(layers.values())).active_name()
    saved = get_peft_model_state_dict(peft_model, adapter_name=adapter)
    return {key: tensor for key, tensor in saved.items() if not key.endswith((".sqft_A", ".sqft_B"))}


def _lora_values(config: SqftConfig, ranks: dict[str, int]) -> dict[str, Any]:
    """PEFT divides alpha by a module's own rank, so alpha shrinks with the rank to keep the scaling."""
    lora = LoraConfig(
        r=config.max_rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=sorted(ranks),
        rank_pattern={name: rank for name, rank in ranks.items() if rank != config.max_rank},
        alpha_pattern={
            name: rank * config.scaling for name, rank in ranks.items() if rank != config.max_rank
        },
        task_type=config.task_type,
        modules_to_save=config.modules_to_save,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
    values: dict[str, Any] = lora.to_dict()
    values["target_modules"] = sorted(ranks)
    return json.loads(json.dumps(values, default=sorted, sort_keys=True))
