"""Loss on held-out answers, and perplexity on a text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from sqft.artifacts import digest_json
from sqft.data import Example
from sqft.errors import DataError
from sqft.evaluation.accuracy import has_choices, score_choices
from sqft.evaluation.general import general_path
from sqft.evaluation.intervals import ratio_interval
from sqft.evaluation.scoring import Row, Scorable, score_rows
from sqft.progress import SILENT, Progress

__all__ = [
    "LossResult",
    "PerplexityResult",
    "evaluate_general",
    "evaluate_loss",
    "evaluate_perplexity",
]

GENERAL_TOKENS = 4096


@dataclass(frozen=True)
class LossResult:
    """Nats per answer token (per item, where items have choices), with a 95 % interval over items.

    sums and counts: nats and counted tokens (1 with choices) of each item, for paired comparison.
    """

    loss: float
    low: float
    high: float
    num_items: int
    sums: list[float]
    counts: list[int]


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity exp(log_perplexity); the standard error is of log_perplexity, over windows.

    text: a digest of the tokens that were scored.
    """

    perplexity: float
    log_perplexity: float
    standard_error: float
    num_tokens: int
    sums: list[float]
    counts: list[int]
    text: str


def evaluate_loss(
    model: Scorable,
    examples: Sequence[Example],
    *,
    loss_on: Literal["answer", "text"] = "answer",
    batch_size: int = 16,
    progress: Progress = SILENT,
) -> LossResult:
    """The held-out loss, with a 95 % interval over items.

    Items with an answer: nats per token, the loss that training lowers (with loss_on "text": of all tokens).
    Items with choices: nats per item, -log of the right choice's share of the probability of all choices, as
    log(number of choices) is what guessing gives; how likely the model finds the form of the answer is left
    out, since any tuning repairs that first.

    Raises: DataError if there is no item; ModelError if the logits are not numbers.
    """
    if not examples:
        raise DataError("there is no item to measure the loss on")
    if loss_on == "answer" and has_choices(examples):
        scores = score_choices(model, examples, batch_size=batch_size, progress=progress)
        return choice_loss(scores, examples)
    rows = [answer_row(example, loss_on) for example in examples]
    return loss_of(score_rows(model, rows, batch_size=batch_size, description="loss", progress=progress))


def choice_loss(scores: Sequence[Sequence[float]], examples: Sequence[Example]) -> LossResult:
    """The loss among choices, from the summed log-probability of every choice of every item."""
    sums = []
    for item, example in zip(scores, examples, strict=True):
        assert example.label is not None
        highest = max(item)
        total = math.log(math.fsum(math.exp(score - highest) for score in item))
        sums.append(highest + total - item[example.label])
    counts = [1] * len(sums)
    return LossResult(*ratio_interval(sums, counts), len(sums), sums, counts)


def loss_of(scores: Sequence[Sequence[float]]) -> LossResult:
    """The loss from the log-probabilities of every item's counted tokens."""
    sums = [-math.fsum(values) for values in scores]
    counts = [len(values) for values in scores]
    return LossResult(*ratio_interval(sums, counts), len(sums), sums, counts)


def evaluate_general(
    model: Scorable,
    tokenizer: PreTrainedTokenizerBase,
    text: str = "package",
    *,
    sequence_length: int = 512,
    batch_size: int = 16,
    progress: Progress = SILENT,
) -> PerplexityResult:
    """Nats a token (`log_perplexity`) on a text that is not of the task: forgetting raises them.

    text: as `evaluate.general_text`. That of the package is from books and documents in the public domain
    that models know well, so that levels are low; what counts is the difference to the dense model.

    Raises: as `evaluate_perplexity`.
    """
    return evaluate_perplexity(
        model,
        general_path(text),
        tokenizer,
        num_tokens=GENERAL_TOKENS,
        sequence_length=sequence_length,
        batch_size=batch_size,
        setting="evaluate.general_text",
        progress=progress,
    )


def evaluate_perplexity(
    model: Scorable,
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_tokens: int = 8192,
    sequence_length: int = 512,
    batch_size: int = 16,
    setting: str = "evaluate.perplexity",
    progress: Progress = SILENT,
) -> PerplexityResult:
    """Perplexity of the first `num_tokens` tokens of a text file, in windows that do not overlap.

    Every token of a window but its first is predicted from those before it in the window. setting: what
    messages and the progress bar call it.

    Raises: DataError if the file is missing or shorter than one window.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; check {setting}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})") from error
    ids = tokenizer(text[: 16 * num_tokens], verbose=False)["input_ids"][:num_tokens]
    windows = [
        ids[i : i + sequence_length] for i in range(0, len(ids) - sequence_length + 1, sequence_length)
    ]
    if not windows:
        raise DataError(
            f"{path} has {len(ids)} tokens, less than one window of {sequence_length}; "
            "lower evaluate.sequence_length or give more text"
        )
    rows = [Row(window[:-1], list(enumerate(window[1:]))) for window in windows]
    shown = setting.rpartition(".")[2].replace("_", " ")
    scores = score_rows(model, rows, batch_size=batch_size, description=shown, progress=progress)
    sums = [-math.fsum(values) for values in scores]
    counts = [len(row.wanted) for row in rows]
    mean = math.fsum(sums) / sum(counts)
    spread = math.fsum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True))
    n = len(rows)
    deviation = math.sqrt(spread * n / (n - 1)) / sum(counts) if n > 1 else math.inf
    perplexity = math.exp(min(mean, 700.0))
    return PerplexityResult(perplexity, mean, deviation, sum(counts), sums, counts, digest_json(windows)[:16])


def answer_row(example: Example, loss_on: Literal["answer", "text"] = "answer") -> Row:
    """What measuring the loss of an item needs."""
    ids = example.token_ids
    return Row(ids[:-1], [(place - 1, ids[place]) for place in example.counted(loss_on)])
