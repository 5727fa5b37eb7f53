"""Optuna samplers that propose whole sub-adapters, as a pure function of the finished trials."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from sqft.adapters import SearchSpace, SubAdapter

__all__ = ["Listed", "Proposer"]


class Proposer(BaseSampler):  # type: ignore[misc]
    """What of a sampler does not depend on how the next sub-adapter is found."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self.distributions: dict[str, BaseDistribution] = {
            group: CategoricalDistribution(space.ranks) for group in space.groups
        }

    @abstractmethod
    def propose(self, trials: list[tuple[SubAdapter, float]]) -> SubAdapter:
        """What to evaluate next, given the (sub-adapter, loss) pairs in the order they finished."""

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All groups, always: Optuna's own inference would read every trial again."""
        return self.distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Optuna's call for a proposal."""
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        trials = [
            ({group: done.params[group] for group in self.space.groups}, float(done.value))
            for done in finished
        ]
        return self.propose(trials)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> int:
        """Never needed: every parameter is proposed together."""
        return self.space.median()[param_name]


class Listed(Proposer):
    """Proposes what is listed, in its order."""

    def __init__(self, space: SearchSpace, listed: Sequence[SubAdapter]) -> None:
        super().__init__(space)
        self.listed = listed

    def propose(self, trials: list[tuple[SubAdapter, float]]) -> SubAdapter:
        """The first that is not finished."""
        return self.listed[len(trials)]
