"""The PEFT tuner, and its entry in PEFT's tables."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
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
from sqft.adapters.identity import base_identity, base_qparams, base_tensor, base_weight, check_identity
from sqft.adapters.layer import AdapterLinear, check_method, seeded_generator
from sqft.adapters.space import adapter_layers
from sqft.adapters.targets import find_targets, rank_groups
from sqft.errors import AdapterError
from sqft.ops import keep_nonzero
from sqft.ops.mask import existing_mask

__all__ = ["SqftModel", "register_peft_method"]


class SqftModel(BaseTuner):  # type: ignore[misc]  # peft is untyped
    """Wraps the target modules of a model in `AdapterLinear`; made by `peft.get_peft_model`."""

    prefix = "sqft_"
    tuner_layer_cls = AdapterLinear
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach an adapter, after checking that it belongs to this base.

        What the adapter depends on is written into a copy of the configuration: the caller's own object can
        be used for the next model.

        Raises: AdapterError if a target is missing, or the adapter was trained on another base.
        """
        config = self.peft_config[adapter_name] = deepcopy(self.peft_config[adapter_name])
        layers = find_targets(model, config.target_modules)
        names = sorted(layers, key=list(layers).index)
        rank_groups(names, config.rank_groups)
        unknown = sorted(set(config.rank_pattern) - set(names))
        if unknown:
            raise AdapterError(f"the adapter names modules that this model lacks, such as {unknown[0]}")
        if config.storage_dtype is None:
            for name, layer in layers.items():
                check_method(config.method, layer, name)
            config.storage_dtype = _storage_dtype(layers, rounds=config.method == "sparse_peft")
        _keep_stray_zeros(layers, getattr(torch, config.storage_dtype))
        found = base_identity(model, names)
        check_identity(config.identity, found)
        config.identity = found
        config.target_modules = names
        _cast_other_linears(model, set(layers.values()))
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config.target_modules = names  # PEFT shortens long lists of names to their ends

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge every layer, or none of them.

        Raises: AdapterError if one of them cannot be merged; the model is then as it was.
        """
        self._check_merge(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge(adapter_names)
        base: nn.Module = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        return base

    def _check_merge(self, adapter_names: list[str] | None) -> None:
        """Work out every merged weight before the first one is put in its place, as one may be refused."""
        for layer in adapter_layers(self.model).values():
            for name in layer.active_names() if adapter_names is None else adapter_names:
                if name in layer.sqft_A and not layer.merged_adapters:
                    layer.merged_weight(name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Called by PEFT around every forward pass.

        Raises: AdapterError for `adapter_names`, which would give each row of a batch its own adapter.
        """
        if kwargs.get("adapter_names") is not None:
            raise AdapterError(
                "adapter_names gives each row its own adapter, which sqft cannot: a weight is adapted as a "
                "whole; call set_adapter, and run the rows of one adapter together"
            )
        yield

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


def _storage_dtype(layers: dict[str, nn.Module], *, rounds: bool) -> str:
    """The dtype that merged weights are stored in: that of the weights.

    rounds: training rounds to it. It is then the narrowest dtype that holds every weight, since a checkpoint
    in bfloat16 may be opened in float32, and saved in bfloat16 again.
    """
    weights = [base_weight(layer) for layer in layers.values() if base_qparams(layer) is None]
    dtypes = {weight.dtype for weight in weights} or {torch.float32}
    if len(dtypes) > 1:
        names = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise AdapterError(f"the adapted modules are stored in {', '.join(names)}; use one dtype")
    dtype = dtypes.pop()
    if rounds and dtype == torch.float32:
        for narrow in (torch.bfloat16, torch.float16):
            if all(torch.equal(weight.to(narrow).to(dtype), weight) for weight in weights):
                dtype = narrow
                break
    return str(dtype).removeprefix("torch.")


def _keep_stray_zeros(layers: dict[str, nn.Module], storage_dtype: torch.dtype) -> None:
    """Make the mask of a dense weight, `base != 0`, say kept everywhere, as `models.load_trainable` does.

    A stray exact 0 becomes the smallest normal number of the storage dtype, so that an adapter may change
    it, and is the same adapter whichever way the model was opened.
    """
    for layer in layers.values():
        base = base_tensor(layer)
        if base_qparams(layer) is None and not base.is_meta and existing_mask(base) is None:
            kept = keep_nonzero(base.to(storage_dtype), torch.ones_like(base, dtype=torch.bool))
            zeros = base == 0
            base[zeros] = kept[zeros].to(base.dtype)


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
