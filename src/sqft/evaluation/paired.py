"""Two models on the same items: the difference of their losses and accuracies, with intervals.

A model that was trained several times (seeds) brings one list of items a seed; seeds are clusters, since all
items of one seed share what that training happened to learn.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sqft.evaluation.intervals import Z, student_t

__all__ = ["Difference", "compare_correct", "mcnemar", "paired_difference"]

ROUNDS = 10_000
CHUNK = 1_000_000  # indices drawn at once

Items = Sequence[float]


@dataclass(frozen=True)
class Difference:
    """second minus first, paired by item, with a 95 % interval and a two-sided p-value.

    by_seed: the difference under each seed. p_value: that there is no difference.
    """

    difference: float
    low: float
    high: float
    p_value: float
    num_items: int
    by_seed: list[float]


def paired_difference(
    first: Items | Sequence[Items], second: Items | Sequence[Items], counts: Sequence[int] | None = None
) -> Difference:
    """How much `second` is larger per unit than `first`, by the bootstrap over items and over seeds.

    With d[s, i] the difference of item i under seed s, and c_i its units,
    D = sum_i(mean_s d[s, i]) / sum_i(c_i). Each round draws the n items, and the S seeds, anew with
    replacement; the two deviations from D add up. A deviation over n draws is stretched by
    sqrt(n / (n - 1)) t(n - 1) / z, which makes up for the variance that resampling so few loses, and for the
    tails: three seeds say little, and their interval shows it. A single item has an infinite interval; a
    single seed adds nothing, so that the interval is over items alone.

    first, second: one figure an item, or one such list a seed, seeds in the same order.
    counts: units of each item (answer tokens of a summed loss); None: one each.

    Raises: ValueError if the lengths differ.
    Source: Efron 1979; Owen 2007 (arXiv 0712.1111) for drawing rows and columns independently; Hesterberg
    2014 (arXiv 1411.5279), section 5.4, for the stretching.
    """
    deltas = _deltas(first, second)
    seeds, items = deltas.shape
    units = np.ones(items) if counts is None else np.asarray(counts, dtype=np.float64)
    if len(units) != items:
        raise ValueError(f"{items} items, but counts of {len(units)}")
    total = units.sum()
    by_seed = deltas.sum(axis=1) / total
    difference = float(by_seed.mean())
    if items < 2:
        return Difference(difference, -math.inf, math.inf, 1.0, items, by_seed.tolist())
    generator = np.random.default_rng(0)
    moved = _stretch(items) * _item_deviations(deltas.mean(axis=0) - difference * units, units, generator)
    if seeds > 1:
        drawn = generator.integers(seeds, size=(ROUNDS, seeds))
        moved = moved + _stretch(seeds) * (by_seed[drawn].mean(axis=1) - difference)
    low, high = np.quantile(moved, (0.025, 0.975))
    beyond = 1 + min(int((moved >= difference).sum()), int((moved <= difference).sum()))
    p_value = min(1.0, 2 * beyond / (ROUNDS + 1))
    return Difference(
        difference, difference + float(low), difference + float(high), p_value, items, by_seed.tolist()
    )


def compare_correct(
    first: Sequence[bool] | Sequence[Sequence[bool]], second: Sequence[bool] | Sequence[Sequence[bool]]
) -> Difference:
    """How much more often `second` is right, as a share, with the interval of `paired_difference`.

    p_value: McNemar's exact test for one seed; with several, the bootstrap's, which knows of the seeds.

    Raises: ValueError if the lengths differ.
    """
    before, after = _rows(first), _rows(second)
    found = paired_difference(before.tolist(), after.tolist())
    if len(before) > 1:
        return found
    gained, lost = int((after > before).sum()), int((after < before).sum())
    return replace(found, p_value=mcnemar(gained, lost))


def mcnemar(gained: int, lost: int) -> float:
    """The two-sided p-value of McNemar's exact test: that of `gained` heads in gained + lost coin throws.

    gained, lost: items that only one of the two models answers right.
    Source: McNemar 1947; the exact form in Fagerland, Lydersen, Laake 2013.
    """
    throws = gained + lost
    tail = sum(math.comb(throws, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**throws)


def _rows(values: Sequence[float] | Sequence[Sequence[float]] | Sequence[bool]) -> NDArray[np.float64]:
    return np.atleast_2d(np.asarray(values, dtype=np.float64))


def _deltas(first: Items | Sequence[Items], second: Items | Sequence[Items]) -> NDArray[np.float64]:
    """(seeds, items) differences."""
    before, after = _rows(first), _rows(second)
    if before.shape != after.shape:
        raise ValueError(f"{before.shape} seeds and items against {after.shape}; they are not paired")
    return after - before


def _stretch(draws: int) -> float:
    return math.sqrt(draws / (draws - 1)) * student_t(draws - 1) / Z


def _item_deviations(
    centred: NDArray[np.float64], units: NDArray[np.float64], generator: np.random.Generator
) -> NDArray[np.float64]:
    """(rounds,) deviations of the ratio when items are drawn with replacement.

    centred: each item's part above the ratio, d_i - D c_i, which sums to zero.
    """
    items = len(units)
    parts = []
    step = max(1, CHUNK // items)
    for start in range(0, ROUNDS, step):
        drawn = generator.integers(items, size=(min(step, ROUNDS - start), items))
        parts.append(centred[drawn].sum(axis=1) / units[drawn].sum(axis=1))
    return np.concatenate(parts)
