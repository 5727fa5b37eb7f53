"""The PEFT tuner, and its entry in PEFT's tables."""

from typing import Any, ClassVar

import torch
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from sqft.adapters.config import PEFT_TYPE, SqftConfig
from sqft.adapters.identity import base_identity, base_weight, check_identity
from sqft.adapters.layer import AdapterLinear, check_method, seeded_generator
from sqft.adapters.targets import find_targets, rank_groups
from sqft.errors import AdapterError

__all__ = ["SqftModel", "register_peft_method"]


class SqftModel(BaseTuner):  # type: ignore[misc]  # peft is untyped
    """Wraps the target modules of a model in `AdapterLinear`; made by `peft.get_peft_model`."""

    prefix = "sqft_"
    tuner_layer_cls = AdapterLinear
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach an adapter, after checking that it belongs to this base.

        Raises: AdapterError if a target is missing, or the adapter was trained on another base.
        """
        config = self.peft_config[adapter_name]
        layers = find_targets(model, config.target_modules)
        names = sorted(layers, key=list(layers).index)
        rank_groups(names, config.rank_groups)
        unknown = sorted(set(config.rank_pattern) - set(names))
        if unknown:
            raise AdapterError(f"the adapter names modules that this model lacks, such as {unknown[0]}")
        found = base_identity(model, names)
        check_identity(config.identity, found)
        config.identity = found
        if config.storage_dtype is None:
            for name, layer in layers.items():
                check_method(config.method, layer, name)
            dtypes = {str(base_weight(layer).dtype).removeprefix("torch.") for layer in layers.values()}
            if len(dtypes) > 1:
                raise AdapterError(
                    f"the adapted modules are stored in {', '.join(sorted(dtypes))}; use one dtype"
                )
            config.storage_dtype = dtypes.pop()
        config.target_modules = names
        _cast_other_linears(model, set(layers.values()))
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config.target_modules = names  # PEFT shortens long lists of names to their ends

    def _prepare_adapter_config(self, peft_config: SqftConfig, model_config: dict[str, Any]) -> SqftConfig:
        return peft_config

    def _create_and_replace(
        self,
        peft_config: SqftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, AdapterLinear) else AdapterLinear(target, current_key)
        layer.add_adapter(
            adapter_name, peft_config, seeded_generator(f"{peft_config.init_seed}:{current_key}")
        )
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT's own version looks for a float weight to take the device from; a quantized layer has none.
        setattr(parent, child_name, new_module)


def _cast_other_linears(model: nn.Module, adapted: set[nn.Module]) -> None:
    """Bring linears without an adapter to the compute dtype; adapted ones cast their stored weights."""
    dtype = getattr(getattr(model, "config", None), "dtype", None)
    if not isinstance(dtype, torch.dtype):
        return
    inside = {inner for layer in adapted for inner in layer.modules()}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module not in inside and module.weight.dtype != dtype:
            module.to(dtype)


def register_peft_method() -> None:
    """Enter the method into PEFT's tables. A PEFT without sqft stops at `KeyError: 'SQFT'`."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = SqftConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = SqftModel
    PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = SqftModel.prefix
