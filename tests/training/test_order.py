"""The order of items: a function of seed and epoch, grouped by length where asked."""

import pytest

from sqft.training.trainer import EpochSampler

LENGTHS = [(7 * index) % 50 for index in range(403)]


def order(seed: int, epoch: int, group_size: int) -> list[int]:
    sampler = EpochSampler(LENGTHS, seed, group_size)
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("group_size", [0, 8])
def test_every_epoch_sees_every_item_once_in_its_own_order(group_size: int) -> None:
    orders = [order(seed, epoch, group_size) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(items) == list(range(len(LENGTHS))) for items in orders)
    assert len({tuple(items) for items in orders}) == 3
    assert order(0, 1, group_size) == orders[1]


def test_groups_hold_items_of_like_length() -> None:
    def padding(items: list[int]) -> int:
        batches = [[LENGTHS[i] for i in items[start : start + 8]] for start in range(0, len(items), 8)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert padding(order(0, 0, 8)) < padding(order(0, 0, 0)) / 4
