"""A first-order surrogate of the loss over all sub-adapters, from two backward passes.

Component i of a group (column i of B, row i of A, in all modules of the group) gets a gate g_i: 1 where the
group's rank takes it in, else 0. With the slopes dL/dg_i at the smallest and the largest sub-adapter, the
loss of any other is taken as

    L(ranks) = L(minimal) + sum over groups, sum over components i from the smallest rank up to the group's:
               (slope_minimal_i + slope_maximal_i) / 2

which is additive, so that the best sub-adapter within a budget is a knapsack over groups.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from sqft.adapters import SearchSpace, SubAdapter, set_ranks
from sqft.adapters.space import adapter_config, adapter_layers
from sqft.errors import TrainingError

__all__ = ["Surrogate", "mean_rank", "rank_slopes", "surrogate_candidates"]

Slopes = Mapping[str, list[float]]  # group -> dL/dg of each of its components
Surrogate = dict[str, dict[int, float]]  # group -> rank -> predicted loss minus that of the smallest rank


def rank_slopes(model: nn.Module, backward: Callable[[], object]) -> Surrogate:
    """What each rank of each group is predicted to change, from a backward pass at both ends of the space.

    backward: computes the loss of `model` as it is, and its gradients. The model's ranks end at the largest.

    Raises: TrainingError if a slope is not a finite number.
    """
    space = SearchSpace.of(model)
    ends = [_slopes(model, space, backward, active) for active in (min(space.ranks), max(space.ranks))]
    found: Surrogate = {}
    for group in space.groups:
        slopes = [(low + high) / 2 for low, high in zip(*(end[group] for end in ends), strict=True)]
        found[group] = {rank: sum(slopes[min(space.ranks) : rank]) for rank in space.ranks}
    if not all(torch.isfinite(torch.tensor(list(ranks.values()))).all() for ranks in found.values()):
        raise TrainingError("the slopes of the ranks are not finite; check the search items and the adapter")
    return found


def surrogate_candidates(
    space: SearchSpace, surrogate: Surrogate, budget: float | None = None
) -> Iterator[SubAdapter]:
    """Sub-adapters worth an exact look, the likeliest first, none twice.

    The best by the surrogate, then the median with only the half, the quarter, ... of the moves that promise
    most: where slopes mislead, fewer moves mislead less. Rank 0 everywhere is none of them. budget: the mean
    rank over groups at most.

    Raises: TrainingError if the smallest rank everywhere is above the budget.
    """
    best, start = _best(space, surrogate, budget), space.median()
    moves = sorted(
        (group for group in best if best[group] != start[group]),
        key=lambda group: surrogate[group][best[group]] - surrogate[group][start[group]],
    )
    seen: list[SubAdapter] = []
    count = len(moves)
    while count:
        candidate = start | {group: best[group] for group in moves[:count]}
        fits = 0 < mean_rank(candidate) <= (budget or max(space.ranks))
        if fits and candidate not in seen:
            seen.append(candidate)
            yield candidate
        count //= 2
    if not seen and mean_rank(best) > 0:
        yield best


def mean_rank(ranks: SubAdapter) -> float:
    """Over the groups."""
    return sum(ranks.values()) / len(ranks)


def _best(space: SearchSpace, surrogate: Surrogate, budget: float | None) -> SubAdapter:
    """The lowest predicted loss whose mean rank is at most `budget`, by dynamic programming over groups."""
    groups, smallest = list(space.groups), min(space.ranks)
    allowed = max(space.ranks) * len(groups) if budget is None else int(budget * len(groups))
    spare = allowed - smallest * len(groups)
    if spare < 0:
        raise TrainingError(f"search.budget: {budget} is below the smallest rank, {smallest}")
    if budget is None:
        return {group: min(space.ranks, key=lambda rank: (surrogate[group][rank], rank)) for group in groups}
    reached: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # spent -> best loss, its ranks
    for group in groups:
        after: dict[int, tuple[float, tuple[int, ...]]] = {}
        for spent, (loss, ranks) in reached.items():
            for rank in space.ranks:
                cost = spent + rank - smallest
                found = (loss + surrogate[group][rank], (*ranks, rank))
                if cost <= spare and (cost not in after or found < after[cost]):
                    after[cost] = found
        reached = after
    return dict(zip(groups, min(reached.values())[1], strict=True))


def _slopes(
    model: nn.Module, space: SearchSpace, backward: Callable[[], object], active: int
) -> dict[str, list[float]]:
    """dL/dg of every component, where the first `active` of every module are in.

    Gates need no tensor of their own: dL/dg_i = <dL/dA_i, A_i>, and a row of A that is 0 is a component left
    out whose gradient there still is.
    """
    layers, config = adapter_layers(model), adapter_config(model)
    set_ranks(model, space.maximal())
    modes, dropout, config.dropout = [layer.training for layer in layers.values()], config.dropout, 0.0
    rows: dict[str, tuple[nn.Parameter, Tensor, bool]] = {}
    for name in {name for names in space.groups.values() for name in names}:
        A = layers[name].sqft_A[str(layers[name].active_name())]
        rows[name] = (A, A.detach().clone(), A.requires_grad)
        A.requires_grad_(True)
        A.data[active:] = 0
        A.grad = None
    try:
        for layer in layers.values():
            layer.train()  # what evaluates on a GPU has no gradient
        backward()
        slopes = {name: (A.grad * was).sum(1) for name, (A, was, _) in rows.items() if A.grad is not None}
    finally:
        config.dropout = dropout
        for layer, mode in zip(layers.values(), modes, strict=True):
            layer.train(mode)
        for A, was, trained in rows.values():
            A.data.copy_(was)
            A.requires_grad_(trained)
            A.grad = None
    return {
        group: torch.stack([slopes[name] for name in names]).sum(0).tolist()
        for group, names in space.groups.items()
    }
