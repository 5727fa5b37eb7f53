"""The adapter layer of a norm: its weight is trained, and rounded to its stored dtype in every forward pass.

    y = norm(x; weight),   weight = round_storage(base + change)

The norm's own code runs, whatever kind of norm it is, with another weight.
"""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from sqft.adapters.config import STORAGE_DTYPES, SqftConfig
from sqft.adapters.tuner_layer import TunerLayer, start_values
from sqft.errors import AdapterError
from sqft.models.blocks import is_norm
from sqft.ops.trained import trained_norm

__all__ = ["AdapterNorm", "find_norms", "norm_dtype"]


def find_norms(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The norms of a model that have a weight of one dimension, wrapped or not, by full name in its order.

    names: exactly these; None all.

    Raises: AdapterError if there is none, or one of the names is not there.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inner = name.rpartition(".")[2] == "base_layer"
        if is_norm(module) and not inner:
            found[name] = module
    missing = sorted(set(names or ()) - set(found))
    if missing:
        raise AdapterError(f"the adapter trains the norm {missing[0]}, which this model lacks")
    if not found:
        raise AdapterError("this model has no norm with a weight; switch train_norms off")
    return found if names is None else {name: found[name] for name in found if name in set(names)}


def norm_weight(layer: nn.Module) -> Tensor:
    """The weight of a norm of the base, even while a trained one is merged into it."""
    kept: dict[str, Tensor] = getattr(layer, "kept", {})
    weight = kept.get("weight", getattr(layer, "base_layer", layer).weight)
    assert isinstance(weight, Tensor)
    return weight.detach()


def norm_dtype(norms: Iterable[nn.Module]) -> str:
    """The dtype in which the weights of norms are stored.

    `load_trainable` says so of each norm. Else it is that of the weights, or of float32 ones the narrowest
    that holds them all: a bfloat16 checkpoint may be opened in float32. Of several dtypes it is float32.
    """
    weights = [norm_weight(norm) for norm in norms]
    stated = [getattr(getattr(norm, "base_layer", norm), "stored_dtype", None) for norm in norms]
    dtypes = {known or weight.dtype for known, weight in zip(stated, weights, strict=True)}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    if dtype == torch.float32 and not any(stated):
        narrow = (torch.bfloat16, torch.float16)
        fitting = [d for d in narrow if all(torch.equal(w.to(d).float(), w.float()) for w in weights)]
        dtype = fitting[0] if fitting else dtype
    return str(dtype).removeprefix("torch.")


class AdapterNorm(TunerLayer):
    """A norm with trained weights: sqft_norm[name] (features,) is the change, float32."""

    adapter_layer_names = ("sqft_norm",)
    sqft_norm: nn.ParameterDict

    def add_adapter(self, adapter_name: str, config: SqftConfig, generator: torch.Generator) -> None:
        """Add an adapter that changes nothing, unless the configuration says otherwise (`init_weights`)."""
        weight = norm_weight(self)
        change = start_values(weight.shape, config, generator)
        self.sqft_norm[adapter_name] = nn.Parameter(change.to(weight.device))
        self.settings[adapter_name] = config

    def trained(self, name: str) -> Float[Tensor, " features"]:
        """The weight that this norm multiplies with, float32; differentiable in the change."""
        return trained_norm(norm_weight(self), self.sqft_norm[name].float(), self._dtype(name))

    def stored(self, name: str | None = None) -> Tensor:
        """The trained weight as it is stored; default that of the active adapter.

        Raises: AdapterError if there is no such adapter, or a weight is not finite.
        """
        name = name or self.active_name()
        if name is None or name not in self.sqft_norm:
            raise AdapterError(f"{self.module_name} has no adapter '{name}' to merge")
        return self.stored_weight(name, self.sqft_norm[name].detach())

    def stored_weight(self, name: str, change: Tensor) -> Tensor:
        """The weight of a change, as it is stored.

        Raises: AdapterError if it is not finite.
        """
        base, dtype = norm_weight(self), self._dtype(name)
        weight = trained_norm(base, change.to(base.device), dtype).to(dtype)
        _check_finite(weight, f"the trained weight of {self.module_name}")
        return weight

    def change_of_weight(self, stored: Tensor) -> Float[Tensor, " features"]:
        """The change that gives a stored weight.

        Raises: AdapterError if it is not of the base's shape, or not finite.
        """
        base = norm_weight(self)
        if stored.shape != base.shape:
            raise AdapterError(
                f"the adapter's weight of {self.module_name} has {stored.numel()} numbers, the base's "
                f"{base.numel()}; it belongs to another model"
            )
        _check_finite(stored, f"the adapter's weight of {self.module_name}")
        return stored.to(base.device).float() - base.float()

    def _dtype(self, name: str) -> torch.dtype:
        dtype = self.settings[name].norm_dtype
        assert dtype is not None
        return STORAGE_DTYPES[dtype]

    def _base_forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x)
        return out

    def _adapted_forward(self, x: Tensor, name: str) -> Tensor:
        weight = self.trained(name).to(norm_weight(self).dtype)  # exact: it holds the stored dtype
        out: Tensor = functional_call(self.base_layer, {"weight": weight}, (x,))
        return out

    def replacement(self, name: str) -> dict[str, Tensor]:
        """The trained weight."""
        return {"weight": self.stored(name)}


def _check_finite(weight: Tensor, what: str) -> None:
    if not bool(weight.isfinite().all()):
        raise AdapterError(f"{what} is not finite; train again at a lower norm_learning_rate")
