"""Hill climbing over the ranks of the groups, as an Optuna sampler."""

import random
from collections.abc import Iterator
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from sqft.adapters import SearchSpace, SubAdapter

__all__ = ["HillClimb"]

TRIES = 64  # random draws around the best sub-adapter before more groups are moved


class HillClimb(BaseSampler):  # type: ignore[misc]
    """Starts at the median; a proposal moves `neighbours` groups of the best so far to the next rank.

    A proposal is a pure function of the seed and the finished trials, so that a search that was killed goes
    on to the same result. No sub-adapter is proposed twice: where all neighbours are known, more groups move.

    Source: arXiv 2410.03750, section 3.2 (hill climbing from the heuristic sub-adapter, after Shears,
    arXiv 2404.10934).
    """

    def __init__(self, space: SearchSpace, seed: int, neighbours: int) -> None:
        self.space, self.seed, self.neighbours = space, seed, neighbours
        self.distributions: dict[str, BaseDistribution] = {
            group: CategoricalDistribution(space.ranks) for group in space.groups
        }

    def propose(self, trials: list[tuple[SubAdapter, float]]) -> SubAdapter:
        """What to evaluate next, given the (sub-adapter, loss) pairs in the order they finished."""
        if not trials:
            return self.space.median()
        best = min(trials, key=lambda trial: trial[1])[0]  # the first of equals
        known = {tuple(ranks.values()) for ranks, _ in trials}
        draws = random.Random(f"hill_climb:{self.seed}:{len(trials)}")
        for moved in self._moves():
            candidate = dict(best)
            for group in draws.sample(list(best), moved):
                candidate[group] = draws.choice(self._near(best[group]))
            if tuple(candidate.values()) not in known:
                return candidate
        return best

    def _moves(self) -> Iterator[int]:
        groups = len(self.space.groups)
        for moved in range(min(self.neighbours, groups), groups + 1):
            yield from [moved] * TRIES

    def _near(self, rank: int) -> list[int]:
        """The next larger and the next smaller rank."""
        ranks = self.space.ranks
        index = ranks.index(rank)
        return [ranks[i] for i in (index - 1, index + 1) if 0 <= i < len(ranks)] or [rank]

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
