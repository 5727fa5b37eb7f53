"""Finds items that occur in two splits: exact repeats, and near-duplicates."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqft.data.items import Example

__all__ = ["count_near_duplicates", "count_repeats", "drop_repeats", "text_key"]

NEAR = 0.5  # Jaccard similarity of word 5-grams from which two prompts count as near-duplicates
SHINGLE = 5
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
TEMPLATE_SHARE = 0.05  # 5-grams that a larger share of the items has belong to the template


def text_key(example: Example) -> str:
    """Prompt and answer without case and spacing: equal keys mean the same item."""
    return "\x1f".join(" ".join(text.casefold().split()) for text in (example.prompt, example.answer))


def drop_repeats(examples: Iterable[Example], *others: Iterable[Example]) -> list[Example]:
    """The examples that occur in none of the other splits."""
    taken = {text_key(example) for other in others for example in other}
    return [example for example in examples if text_key(example) not in taken]


def count_repeats(examples: Iterable[Example]) -> int:
    """How many examples an earlier one repeats."""
    count = 0
    seen: set[int] = set()  # of hashes, which take a tenth of the keys' memory
    for example in examples:
        key = hash(text_key(example))
        count += key in seen
        seen.add(key)
    return count


def count_near_duplicates(
    train: Iterable[Example], held_out: Mapping[Any, Sequence[Example]]
) -> dict[Any, dict[str, int]]:
    """How many items of each held-out split have a near-duplicate in train, which is gone through once.

    same_but_numbers: the prompts are equal once every number is masked.
    similar: the word 5-grams of the prompts have a Jaccard similarity of 0.5 or more. 5-grams that more than
    5 % of the held-out items share are left out: they belong to the template, not to the item.
    """
    splits = {name: _HeldOut(examples) for name, examples in held_out.items()}
    watching = [split for split in splits.values() if split.masked]
    for example in train if watching else ():
        words = example.prompt.casefold().split()
        masked, shingles = _mask_numbers(words), _shingles(words)
        for split in watching:
            split.compare(masked, shingles)
    return {name: split.counts() for name, split in splits.items()}


class _HeldOut:
    """The prompts of a split, and which of them a prompt of train is near to so far."""

    def __init__(self, examples: Sequence[Example]) -> None:
        words = [example.prompt.casefold().split() for example in examples]
        shingles = [_shingles(item) for item in words]
        frequency = Counter(shingle for item in shingles for shingle in item)
        limit = max(2, int(TEMPLATE_SHARE * len(examples)))
        self.masked = Counter(map(_mask_numbers, words))
        self.template = {shingle for shingle, count in frequency.items() if count > limit}
        self.sizes = [len(item - self.template) for item in shingles]
        self.holders: dict[int, list[int]] = {}
        for index, item in enumerate(shingles):
            for shingle in item - self.template:
                self.holders.setdefault(shingle, []).append(index)
        self.same: set[str] = set()
        self.similar: set[int] = set()

    def compare(self, masked: str, shingles: set[int]) -> None:
        if masked in self.masked:
            self.same.add(masked)
        common = shingles & self.holders.keys()
        if common:
            size = len(shingles - self.template)
            shared = Counter(index for shingle in common for index in self.holders[shingle])
            for index, count in shared.items():
                if count >= NEAR * (size + self.sizes[index] - count):
                    self.similar.add(index)

    def counts(self) -> dict[str, int]:
        same = sum(self.masked[masked] for masked in self.same)
        return {"same_but_numbers": same, "similar": len(self.similar)}


def _mask_numbers(words: Sequence[str]) -> str:
    return NUMBER.sub("0", " ".join(words))


def _shingles(words: Sequence[str]) -> set[int]:
    last = max(1, len(words) - SHINGLE + 1)
    return set(map(hash, zip(*(words[start : start + last] for start in range(SHINGLE)), strict=False))) or {
        hash(tuple(words))
    }
