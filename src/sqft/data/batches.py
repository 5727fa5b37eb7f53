"""Turns examples into padded batches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sqft.data.items import Example, LossOn

__all__ = ["IGNORED", "collate", "pad_left", "pad_right"]

IGNORED = -100  # the label of a token that the loss does not count, as in torch and transformers


def collate(examples: Sequence[Example], loss_on: LossOn = "answer") -> dict[str, Tensor]:
    """Pad to the longest example, on the right.

    Returns input_ids, attention_mask and labels, each (batch, length); labels are not shifted, and are -100
    on padding and, with loss_on="answer", on everything but the answers.
    """
    input_ids, attention_mask = pad_right([example.token_ids for example in examples])
    labels = torch.full_like(input_ids, IGNORED)
    for row, example in enumerate(examples):
        counted = example.counted(loss_on)
        labels[row, counted] = input_ids[row, counted]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def pad_right(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, (batch, length) each, padded at the end with token 0, which is masked."""
    return _pad(rows, left=False)


def pad_left(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, (batch, length) each, padded at the start, as generation needs it."""
    return _pad(rows, left=True)


def _pad(rows: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    length = max(len(row) for row in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        where = slice(length - len(row), None) if left else slice(0, len(row))
        input_ids[index, where] = torch.tensor(row, dtype=torch.long)
        attention_mask[index, where] = 1
    return input_ids, attention_mask
