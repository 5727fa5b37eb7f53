"""Paired differences against known values, a slow bootstrap, and simulation."""

import math

import numpy as np
import pytest

import sqft.evaluation.paired as paired
from sqft.evaluation import compare_correct, paired_difference
from sqft.evaluation.paired import mcnemar


def test_difference_per_unit() -> None:
    result = paired_difference([1.0, 2.0, 3.0], [2.0, 3.0, 4.0], [1, 1, 2])
    assert result.difference == pytest.approx(0.75)
    assert result.by_seed == [result.difference]
    assert result.num_items == 3


def test_the_interval_of_many_equal_items_is_the_normal_one() -> None:
    values = np.random.default_rng(3).normal(size=500)
    result = paired_difference([0.0] * 500, values.tolist())
    half = 1.96 * values.std(ddof=1) / math.sqrt(500)
    assert result.low == pytest.approx(values.mean() - half, abs=0.006)
    assert result.high == pytest.approx(values.mean() + half, abs=0.006)


def test_the_same_figures_give_the_same_interval() -> None:
    first, second = [1.0, 2.0, 5.0, 3.0], [1.5, 1.0, 4.0, 3.5]
    assert paired_difference(first, second) == paired_difference(first, second)


def test_equal_models_differ_by_nothing() -> None:
    result = paired_difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (result.difference, result.low, result.high, result.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_one_item_says_nothing() -> None:
    result = paired_difference([1.0], [2.0])
    assert (result.low, result.high, result.p_value) == (-math.inf, math.inf, 1.0)


def test_seeds_that_disagree_widen_the_interval() -> None:
    items = np.random.default_rng(0).normal(size=100)
    base = [np.zeros(100).tolist()] * 3
    agreeing = paired_difference(base, [items.tolist()] * 3)
    apart = paired_difference(base, [(items + shift).tolist() for shift in (-0.5, 0.0, 0.5)])
    assert apart.difference == pytest.approx(agreeing.difference)
    assert apart.high - apart.low > 3 * (agreeing.high - agreeing.low)
    assert apart.by_seed == pytest.approx([items.mean() - 0.5, items.mean(), items.mean() + 0.5])


@pytest.mark.parametrize(("seeds", "seed_variance"), [(1, 0.0), (3, 0.3), (3, 3.0)])
def test_the_interval_covers_the_truth_as_often_as_it_says(
    seeds: int, seed_variance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paired, "ROUNDS", 400)
    generator = np.random.default_rng(1)
    covered, trials, n = 0, 200, 100
    for _ in range(trials):
        items = (generator.gamma(0.5, 1.0, size=n) - 0.5) / math.sqrt(0.5)
        shift = generator.normal(size=(seeds, 1)) * math.sqrt(seed_variance / n)
        deltas = items + shift + generator.normal(size=(seeds, n)) / 2
        result = paired_difference(np.zeros_like(deltas).tolist(), deltas.tolist())
        covered += result.low <= 0 <= result.high
    assert covered / trials > 0.91  # of 95 %, three standard errors of 200 trials below


def test_unpaired_figures_are_refused() -> None:
    with pytest.raises(ValueError, match="not paired"):
        paired_difference([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="counts of 3"):
        paired_difference([1.0, 2.0], [1.0, 2.0], [1, 1, 1])


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"), [(0, 0, 1.0), (5, 5, 1.0), (9, 1, 22 / 1024), (1, 9, 22 / 1024)]
)
def test_mcnemar(gained: int, lost: int, p_value: float) -> None:
    assert mcnemar(gained, lost) == pytest.approx(p_value)


def test_accuracy_of_one_seed_has_the_exact_p_value() -> None:
    first = [False] * 9 + [True] + [True] * 30
    second = [True] * 9 + [False] + [True] * 30
    result = compare_correct(first, second)
    assert result.difference == pytest.approx(8 / 40)
    assert result.p_value == pytest.approx(22 / 1024)
    assert result.low < 8 / 40 < result.high


def test_accuracy_of_several_seeds_is_compared_seed_by_seed() -> None:
    first = [[True, False, False, True], [False, False, True, True]]
    second = [[True, True, False, True], [True, True, True, True]]
    result = compare_correct(first, second)
    assert result.by_seed == [0.25, 0.5]
    assert result.difference == pytest.approx(0.375)
