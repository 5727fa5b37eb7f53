"""The first-order surrogate: its slopes are derivatives, its choices are the best within a budget."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.search.test_search import SPACE, SURROGATE, TARGET, distance, search

from sqft.adapters import SearchSpace, attach_adapters, set_ranks
from sqft.adapters.space import adapter_layers
from sqft.data import Example
from sqft.errors import TrainingError
from sqft.evaluation import evaluate_loss
from sqft.evaluation.gradients import backward_loss
from sqft.models import load_model
from sqft.search import rank_slopes, search_sub_adapter
from sqft.search.surrogate import mean_rank, surrogate_candidates
from sqft.sections import AdapterSection, SearchSection

CHOICES = [Example("", "", (5, 6, 7 + i), (8,), ((8,), (9 + i, 11), (12,)), i % 3) for i in range(7)]
ANSWERS = [Example("", "", (5, 6, 7 + i), (8, 9 + i, 1)) for i in range(7)]


@pytest.fixture(scope="module")
def model(tiny_model_dir: Callable[..., Path]) -> torch.nn.Module:
    """A super-adapter with updates that matter, of ranks 4, 2 and 1."""
    section = AdapterSection(method="sparse_peft", ranks=[4, 2, 1], dropout=0.1)
    base = load_model(tiny_model_dir("llama"))
    made = attach_adapters(base, section, storage_dtype=torch.float32, seed=0)
    generator = torch.Generator().manual_seed(0)
    for layer in adapter_layers(made).values():
        B = layer.sqft_B[str(layer.active_name())]
        B.data = 0.02 * torch.randn(B.shape, generator=generator)
    return made.eval()


@pytest.mark.parametrize("items", [CHOICES, ANSWERS], ids=["choices", "answers"])
def test_slopes_are_derivatives_of_the_loss_that_is_measured(
    model: torch.nn.Module, items: list[Example]
) -> None:
    space = SearchSpace.of(model)
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = rank_slopes(model, lambda: backward_loss(model, items, batch_size=3))
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for layer in adapter_layers(model).values() for p in layer.sqft_A.values())
    group = list(space.groups)[1]
    assert found[group][1] == 0.0

    def measured(gate: float, active: int) -> float:
        """The loss where component 1 of the group stands behind a gate, and `active` of all others are in."""
        set_ranks(model, space.maximal())
        with torch.no_grad():
            for name, layer in adapter_layers(model).items():
                A = layer.sqft_A[str(layer.active_name())]
                A[active:] = 0
                if name in space.groups[group]:
                    A[1] = gate * kept_rows[name][1]
            loss = evaluate_loss(model, items).loss
            for name, layer in adapter_layers(model).items():
                layer.sqft_A[str(layer.active_name())].copy_(kept_rows[name])
        return loss

    kept_rows = {
        name: layer.sqft_A[str(layer.active_name())].detach().clone()
        for name, layer in adapter_layers(model).items()
    }
    step = 0.02
    slopes = [(measured(at + step, n) - measured(at - step, n)) / (2 * step) for at, n in ((0, 1), (1, 4))]
    assert found[group][2] == pytest.approx(sum(slopes) / 2, rel=2e-2, abs=2e-6)


def test_the_loss_is_the_one_that_evaluation_measures(model: torch.nn.Module) -> None:
    for items in (CHOICES, ANSWERS):
        assert backward_loss(model, items, batch_size=2) == pytest.approx(evaluate_loss(model, items).loss)
        model.zero_grad()


@pytest.mark.parametrize("budget", [8.0, 13.5, 20.0])
def test_a_budget_is_kept_and_spent_best(budget: float) -> None:
    candidates = list(surrogate_candidates(SPACE, SURROGATE, budget))
    assert all(mean_rank(candidate) <= budget for candidate in candidates)
    predicted = [
        sum(SURROGATE[group][rank] for group, rank in zip(SPACE.groups, ranks, strict=True))
        for ranks in itertools.product(SPACE.ranks, repeat=len(SPACE.groups))
        if sum(ranks) <= budget * len(ranks)
    ]
    best = min(sum(SURROGATE[g][r] for g, r in candidate.items()) for candidate in candidates)
    assert best == pytest.approx(min(predicted))


def test_candidates_are_exactly_looked_at(tmp_path: Path) -> None:
    result = search("surrogate", tmp_path)
    assert result.trials[0].ranks == SPACE.median()
    assert len(result.trials) < 8
    assert result.best_loss < distance(SPACE.median())
    wrong = [group for group, rank in result.best.items() if rank != TARGET[group]]
    assert set(wrong) <= {"group0", "group1", "group2"}


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"budget: 4\.0 is below the smallest rank, 8"):
        list(surrogate_candidates(SPACE, SURROGATE, 4.0))
    with pytest.raises(TrainingError, match="nothing gives them"):
        search_sub_adapter(SPACE, distance, SearchSection(method="surrogate"), storage=tmp_path / "t")
    with pytest.raises(ValueError, match="goes with method surrogate"):
        SearchSection(method="median", budget=8)
