"""Elastic ranks: the space of sub-adapters inside a super-adapter.

Source: Shears (arXiv 2404.10934) and LoNAS, which SQFT (arXiv 2410.03750, section 3.2) takes up as NLS.
"""

import hashlib
from dataclasses import dataclass

from torch import nn

from sqft.adapters.config import SqftConfig
from sqft.adapters.layer import AdapterLinear
from sqft.adapters.norm import AdapterNorm
from sqft.adapters.targets import rank_groups
from sqft.errors import AdapterError

__all__ = [
    "SearchSpace",
    "SubAdapter",
    "adapter_config",
    "adapter_layers",
    "norm_layers",
    "set_ranks",
    "set_step",
]

SubAdapter = dict[str, int]


@dataclass(frozen=True)
class SearchSpace:
    """Every choice of one rank for each group of modules.

    groups: group name -> names of the modules that share a rank; ranks: the choices, largest first.
    """

    groups: dict[str, tuple[str, ...]]
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, peft_model: nn.Module) -> "SearchSpace":
        """The space of a model with an sqft adapter: of one for a fixed rank.

        Empty where there is nothing to choose: for method scales, and for an extracted sub-adapter, which has
        one rank for each module.

        Raises: AdapterError if there is no sqft adapter.
        """
        config = adapter_config(peft_model)
        chooses = config.low_rank and not config.rank_pattern
        names = (config.target_modules or []) if chooses else []
        return cls(rank_groups(names, config.rank_groups), tuple(config.ranks))

    def maximal(self) -> SubAdapter:
        """The largest rank everywhere."""
        return self._everywhere(0)

    def median(self) -> SubAdapter:
        """The middle rank everywhere, the paper's heuristic; of two, the smaller that is not 0."""
        middle = len(self.ranks) // 2
        return self._everywhere(middle - 1 if self.ranks and not self.ranks[middle] else middle)

    def minimal(self) -> SubAdapter:
        """The smallest rank everywhere."""
        return self._everywhere(-1)

    def _everywhere(self, index: int) -> SubAdapter:
        return dict.fromkeys(self.groups, self.ranks[index]) if self.groups else {}

    def ranks_at(self, seed: int, step: int) -> SubAdapter:
        """The sub-adapter of an optimizer step: uniform in the space, a pure function of (seed, step)."""
        return {group: self.ranks[_draw(f"{seed}:{step}:{group}", len(self.ranks))] for group in self.groups}

    def modules(self, sub_adapter: SubAdapter) -> dict[str, int]:
        """The rank of every module.

        Raises: AdapterError if a group is missing or unknown, or a rank is not in the space.
        """
        wrong = sorted(set(sub_adapter) ^ set(self.groups))
        if wrong:
            raise AdapterError(
                f"a sub-adapter names every rank group once; '{wrong[0]}' is missing or unknown"
            )
        for group, rank in sub_adapter.items():
            if rank not in self.ranks:
                raise AdapterError(f"rank {rank} of {group} is none of {', '.join(map(str, self.ranks))}")
        return {name: sub_adapter[group] for group, names in self.groups.items() for name in names}


def set_ranks(peft_model: nn.Module, sub_adapter: SubAdapter) -> None:
    """Make a sub-adapter the active one in every layer.

    Raises: AdapterError if it does not fit the model's search space.
    """
    ranks = SearchSpace.of(peft_model).modules(sub_adapter)
    layers = adapter_layers(peft_model)
    for name, rank in ranks.items():
        layers[name].set_rank(rank)


def set_step(peft_model: nn.Module, seed: int, step: int) -> None:
    """Tell every layer the optimizer step, on which column dropout and the hybrid gradient depend.

    Both are pure functions of (seed, step), so accumulation, recomputation and several processes agree.
    """
    for layer in adapter_layers(peft_model).values():
        layer.seed_and_step = (seed, step)


def adapter_layers(peft_model: nn.Module) -> dict[str, AdapterLinear]:
    """The linears that the active adapter trains, by the name of what they wrap, in the model's order."""
    layers = (m for m in peft_model.modules() if isinstance(m, AdapterLinear))
    return {layer.module_name: layer for layer in layers if layer.active_name() is not None}


def norm_layers(peft_model: nn.Module) -> dict[str, AdapterNorm]:
    """The norms that the active adapter trains, by the name of what they wrap, in the model's order."""
    layers = (m for m in peft_model.modules() if isinstance(m, AdapterNorm))
    return {layer.module_name: layer for layer in layers if layer.active_name() is not None}


def adapter_config(peft_model: nn.Module) -> SqftConfig:
    """The active adapter's configuration.

    Raises: AdapterError if the model has no sqft adapter.
    """
    for layer in adapter_layers(peft_model).values():
        name = layer.active_name()
        if name is not None:
            return layer.settings[name]
    raise AdapterError("this model has no active sqft adapter; attach one first")


def _draw(text: str, choices: int) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % choices
