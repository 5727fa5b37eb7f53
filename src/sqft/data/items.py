"""Items: as text and as token ids, in three splits, and on disk as one JSON line each."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from sqft.artifacts import digest_json

__all__ = [
    "SPLITS",
    "Example",
    "Split",
    "Splits",
    "chance_accuracy",
    "read_items",
    "shared_ids",
    "write_items",
]

Split = Literal["train", "search", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
LossOn = Literal["answer", "text"]


@dataclass(frozen=True, slots=True)
class Example:
    """One item as text and as token ids.

    `answer_ids` ends with a token that ends the answer; `choices_ids`, which are compared by likelihood, do
    not. earlier_answers: the places in `prompt_ids` (start, end) of the assistant's earlier turns, which the
    loss counts as well; uncounted_turns: those of them whose tokens could not be told. is_text: the item is a
    window of a text, of which the first token stands for the prompt; there is no answer to compare with.
    """

    prompt: str
    answer: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    choices_ids: tuple[tuple[int, ...], ...] | None = None
    label: int | None = None
    earlier_answers: tuple[tuple[int, int], ...] = ()
    uncounted_turns: int = 0
    is_text: bool = False

    def __len__(self) -> int:
        """Tokens of the longest sequence that scoring this item needs."""
        longest = max((len(ids) for ids in self.choices_ids or ()), default=0)
        return len(self.prompt_ids) + max(len(self.answer_ids), longest)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Prompt and answer."""
        return (*self.prompt_ids, *self.answer_ids)

    def counted(self, loss_on: LossOn = "answer") -> list[int]:
        """The places in `token_ids` of the tokens that the loss counts; the very first is never one."""
        if loss_on == "text":
            return list(range(1, len(self.token_ids)))
        earlier = [place for start, end in self.earlier_answers for place in range(start, end)]
        return [*earlier, *range(len(self.prompt_ids), len(self.token_ids))]


@dataclass(frozen=True)
class Splits:
    """Items to train on, to search with and to test on, and what was dropped on the way.

    report: form of each source; items; dropped (null, too_long, in_held_out); repeats within a split;
    near_duplicates of train; lengths in tokens; notes, what a user should be told in a line each.
    """

    train: list[Example]
    search: list[Example]
    test: list[Example]
    report: dict[str, Any]

    @cached_property
    def digest(self) -> str:
        """The sha256 of everything that training, search and evaluation see of the items."""
        return digest_json([[_content(example) for example in getattr(self, name)] for name in SPLITS])


def write_items(directory: Path, splits: Splits) -> None:
    """Write SPLIT.jsonl for each split."""
    names = [field.name for field in fields(Example)]
    for split in SPLITS:
        with (directory / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for example in getattr(splits, split):
                values = {name: getattr(example, name) for name in names}
                file.write(json.dumps(values, ensure_ascii=False) + "\n")


def read_items(directory: Path, split: Split) -> list[Example]:
    """One split as `write_items` wrote it."""
    share: dict[int, int] = {}
    with (directory / f"{split}.jsonl").open(encoding="utf-8") as lines:
        return [_example(json.loads(line), share) for line in lines]


def shared_ids(ids: Iterable[int], share: dict[int, int]) -> tuple[int, ...]:
    """Token ids that are the same objects wherever they are equal: a million items take a third."""
    return tuple([share.setdefault(token, token) for token in ids])


def chance_accuracy(examples: Sequence[Example]) -> float | None:
    """The accuracy that guessing reaches; None where no item has choices."""
    shares = [1 / len(example.choices_ids) for example in examples if example.choices_ids]
    return sum(shares) / len(shares) if shares else None


def _example(values: dict[str, Any], share: dict[int, int]) -> Example:
    choices = values.pop("choices_ids")
    return Example(
        prompt_ids=shared_ids(values.pop("prompt_ids"), share),
        answer_ids=shared_ids(values.pop("answer_ids"), share),
        choices_ids=None if choices is None else tuple(shared_ids(ids, share) for ids in choices),
        earlier_answers=tuple(map(tuple, values.pop("earlier_answers"))),
        **values,
    )


def _content(example: Example) -> list[Any]:
    return [
        example.prompt_ids,
        example.answer_ids,
        example.choices_ids,
        example.label,
        example.answer,
        example.earlier_answers,
    ]
