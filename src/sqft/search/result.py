"""What a search found, and every sub-adapter it looked at."""

import math
from dataclasses import dataclass, field

from sqft.adapters import SubAdapter

__all__ = ["SearchResult", "Trial"]


@dataclass(frozen=True)
class Trial:
    """One evaluated sub-adapter and its loss."""

    number: int
    ranks: SubAdapter
    loss: float


@dataclass(frozen=True)
class SearchResult:
    """The chosen sub-adapter; its loss is NaN where the method evaluates nothing."""

    best: SubAdapter
    trials: list[Trial] = field(default_factory=list)

    @property
    def best_loss(self) -> float:
        """The lowest loss of all trials."""
        return min((trial.loss for trial in self.trials), default=math.nan)
