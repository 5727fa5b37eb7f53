"""Hill climbing over the ranks of the groups, as an Optuna sampler."""

import random
from collections.abc import Iterator

from sqft.adapters import SearchSpace, SubAdapter
from sqft.search.proposer import Proposer

__all__ = ["HillClimb"]

TRIES = 64  # random draws around the best sub-adapter before more groups are moved


class HillClimb(Proposer):
    """Starts at the median; a proposal moves `neighbours` groups of the best so far to the next rank.

    A proposal is a pure function of the seed and the finished trials, so that a search that was killed goes
    on to the same result. No sub-adapter is proposed twice, and rank 0 everywhere never: where all neighbours
    are known, more groups move.

    Source: arXiv 2410.03750, section 3.2 (hill climbing from the heuristic sub-adapter, after Shears,
    arXiv 2404.10934).
    """

    def __init__(self, space: SearchSpace, seed: int, neighbours: int) -> None:
        super().__init__(space)
        self.seed, self.neighbours = seed, neighbours

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
            if any(candidate.values()) and tuple(candidate.values()) not in known:
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
