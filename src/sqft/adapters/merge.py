"""Merging: the adapted weights in the form of the base, and their digest."""

from collections.abc import Iterator

from torch import Tensor, nn

from sqft.adapters.identity import digest_tensors
from sqft.adapters.layer import AdapterLinear, MergedWeight
from sqft.adapters.norm import AdapterNorm
from sqft.adapters.space import adapter_config, adapter_layers, norm_layers
from sqft.ops import QuantizedWeight

__all__ = ["codes_digest", "count_differing_codes", "merge_adapters", "merge_norms"]


def merge_adapters(peft_model: nn.Module) -> dict[str, MergedWeight]:
    """The merged weight of every adapted module, by full name; the model is left as it is.

    Codes come from `ops.adapted_codes`, weights from `ops.adapted_weight` rounded to the storage dtype.

    Raises: AdapterError if the adapter cannot be merged without losing zeros or the grid.
    """
    adapter_config(peft_model)
    return {name: layer.merged_weight() for name, layer in adapter_layers(peft_model).items()}


def merge_norms(peft_model: nn.Module) -> dict[str, Tensor]:
    """The trained weight of every norm, by the norm's full name, in its stored dtype; empty without any.

    Raises: AdapterError if there is no adapter, or a weight is not finite.
    """
    adapter_config(peft_model)
    return {name: layer.stored() for name, layer in norm_layers(peft_model).items()}


def codes_digest(peft_model: nn.Module) -> str:
    """The sha256 of what a merge would write now: codes, or weights in the storage dtype, by sorted name.

    Trained scales of a linear NAME stand in it as NAME.scale, float32, and a trained norm's weight as stored.
    Of every tensor the digest takes name, dtype and shape (`name\\0dtype\\0(out, in)\\0`) and then its bytes.
    One module is merged at a time. Raises: as `merge_adapters`.
    """
    adapter_config(peft_model)
    return digest_tensors(_merged_tensors(peft_model))


def count_differing_codes(peft_model: nn.Module) -> tuple[int, int]:
    """How many weights the training layer computes to another value than a merge writes, and of how many.

    On a CPU there are none; on a GPU a few weights near the boundary of two codes may differ.

    Raises: as `merge_adapters`.
    """
    adapter_config(peft_model)
    differing = total = 0
    for layer in adapter_layers(peft_model).values():
        merged = layer.merged_weight().dequantized()
        differing += int((layer.trained_weight() != merged).sum())
        total += merged.numel()
    return differing, total


def _merged_tensors(peft_model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    layers: dict[str, AdapterLinear | AdapterNorm] = {**adapter_layers(peft_model), **norm_layers(peft_model)}
    for name, layer in sorted(layers.items()):
        if isinstance(layer, AdapterNorm):
            yield name, layer.stored()
            continue
        weight = layer.merged_weight().weight
        yield name, weight if isinstance(weight, Tensor) else weight.codes
        if isinstance(weight, QuantizedWeight) and (layer.active_name() or "") in layer.sqft_scale:
            yield f"{name}.scale", weight.qparams.scale
