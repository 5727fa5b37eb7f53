"""Finds items that occur in two splits: exact repeats, and near-duplicates."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from sqft.data.items import Example

__all__ = ["count_near_duplicates", "drop_repeats", "text_key"]

NEAR = 0.5  # Jaccard similarity of word 5-grams from which two prompts count as near-duplicates
SHINGLE = 5
TEMPLATE_SHARE = 0.05  # 5-grams that a larger share of the items has belong to the template


def text_key(example: Example) -> str:
    """Prompt and answer without case and spacing: equal keys mean the same item."""
    return "\x1f".join(" ".join(text.casefold().split()) for text in (example.prompt, example.answer))


def drop_repeats(examples: Iterable[Example], *others: Iterable[Example]) -> list[Example]:
    """The examples that occur in none of the other splits."""
    taken = {text_key(example) for other in others for example in other}
    return [example for example in examples if text_key(example) not in taken]


def count_near_duplicates(train: Sequence[Example], held_out: Sequence[Example]) -> dict[str, int]:
    """How many held-out items have a near-duplicate in train.

    same_but_numbers: the prompts are equal once every number is masked.
    similar: the word 5-grams of the prompts have a Jaccard similarity of 0.5 or more. 5-grams that more than
    5 % of the held-out items share are left out: they belong to the template, not to the item.
    """
    masked = {_mask_numbers(example.prompt) for example in train}
    same = sum(_mask_numbers(example.prompt) in masked for example in held_out)
    return {"same_but_numbers": same, "similar": _count_similar(train, held_out)}


def _count_similar(train: Sequence[Example], held_out: Sequence[Example]) -> int:
    shingles = [_shingles(example.prompt) for example in held_out]
    frequency = Counter(shingle for item in shingles for shingle in item)
    limit = max(2, int(TEMPLATE_SHARE * len(held_out)))
    template = {shingle for shingle, count in frequency.items() if count > limit}
    shingles = [item - template for item in shingles]
    holders: dict[int, list[int]] = {}
    for index, item in enumerate(shingles):
        for shingle in item:
            holders.setdefault(shingle, []).append(index)
    similar: set[int] = set()
    for example in train:
        own = _shingles(example.prompt) - template
        shared = Counter(index for shingle in own for index in holders.get(shingle, ()))
        for index, count in shared.items():
            if count >= NEAR * (len(own) + len(shingles[index]) - count):
                similar.add(index)
    return len(similar)


def _mask_numbers(text: str) -> str:
    return re.sub(r"\d+(?:[.,]\d+)*", "0", " ".join(text.casefold().split()))


def _shingles(text: str) -> set[int]:
    words = text.casefold().split()
    return {hash(tuple(words[i : i + SHINGLE])) for i in range(max(1, len(words) - SHINGLE + 1))}
