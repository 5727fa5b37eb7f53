"""What every adapter layer does for PEFT: which adapter is active, merging into the base, and undoing it."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from sqft.adapters.config import SqftConfig
from sqft.errors import AdapterError

__all__ = ["TunerLayer", "base_dtype", "device_of", "start_values"]


class TunerLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]  # peft is untyped
    """A wrapper around a layer of the base, with any number of adapters of which one is active at a time.

    A subclass names its parameters in `adapter_layer_names` (each a ParameterDict by adapter), and says what
    it computes and what a merge puts in the place of the base's tensors.
    """

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ("settings",)
    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module, module_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.module_name = module_name
        self.settings: dict[str, SqftConfig] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.kept: dict[str, Tensor] = {}
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())

    def active_name(self) -> str | None:
        """The adapter that runs, or None.

        Raises: AdapterError if there are several.
        """
        names = [name for name in self.active_names() if name in self.settings]
        if len(names) > 1:
            raise AdapterError(
                f"{self.module_name} has {len(names)} active adapters; sqft runs one at a time"
            )
        return names[0] if names else None

    def active_names(self) -> list[str]:
        """The adapters that are switched on, whether or not this layer has them."""
        return [self._active_adapter] if isinstance(self._active_adapter, str) else self._active_adapter

    def forward(
        self, x: Float[Tensor, "*batch in"], *args: Any, **kwargs: Any
    ) -> Float[Tensor, "*batch out"]:
        """The layer's output with the active adapter, or the base's if there is none."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        name = self.active_name()
        if self.disable_adapters or self.merged or name is None:
            return self._base_forward(x)
        self._check_step(name)
        return self._adapted_forward(x, name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put what was trained in the place of the base; `unmerge` brings the very same base back.

        safe_merge changes nothing: what is not finite is always refused.

        Raises: AdapterError if it cannot be merged.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.settings:
                continue
            if self.merged_adapters:
                raise AdapterError(
                    f"{self.module_name} has a merged adapter; unmerge it before merging '{name}'"
                )
            with torch.no_grad():
                replacement = self.replacement(name)
            self.kept = {key: self._exchange(key, tensor) for key, tensor in replacement.items()}
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Undo `merge`."""
        for key, tensor in self.kept.items():
            self._exchange(key, tensor)
        self.kept = {}
        self.merged_adapters.clear()

    def _exchange(self, key: str, tensor: Tensor) -> Tensor:
        """Put a tensor in the place of one of the base layer's, and return the old one."""
        there = getattr(self.base_layer, key)
        if isinstance(there, nn.Parameter):
            before = there.data
            there.data = tensor.to(before.dtype)
            return before
        setattr(self.base_layer, key, tensor)
        return there

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, None]:
        # PEFT would cast an adapter to the dtype of its base where it moves it; ours stays in float32.
        return device_of(base_layer), None

    def _check_step(self, name: str) -> None:
        """Refuse to train where the training loop left out what the layer needs of it."""

    @abstractmethod
    def _base_forward(self, x: Tensor) -> Tensor:
        """The output of the base."""

    @abstractmethod
    def _adapted_forward(self, x: Tensor, name: str) -> Tensor:
        """The output with an adapter."""

    @abstractmethod
    def replacement(self, name: str) -> dict[str, Tensor]:
        """What a merge puts in the place of the base's tensors, by their attribute of the base layer.

        Raises: AdapterError if the adapter cannot be merged.
        """


def device_of(layer: nn.Module) -> torch.device:
    """The device of a layer's tensors."""
    for tensor in (*layer.parameters(), *layer.buffers()):
        return tensor.device
    return torch.device("cpu")


def base_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype that a layer of the base computes in."""
    weight = getattr(layer, "weight", None)
    dtype = weight.dtype if isinstance(weight, Tensor) else getattr(layer, "compute_dtype", None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32


def start_values(
    shape: Sequence[int], config: SqftConfig, generator: torch.Generator
) -> Float[Tensor, "..."]:
    """What a part of an adapter starts from: 0, or with `init_weights` False uniform in ±1/8."""
    if config.init_weights:
        return torch.zeros(*shape)
    return (torch.rand(*shape, generator=generator) - 0.5) / 4
