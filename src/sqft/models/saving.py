"""`save_pretrained` of a model with integer linears: the checkpoint that every reader of the format opens."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sqft.errors import ModelError
from sqft.models.packing import pack_weight, quantization_config
from sqft.models.quantized_linear import GridLinear
from sqft.ops import GridSpec, QuantizedWeight

__all__ = ["save_as_packed"]

OWN_TENSORS = ("latent", "packed", "scale", "zero_point")


def save_as_packed(model: PreTrainedModel) -> None:
    """Make this model's `save_pretrained` write compressed-tensors in place of our own buffers.

    The codes are those that the linears multiply with: the base's, or the merged ones once
    `merge_and_unload` is through. Fractions of codes, on which training goes on, are not part of a
    checkpoint, and masks lie only in what the pipeline writes.
    """
    # An attribute of the instance: a subclass made here could not be pickled.
    model.save_pretrained = partial(_save_packed, model)


def _save_packed(
    model: PreTrainedModel,
    save_directory: str | Path,
    *args: Any,
    state_dict: dict[str, Tensor] | None = None,
    **options: Any,
) -> None:
    """As `transformers.PreTrainedModel.save_pretrained`. Raises: ModelError for grids that differ."""
    save = partial(type(model).save_pretrained, model, save_directory, *args, **options)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, GridLinear)}
    if not linears or getattr(model, "_hf_peft_config_loaded", False):  # then adapters are all it saves
        save(state_dict=state_dict)
        return
    weights = {name: QuantizedWeight(linear.codes(), linear.qparams) for name, linear in linears.items()}
    grid = _common_grid(weights)
    tensors = dict(model.state_dict() if state_dict is None else state_dict)
    for name, weight in weights.items():
        for end in OWN_TENSORS:
            tensors.pop(f"{name}.{end}", None)
        tensors |= pack_weight(name, weight, grid.scale_dtype)
    others = sorted(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    model.config.quantization_config = quantization_config(grid, others)
    try:
        save(state_dict=tensors)
    finally:
        del model.config.quantization_config


def _common_grid(weights: dict[str, QuantizedWeight]) -> GridSpec:
    """The grid that all weights share; one group a row counts as a group of theirs if it is as wide."""
    sizes = {w.qparams.group_size(w.codes.shape[1]) for w in weights.values() if w.qparams.scale.shape[1] > 1}
    like = GridSpec(0, sizes.pop(), True) if len(sizes) == 1 else None
    grids = {weight.grid(like) for weight in weights.values()}
    if len({grid.layout for grid in grids}) > 1:
        raise ModelError("the quantized linears share no bits, group size and symmetry, as one file needs")
    return max(grids, key=lambda grid: grid.scale_dtype != torch.bfloat16)
