"""Train, search and test items, disjoint by construction."""

import random
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from sqft.data.duplicates import count_near_duplicates, drop_repeats, text_key
from sqft.data.items import SPLITS, Example, Split, Splits
from sqft.data.prompts import PromptFormat
from sqft.data.records import read_records
from sqft.errors import DataError
from sqft.sections import DataSection

__all__ = ["load_splits"]


def load_splits(section: DataSection, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Splits:
    """Read, format and tokenize the items, and make the splits disjoint.

    A split whose file is not given is drawn from train by the seed. An item of train that also stands (same
    prompt and answer but for case and spacing) in search or test is dropped from train, one of search that
    stands in test from search; near-duplicates are counted and kept.

    Raises: DataError for missing, empty or malformed files (with the line), items longer than
    sequence_length where the section refuses them, and splits that would be empty.
    """
    form = PromptFormat(section, tokenizer)
    dropped: dict[str, Any] = {"null": {}, "too_long": {}}
    given = {
        name: _load(path, name, form, dropped)
        for name, path in zip(SPLITS, (section.train, section.search, section.test), strict=True)
        if path is not None
    }
    train, search, test = _split_off(given, section, seed)
    kept_search = drop_repeats(search, test)
    kept_train = drop_repeats(train, kept_search, test)
    dropped["in_held_out"] = {
        "train": len(train) - len(kept_train),
        "search": len(search) - len(kept_search),
    }
    kept = {"train": kept_train[: section.train_items], "search": kept_search, "test": test}
    for name, items in kept.items():
        if not items:
            raise DataError(
                f"no {name} item is left of {section.train if name == 'train' else getattr(section, name)}: "
                f"dropped {dropped}"
            )
    report = {
        "items": {name: len(items) for name, items in kept.items()},
        "dropped": dropped,
        "repeats": {name: len(items) - len(set(map(text_key, items))) for name, items in kept.items()},
        "near_duplicates": {
            name: count_near_duplicates(kept["train"], kept[name]) for name in ("search", "test")
        },
    }
    return Splits(kept["train"], kept["search"], kept["test"], report)


def load_test_items(
    section: DataSection, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Example], dict[str, int]]:
    """The items of `section.test` as `load_splits` renders them, and how many were dropped, by reason.

    Raises: DataError as `load_splits`.
    """
    assert section.test is not None
    dropped: dict[str, Any] = {"null": {}, "too_long": {}}
    examples = _load(section.test, "test", PromptFormat(section, tokenizer), dropped)
    return examples, {reason: counts["test"] for reason, counts in dropped.items()}


def _load(path: str, name: str, form: PromptFormat, dropped: dict[str, Any]) -> list[Example]:
    examples: list[Example] = []
    limit = form.section.sequence_length
    dropped["null"][name] = dropped["too_long"][name] = 0
    for record in read_records(path):
        example = form.example(record)
        if example is None:
            dropped["null"][name] += 1
        elif len(example) <= limit:
            examples.append(example)
        elif form.section.too_long == "drop":
            dropped["too_long"][name] += 1
        else:
            raise DataError(
                f"{record.place}: {len(example)} tokens, more than data.sequence_length {limit}; "
                "raise it, or write data.too_long: drop"
            )
    if not examples:
        raise DataError(f"{path}: no item is left; {dropped['null'][name]} had a null field or an empty "
                        f"answer, {dropped['too_long'][name]} were longer than {limit} tokens")  # fmt: skip
    return examples


def _split_off(
    given: dict[Split, list[Example]], section: DataSection, seed: int
) -> tuple[list[Example], list[Example], list[Example]]:
    train = given["train"]
    held_out: tuple[Split, ...] = ("test", "search")
    missing = [name for name in held_out if name not in given]
    sizes: dict[Split, int] = {"test": section.test_items, "search": section.search_items}
    needed = sum(sizes[name] for name in missing)
    if needed >= len(train):
        wanted = " and ".join(f"{sizes[name]} {name} items" for name in missing)
        raise DataError(f"{section.train} has {len(train)} usable items; {wanted} cannot be split off it; "
                        "lower data.test_items or data.search_items")  # fmt: skip
    order = list(range(len(train)))
    random.Random(f"split:{seed}").shuffle(order)
    start, splits = 0, dict(given)
    for name in missing:
        splits[name] = _take(train, order[start : start + sizes[name]])
        start += sizes[name]
    return _take(train, order[start:]), splits["search"], splits["test"]


def _take(examples: Sequence[Example], indices: Sequence[int]) -> list[Example]:
    return [examples[index] for index in sorted(indices)]
