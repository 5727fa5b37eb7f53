"""Intervals against known values and simulation."""

import math

import numpy as np
import pytest

from sqft.evaluation.intervals import ratio_interval, student_t, wilson_interval


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662), (10, 10, 0.7225, 1.0)],
)
def test_wilson(correct: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(
    ("degrees", "value"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (5, 2.5706), (10, 2.2281), (100, 1.9840)]
)
def test_student_t(degrees: int, value: float) -> None:
    assert student_t(degrees) == pytest.approx(value, rel=3e-3)


def test_equal_counts_give_the_usual_interval_of_a_mean() -> None:
    values = [1.0, 2.0, 4.0, 5.0]
    mean, low, high = ratio_interval(values, [1] * 4)
    spread = 3.1824 * np.std(values, ddof=1) / 2
    assert (mean, low, high) == pytest.approx((3.0, 3.0 - spread, 3.0 + spread), abs=0.01)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        counts = generator.integers(1, 6, size=40)
        sums = generator.gamma(2.0, 0.5, size=40) * counts
        _, low, high = ratio_interval(list(sums), [int(c) for c in counts])
        covered += low <= 1.0 <= high
    assert 0.90 < covered / 400 < 0.98


def test_one_item_says_nothing_about_spread() -> None:
    assert ratio_interval([2.0], [2]) == (1.0, -math.inf, math.inf)
