"""Turns examples into padded batches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sqft.data.items import Example, LossOn

__all__ = ["IGNORED", "collate", "collate_packed", "pad_left", "pad_right"]

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


def collate_packed(
    examples: Sequence[Example], loss_on: LossOn = "answer", *, capacity: int | None = None
) -> dict[str, Tensor]:
    """Put items one after another into rows, best fit decreasing; no row is longer than the longest item.

    capacity: of a row, in tokens, where it is more than that.

    Returns input_ids, position_ids and labels, each (rows, length), and row_tokens (rows,), without padding.
    Positions begin at 0 with each item and with the padding at the end of a row, by which transformers tells
    what may attend to what; labels are as `collate` has them, so the loss is the same.

    Source: arXiv 2404.10830 (best-fit packing).
    Differs from the paper: no item is cut, and the items are those of one batch, which stays what it was.
    """
    lengths = [len(example.token_ids) for example in examples]
    capacity = max([*lengths, capacity or 0])
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [place for place, left in enumerate(room) if left >= lengths[index]]
        place = min(fitting, key=lambda p: room[p], default=len(bins))
        if place == len(bins):
            bins.append([])
            room.append(capacity)
        bins[place].append(index)
        room[place] -= lengths[index]
    width = capacity - min(room)
    input_ids = torch.zeros(len(bins), width, dtype=torch.long)
    position_ids, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, IGNORED)
    for row, members in enumerate(bins):
        start = 0
        for index in members:
            end = start + lengths[index]
            input_ids[row, start:end] = torch.tensor(examples[index].token_ids, dtype=torch.long)
            position_ids[row, start:end] = torch.arange(lengths[index])
            places = [start + place for place in examples[index].counted(loss_on)]
            labels[row, places] = input_ids[row, places]
            start = end
        position_ids[row, start:] = torch.arange(width - start)
    row_tokens = torch.tensor([sum(lengths[index] for index in members) for members in bins])
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "labels": labels,
        "row_tokens": row_tokens,
    }


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
