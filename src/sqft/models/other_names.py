"""Tensors that a file calls otherwise than the architecture that computes with them.

The files of GPT-NeoX have embed_out.weight, and transformers' model of it has lm_head.weight. Here a tensor
goes by the name in the model, and is written under it, which transformers reads as well.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings

__all__ = ["RenamedFile", "stored_names"]


class RenamedFile:
    """An opened safetensors file, some of whose tensors go by another name: {name: name in the file}."""

    def __init__(self, file: Any, stored: Mapping[str, str]) -> None:
        self._file, self._stored = file, stored

    def get_tensor(self, name: str) -> Tensor:
        """A tensor by its own name."""
        tensor: Tensor = self._file.get_tensor(self._stored.get(name, name))
        return tensor

    def get_slice(self, name: str) -> Any:
        """What `safe_open` gives to look at a tensor without reading it."""
        return self._file.get_slice(self._stored.get(name, name))


def stored_names(skeleton: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """The model's own names of those tensors that a file calls otherwise, and what it calls them.

    Source: transformers' `conversion_mapping`; only its renamings, which leave the numbers as they are.
    """
    names, own = set(names), skeleton.state_dict()
    renamings = [
        transform
        for transform in get_model_conversion_mapping(skeleton, add_legacy=False)
        if type(transform) is WeightRenaming
    ]
    renamed = {apply_renamings(name, renamings): name for name in names - set(own)}
    return {new: name for new, name in renamed.items() if new in own and new not in names}
