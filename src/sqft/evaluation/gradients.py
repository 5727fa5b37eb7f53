"""The gradient of the loss that `evaluate_loss` measures."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from sqft.data import Example
from sqft.evaluation.accuracy import choice_rows, has_choices
from sqft.evaluation.loss import answer_row
from sqft.evaluation.scoring import Row, row_log_probs, shared_passes

__all__ = ["backward_loss"]


def backward_loss(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    loss_on: Literal["answer", "text"] = "answer",
    batch_size: int = 16,
) -> float:
    """Add the gradients of the held-out loss to what of `model` requires some; returns the loss.

    The loss is that of `evaluate_loss`: among the choices where items have some, else nats a counted token.

    Raises: DataError if there is no item, or some have choices and some have not.
    """
    among_choices = loss_on == "answer" and has_choices(examples)
    counted = len(examples) if among_choices else sum(len(example.counted(loss_on)) for example in examples)
    total = 0.0
    order = sorted(examples, key=len)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        if among_choices:
            loss = _choice_loss(model, batch)
        else:
            loss = -_log_probs(model, [answer_row(example, loss_on) for example in batch]).sum()
        (loss / counted).backward()
        total += float(loss.detach())
    return total / counted


def _choice_loss(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    rows = [choice_rows(example) for example in examples]
    scores = iter(_log_probs(model, [row for item in rows for row in item]))
    losses = []
    for item, example in zip(rows, examples, strict=True):
        among = torch.stack([next(scores) for _ in item]).log_softmax(0)
        losses.append(-among[example.label or 0])
    return torch.stack(losses).sum()


def _log_probs(model: nn.Module, rows: Sequence[Row]) -> Tensor:
    """The summed log-probability of what each row wants."""
    passes, groups = shared_passes(rows)
    order = [index for indices in groups for index in indices]
    parts = row_log_probs(model, passes).split([len(rows[index].wanted) for index in order])
    sums = dict(zip(order, (part.sum() for part in parts), strict=True))
    return torch.stack([sums[index] for index in range(len(rows))])
