"""Learning rates: one for low-rank updates, and one each for scales and norms that are trained in place."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from sqft.adapters.unrounded import trained_in_place
from sqft.sections import TrainingSection

__all__ = ["rate_names", "split_by_rate"]

SETTINGS = {"sqft_scale": "scale_learning_rate", "sqft_norm": "norm_learning_rate"}


def split_by_rate(
    groups: list[dict[str, Any]], model: nn.Module, section: TrainingSection
) -> Iterator[dict[str, Any]]:
    """An optimizer's groups, cut so that scales and norms have the rates that the section gives them."""
    kinds = {id(p): part for part in SETTINGS for p in trained_in_place(model, part).values()}
    for group in groups:
        for part in ("", *SETTINGS):
            parameters = [p for p in group["params"] if kinds.get(id(p), "") == part]
            if parameters:
                rate = {"lr": getattr(section, SETTINGS[part])} if part else {}
                yield group | {"params": parameters} | rate


def rate_names(model: nn.Module, place: str) -> str:
    """The settings of a section that hold the learning rates of what a model trains, for a message."""
    in_place = {setting: trained_in_place(model, part) for part, setting in SETTINGS.items()}
    others = sum(p.requires_grad for p in model.parameters()) - sum(map(len, in_place.values()))
    names = ["learning_rate"] * bool(others) + [setting for setting, found in in_place.items() if found]
    return " and ".join(f"{place}.{name}" for name in names)
