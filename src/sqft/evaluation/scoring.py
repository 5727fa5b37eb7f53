"""Log-probabilities of given tokens at given positions, in batches."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sqft.data.batches import pad_right
from sqft.errors import ModelError
from sqft.models.forward import logits_at
from sqft.progress import SILENT, Progress

__all__ = ["Row", "Runtime", "Scorable", "evaluating", "row_log_probs", "score_rows", "shared_passes"]

LOGIT_ROWS = 2048  # rows of logits held at once; 2048 of 50,000 float32 are 400 MB


@dataclass(frozen=True)
class Row:
    """A token sequence, and the (position, token) pairs to score.

    The score of (p, t) is log P(t | ids[0 .. p]): position p predicts what comes after it.
    """

    ids: Sequence[int]
    wanted: Sequence[tuple[int, int]]


class Runtime(Protocol):
    """A model that another program runs, one sequence at a time: llama.cpp, OpenVINO."""

    max_length: int

    def score(self, ids: Sequence[int], wanted: Sequence[tuple[int, int]]) -> list[float]:
        """log P(t | ids[0 .. p]) of every (p, t)."""

    def greedy(self, ids: Sequence[int]) -> Iterator[int]:
        """The most likely next token, again and again, the end token included."""


Scorable = nn.Module | Runtime


def score_rows(
    model: Scorable,
    rows: Sequence[Row],
    *,
    batch_size: int = 16,
    description: str = "score",
    progress: Progress = SILENT,
) -> list[list[float]]:
    """Natural-log probabilities for every wanted pair of every row, in the order given.

    A row that is the beginning of another row is scored from that row's forward pass.

    Raises: ModelError if the model's logits are not numbers.
    """
    passes, groups = shared_passes(rows)
    scores: list[list[float]] = [[] for _ in rows]
    with evaluating(model), progress.task(description, len(passes)) as advance:
        for batch in _batches(passes, batch_size):
            found = _score(model, [passes[i] for i in batch])
            for number, values in zip(batch, found, strict=True):
                if not all(map(math.isfinite, values)):
                    raise ModelError(
                        "the model's logits are not finite numbers; its weights are damaged, or overflow the "
                        "dtype"
                    )
                start = 0
                for index in groups[number]:
                    end = start + len(rows[index].wanted)
                    scores[index], start = values[start:end], end
            advance(len(batch))
    return scores


def shared_passes(rows: Sequence[Row]) -> tuple[list[Row], list[list[int]]]:
    """Rows that want what all `rows` want, and for each the indices of those it serves, in the order wanted.

    A row that is the beginning of another is served by that one's forward pass.
    """
    carried: dict[int, list[int]] = {}
    for index, carrier in enumerate(_carriers(rows)):
        carried.setdefault(carrier, []).append(index)
    passes = [
        Row(rows[carrier].ids, [pair for index in indices for pair in rows[index].wanted])
        for carrier, indices in carried.items()
    ]
    return passes, list(carried.values())


def _carriers(rows: Sequence[Row]) -> list[int]:
    """For each row, the one whose forward pass it is read off: the last that begins with it, or itself."""
    order = sorted(range(len(rows)), key=lambda index: tuple(rows[index].ids))
    carriers = list(range(len(rows)))
    for here, after in zip(reversed(order[:-1]), reversed(order[1:]), strict=True):
        ids = rows[here].ids  # in this order a row's extensions follow it at once
        if tuple(rows[after].ids[: len(ids)]) == tuple(ids):
            carriers[here] = carriers[after]
    return carriers


def _score(model: Scorable, rows: Sequence[Row]) -> list[list[float]]:
    if not isinstance(model, nn.Module):
        return [model.score(row.ids, row.wanted) for row in rows]
    values = row_log_probs(model, rows).double().cpu()
    return [part.tolist() for part in values.split([len(row.wanted) for row in rows])]


def row_log_probs(model: nn.Module, rows: Sequence[Row]) -> Float[Tensor, " pairs"]:
    """Log-probabilities of the wanted pairs, row after row, by one forward pass; differentiable."""
    positions = [position for row in rows for position, _ in row.wanted]
    logits, column = logits_at(model, *pad_right([row.ids for row in rows]), positions)
    logits = logits.float()
    triples = [(r, column[p], t) for r, row in enumerate(rows) for p, t in row.wanted]
    r, c, t = torch.tensor(triples, device=logits.device).unbind(1)
    return logits[r, c, t] - logits.logsumexp(dim=-1)[r, c]


def _batches(rows: Sequence[Row], batch_size: int) -> Iterator[list[int]]:
    """Row indices, longest first so that a batch pads little and a lack of memory shows at once."""
    batch: list[int] = []
    span = 0
    for index in sorted(range(len(rows)), key=lambda i: -len(rows[i].ids)):
        wider = max(span, len(rows[index].wanted))
        if batch and (len(batch) == batch_size or wider * (len(batch) + 1) > LOGIT_ROWS):
            yield batch
            batch, wider = [], len(rows[index].wanted)
        batch.append(index)
        span = wider
    if batch:
        yield batch


@contextmanager
def evaluating(model: Scorable) -> Iterator[None]:
    """Switch gradients and dropout off, and restore the model's mode afterwards."""
    if not isinstance(model, nn.Module):
        yield
        return
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
