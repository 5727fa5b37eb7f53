"""Loss and accuracy together, in as few forward passes as they need."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from sqft.data import Example
from sqft.evaluation.accuracy import (
    AccuracyResult,
    evaluate_accuracy,
    has_choices,
    judge_choices,
    score_choices,
)
from sqft.evaluation.loss import LossResult, choice_loss, evaluate_loss
from sqft.evaluation.scoring import Scorable
from sqft.progress import SILENT, Progress

__all__ = ["evaluate_items"]


def evaluate_items(
    model: Scorable,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    progress: Progress = SILENT,
) -> tuple[LossResult, AccuracyResult | None]:
    """What `evaluate_loss` (on the answer) and `evaluate_accuracy` give, in one pass where there are choices.

    The accuracy is None where an item is a text, which has no answer to compare with.

    Raises: DataError and ModelError as those two.
    """
    if any(example.is_text for example in examples):
        return evaluate_loss(model, examples, batch_size=batch_size, progress=progress), None
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
    scores = score_choices(model, examples, batch_size=batch_size, progress=progress)
    return choice_loss(scores, examples), judge_choices(scores, examples, tokenizer)
