"""Padding and labels."""

import pytest
import torch

from sqft.data import Example, collate
from sqft.data.batches import pad_left

EXAMPLES = [Example("", "", (5, 6, 7), (8, 1)), Example("", "", (5,), (9, 1))]


def test_labels_on_the_answer() -> None:
    batch = collate(EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 1], [5, 9, 1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 8, 1], [-100, 9, 1, -100, -100]]


def test_labels_on_the_text() -> None:
    assert collate(EXAMPLES, "text")["labels"].tolist() == [
        [-100, 6, 7, 8, 1],
        [-100, 9, 1, -100, -100],
    ]


@pytest.mark.parametrize("rows", [[[1, 2, 3], [4]]])
def test_pad_left(rows: list[list[int]]) -> None:
    input_ids, attention_mask = pad_left(rows)
    assert torch.equal(input_ids, torch.tensor([[1, 2, 3], [0, 0, 4]]))
    assert torch.equal(attention_mask, torch.tensor([[1, 1, 1], [0, 0, 1]]))
