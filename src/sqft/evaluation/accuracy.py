"""Task accuracy: multiple choice by likelihood, everything else by generating the answer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedTokenizerBase

from sqft.data import Example
from sqft.errors import DataError
from sqft.evaluation.generation import generate_answers, normalize
from sqft.evaluation.intervals import wilson_interval
from sqft.evaluation.scoring import Row, score_rows
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
    model: nn.Module,
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
    if not examples:
        raise DataError("there is no item to measure accuracy on")
    with_choices = sum(example.choices_ids is not None for example in examples)
    if with_choices not in {0, len(examples)}:
        raise DataError(f"{with_choices} of {len(examples)} items have choices; all of them or none must")
    if with_choices:
        scores = score_choices(model, examples, batch_size=batch_size, progress=progress)
        chosen = [max(range(len(item)), key=item.__getitem__) for item in scores]
        answers = [str(index) for index in chosen]
        correct = [index == example.label for index, example in zip(chosen, examples, strict=True)]
    else:
        answers = generate_answers(
            model,
            examples,
            tokenizer,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            progress=progress,
        )
        pairs = zip(answers, examples, strict=True)
        correct = [normalize(answer) == normalize(example.answer) for answer, example in pairs]
    right = sum(correct)
    low, high = wilson_interval(right, len(correct))
    method: Literal["likelihood", "exact_match"] = "likelihood" if with_choices else "exact_match"
    return AccuracyResult(right / len(correct), low, high, len(correct), correct, answers, method)


def score_choices(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    progress: Progress = SILENT,
) -> list[list[float]]:
    """Summed log-probability of every choice of every item.

    Choices that share their input, as all choices of one token do, are read off one forward pass.
    """
    rows: list[Row] = []
    places: list[list[tuple[int, int, int]]] = []  # of each choice: row, first pair, number of pairs
    for example in examples:
        inputs = {(*example.prompt_ids, *choice[:-1]) for choice in example.choices_ids or ()}
        needed = [ids for ids in sorted(inputs) if not any(_extends(other, ids) for other in inputs)]
        wanted: list[list[tuple[int, int]]] = [[] for _ in needed]
        place: list[tuple[int, int, int]] = []
        for choice in example.choices_ids or ():
            ids = (*example.prompt_ids, *choice[:-1])
            row = next(i for i, other in enumerate(needed) if other[: len(ids)] == ids)
            place.append((len(rows) + row, len(wanted[row]), len(choice)))
            first = len(example.prompt_ids) - 1
            wanted[row].extend((first + offset, token) for offset, token in enumerate(choice))
        places.append(place)
        rows.extend(Row(ids, pairs) for ids, pairs in zip(needed, wanted, strict=True))
    scores = score_rows(model, rows, batch_size=batch_size, description="choices", progress=progress)
    return [
        [math.fsum(scores[row][first : first + length]) for row, first, length in place] for place in places
    ]


def _extends(other: tuple[int, ...], ids: tuple[int, ...]) -> bool:
    return len(other) > len(ids) and other[: len(ids)] == ids
