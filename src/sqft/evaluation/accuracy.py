"""Task accuracy: multiple choice by likelihood, everything else by generating the answer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from sqft.data import Example
from sqft.errors import DataError
from sqft.evaluation.generation import generate_answers, normalize
from sqft.evaluation.intervals import wilson_interval
from sqft.evaluation.scoring import Row, Scorable, score_rows
from sqft.progress import SILENT, Progress

__all__ = ["AccuracyResult", "evaluate_accuracy"]


@dataclass(frozen=True)
class AccuracyResult:
    """Share of right answers with its 95 % Wilson interval, and what was answered to each item."""

    accuracy: float
    low: float
    high: float
    num_items: int
    correct: list[bool]
    answers: list[str]
    method: Literal["likelihood", "exact_match"]


def evaluate_accuracy(
    model: Scorable,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    progress: Progress = SILENT,
) -> AccuracyResult:
    """Accuracy on items: by likelihood where they have choices, by exact match of a greedy answer elsewhere.

    Likelihood: the choice with the highest summed log-probability after the prompt, the first of equals;
    the end-of-text token is not counted. Exact match: of the text up to the end token or the line's end,
    without regard to case and spacing.

    Raises: DataError if there is no item, or some have choices and some have not.
    """
    if has_choices(examples):
        scores = score_choices(model, examples, batch_size=batch_size, progress=progress)
        return judge_choices(scores, examples, tokenizer)
    answers = generate_answers(
        model, examples, tokenizer, batch_size=batch_size, max_new_tokens=max_new_tokens, progress=progress
    )
    pairs = zip(answers, examples, strict=True)
    correct = [normalize(answer) == normalize(example.answer) for answer, example in pairs]
    return _result(correct, answers, "exact_match")


def has_choices(examples: Sequence[Example]) -> bool:
    """Whether the items are multiple choice.

    Raises: DataError if there is no item, or some have choices and some have not.
    """
    if not examples:
        raise DataError("there is no item to measure accuracy on")
    with_choices = sum(example.choices_ids is not None for example in examples)
    if with_choices not in {0, len(examples)}:
        raise DataError(f"{with_choices} of {len(examples)} items have choices; all of them or none must")
    return with_choices > 0


def judge_choices(
    scores: Sequence[Sequence[float]], examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> AccuracyResult:
    """The accuracy of taking the choice with the highest score; answers are the texts taken."""
    chosen = [max(range(len(item)), key=item.__getitem__) for item in scores]
    correct = [index == example.label for index, example in zip(chosen, examples, strict=True)]
    taken = [(example.choices_ids or ())[index] for index, example in zip(chosen, examples, strict=True)]
    return _result(correct, [str(tokenizer.decode(ids)) for ids in taken], "likelihood")


def _result(
    correct: list[bool], answers: list[str], method: Literal["likelihood", "exact_match"]
) -> AccuracyResult:
    right = sum(correct)
    low, high = wilson_interval(right, len(correct))
    return AccuracyResult(right / len(correct), low, high, len(correct), correct, answers, method)


def choice_rows(example: Example) -> list[Row]:
    """The rows to score for an item's choices; choices of one token share their input, and so one pass."""
    first = len(example.prompt_ids) - 1
    return [
        Row((*example.prompt_ids, *choice[:-1]), [(first + i, token) for i, token in enumerate(choice)])
        for choice in example.choices_ids or ()
    ]


def score_choices(
    model: Scorable,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    progress: Progress = SILENT,
) -> list[list[float]]:
    """Summed log-probability of every choice of every item."""
    rows = [choice_rows(example) for example in examples]
    flat = [row for item in rows for row in item]
    scores = score_rows(model, flat, batch_size=batch_size, description="choices", progress=progress)
    sums = iter(math.fsum(values) for values in scores)
    return [[next(sums) for _ in item] for item in rows]
