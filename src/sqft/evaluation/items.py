"""Loss and accuracy together, in as few forward passes as they need."""

import math
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from sqft.data import Example
from sqft.evaluation.accuracy import (
    AccuracyResult,
    choice_rows,
    evaluate_accuracy,
    has_choices,
    judge_choices,
)
from sqft.evaluation.loss import LossResult, answer_row, evaluate_loss, loss_of
from sqft.evaluation.scoring import score_rows
from sqft.progress import SILENT, Progress

__all__ = ["evaluate_items"]


def evaluate_items(
    model: nn.Module,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    progress: Progress = SILENT,
) -> tuple[LossResult, AccuracyResult]:
    """What `evaluate_loss` (on the answer) and `evaluate_accuracy` give, in one pass where it can be.

    The forward pass over a prompt and its right choice also scores every choice of one token.

    Raises: DataError and ModelError as those two.
    """
    if not has_choices(examples):
        loss = evaluate_loss(model, examples, batch_size=batch_size, progress=progress)
        accuracy = evaluate_accuracy(
            model,
            examples,
            tokenizer,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            progress=progress,
        )
        return loss, accuracy
    choices = [choice_rows(example) for example in examples]
    rows = [answer_row(example) for example in examples] + [row for item in choices for row in item]
    scores = score_rows(model, rows, batch_size=batch_size, description="choices", progress=progress)
    sums = iter(math.fsum(values) for values in scores[len(examples) :])
    judged = judge_choices([[next(sums) for _ in item] for item in choices], examples)
    return loss_of(scores[: len(examples)]), judged
