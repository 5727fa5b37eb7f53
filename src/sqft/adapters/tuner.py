"""The PEFT tuner, and its entry in PEFT's tables."""

from collections.abc import Iterable, Iterator
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
from torch import Tensor, nn

from sqft.adapters.checks import check_method
from sqft.adapters.config import PEFT_TYPE, STORAGE_DTYPES, SqftConfig
from sqft.adapters.identity import base_qparams, base_tensor, base_weight, check_identity, identity_of
from sqft.adapters.layer import AdapterLinear, seeded_generator
from sqft.adapters.norm import AdapterNorm, find_norms, norm_dtype, norm_weight
from sqft.adapters.targets import find_quantized, find_targets, in_layers, rank_groups
from sqft.adapters.tuner_layer import TunerLayer, base_dtype
from sqft.errors import AdapterError
from sqft.ops import keep_nonzero
from sqft.ops.mask import existing_mask
from sqft.ops.trained import significant_bits

__all__ = ["SqftModel", "register_peft_method"]


# Scales of others may have more; a trained one is rounded to what float16 holds.
MOST_SCALE_BITS = 11

State = dict[str, Tensor]


class SqftModel(BaseTuner):  # type: ignore[misc]  # peft is untyped
    """Wraps linears in `AdapterLinear` and norms in `AdapterNorm`; made by `peft.get_peft_model`."""

    prefix = "sqft_"
    tuner_layer_cls = TunerLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach an adapter, after checking that it belongs to this base.

        What the adapter depends on is written into a copy of the configuration: the caller's own object can
        be used for the next model.

        Raises: AdapterError if a target is missing, or the adapter was trained on another base.
        """
        config = self.peft_config[adapter_name] = deepcopy(self.peft_config[adapter_name])
        left_out = config.exclude_modules or ()
        low_rank = find_targets(model, config.target_modules, left_out) if config.low_rank else {}
        scaled = self._find_scaled(model, config)
        norms = find_norms(model, config.norm_modules or None) if config.train_norms else {}
        blocks = config.layers_to_transform
        low_rank, scaled, norms = (in_layers(found, blocks) for found in (low_rank, scaled, norms))
        config.layers_to_transform = None  # full names say it from here on
        rank_groups(low_rank, config.rank_groups)
        unknown = sorted(set(config.rank_pattern) - set(low_rank))
        if unknown:
            raise AdapterError(f"the adapter names modules that this model lacks, such as {unknown[0]}")
        if config.storage_dtype is None:
            for name, layer in low_rank.items():
                check_method(config.method, layer, name)
            config.storage_dtype = _storage_dtype(low_rank, rounds=config.method == "sparse_peft")
        _keep_stray_zeros(low_rank, STORAGE_DTYPES[config.storage_dtype])
        found = identity_of(low_rank, scaled, {name: norm_weight(norm) for name, norm in norms.items()})
        check_identity(config.identity, found)
        config.identity = found
        if config.scale_bits is None and scaled:
            config.scale_bits = _scale_bits(scaled.values())
        if config.norm_dtype is None and norms:
            config.norm_dtype = norm_dtype(norms.values())
        config.scale_modules, config.norm_modules = list(scaled), list(norms)
        self.low_rank_modules = set(low_rank)
        config.target_modules, config.exclude_modules = list({**low_rank, **scaled, **norms}), None
        _cast_other_linears(model, {*low_rank.values(), *scaled.values()})
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        # PEFT shortens long lists of names to their ends.
        config.target_modules = list(low_rank) if config.low_rank else list(scaled)

    def _find_scaled(self, model: nn.Module, config: SqftConfig) -> dict[str, nn.Module]:
        """The linears whose scales are trained: of method scales the targets, else every quantized linear."""
        if not config.train_scales:
            return {}
        if config.scale_modules or config.low_rank:
            return find_quantized(model, config.scale_modules or None)
        return find_quantized(model, config.target_modules, config.exclude_modules or ())

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
        for layer in self.model.modules():
            if not isinstance(layer, TunerLayer) or layer.merged_adapters:
                continue
            for name in layer.active_names() if adapter_names is None else adapter_names:
                if name in layer.settings:
                    layer.replacement(name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Called by PEFT around every forward pass.

        Raises: AdapterError for `adapter_names`, which would give each row of a batch its own adapter.
        """
        if kwargs.get("adapter_names") is not None:
            raise AdapterError(
                "adapter_names mixes adapters in one batch, which sqft cannot do: a weight is adapted as a "
                "whole; call set_adapter, and run the rows of one adapter together"
            )
        yield

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT's autocast_adapter_dtype: False keeps an adapter in the 16 bits of its base.

        What it adds is computed in float32 all the same.
        """
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in self.model.modules():
            if autocast_adapter_dtype or not isinstance(layer, TunerLayer):
                continue
            for part in layer.adapter_layer_names:
                parameters = getattr(layer, part)
                if adapter_name in parameters:
                    kept = parameters[adapter_name]
                    kept.data = kept.data.to(base_dtype(layer.base_layer))

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
        layer: TunerLayer
        generator = seeded_generator(f"{peft_config.init_seed}:{current_key}")
        if current_key in peft_config.norm_modules:
            layer = target if isinstance(target, AdapterNorm) else AdapterNorm(target, current_key)
            layer.add_adapter(adapter_name, peft_config, generator)
        else:
            layer = target if isinstance(target, AdapterLinear) else AdapterLinear(target, current_key)
            low_rank = current_key in self.low_rank_modules
            layer.add_adapter(adapter_name, peft_config, generator, low_rank=low_rank)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SqftConfig,
        adapter_name: str,
        state_dict: State,
        unwanted_adapter_names: Any,
    ) -> State:
        """What is saved: of scales and norms the numbers that are served, in the dtype they are stored in."""
        found: State = super()._get_adapter_state_dict(
            model=model,
            config=config,
            adapter_name=adapter_name,
            state_dict=state_dict,
            unwanted_adapter_names=unwanted_adapter_names,
        )
        for key, layer in _trained_in_place(model, found):
            if isinstance(layer, AdapterNorm):
                found[key] = layer.stored_weight(adapter_name, found[key])
            else:
                found[key] = layer.stored_scale(adapter_name, found[key])
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SqftConfig, adapter_name: str, state_dict: State
    ) -> State:
        """What is loaded: the changes that give the saved scales and norms.

        Raises: AdapterError if a tensor is missing or damaged.
        """
        found: State = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        for name, layer in model.named_modules():
            if isinstance(layer, TunerLayer) and adapter_name in layer.settings:
                for part in layer.adapter_layer_names:
                    if adapter_name in getattr(layer, part) and f"{name}.{part}.{adapter_name}" not in found:
                        raise AdapterError(f"the adapter lacks {part} of {layer.module_name}; it is damaged")
        for key, layer in _trained_in_place(model, found):
            if isinstance(layer, AdapterNorm):
                found[key] = layer.change_of_weight(found[key])
            else:
                found[key] = layer.change_of_scale(found[key])
        return found

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT's own version looks for a float weight to take the device from; a quantized layer has none.
        setattr(parent, child_name, new_module)


def _trained_in_place(model: nn.Module, state: State) -> list[tuple[str, AdapterLinear | AdapterNorm]]:
    """The entries of a state that stand for scales or norms of the base, with their layers."""
    found = []
    for key in state:
        path, part, _ = (
            key.rpartition(".sqft_scale.") if ".sqft_scale." in key else key.rpartition(".sqft_norm.")
        )
        if part:
            layer = model.get_submodule(path)
            assert isinstance(layer, AdapterLinear | AdapterNorm)
            found.append((key, layer))
    return found


def _scale_bits(layers: Iterable[nn.Module]) -> int:
    """The significant bits of the base's scales, as far as a trained scale is to have them."""
    grids = [base_qparams(layer) for layer in layers]
    return min(MOST_SCALE_BITS, max(significant_bits(grid.scale) for grid in grids if grid is not None))


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
