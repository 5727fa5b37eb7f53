"""Elastic ranks in anybody's training loop: one sub-adapter a step."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sqft.adapters import SearchSpace, SubAdapter, set_ranks, set_step

__all__ = ["RankSampler", "begin_step"]


class RankSampler(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Train elastic ranks (NLS) in any `transformers.Trainer`, TRL's included: callbacks=[RankSampler()].

    Before each optimizer step the ranks are drawn as a pure function of (seed, step), so that accumulation,
    recomputation, several processes and a resumed training agree; column dropout and the hybrid gradient
    follow the same step. After the training the model stands at its largest ranks.

    Source: Shears, arXiv 2404.10934, as SQFT (arXiv 2410.03750, section 3.2) takes it up.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the ranks of the step. Raises: AdapterError if the model has no sqft adapter."""
        begin_step(kwargs["model"], SearchSpace.of(kwargs["model"]), self.seed, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go back to the largest ranks, of which every other sub-adapter is a part."""
        set_ranks(kwargs["model"], SearchSpace.of(kwargs["model"]).maximal())


def begin_step(model: nn.Module, space: SearchSpace | None, seed: int, step: int) -> SubAdapter:
    """Tell every layer the optimizer step, and make the sub-adapter of that step the active one.

    space: None for a model whose ranks stay as they are. Returns the sub-adapter, empty without a space.
    """
    set_step(model, seed, step)
    if space is None:
        return {}
    sub_adapter = space.ranks_at(seed, step)
    set_ranks(model, sub_adapter)
    return sub_adapter
