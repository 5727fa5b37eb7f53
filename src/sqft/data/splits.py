"""Train, search and test items, disjoint by construction."""

import random
from collections.abc import Iterable, Sequence
from itertools import chain
from statistics import median
from typing import Any

from transformers import PreTrainedTokenizerBase

from sqft.data.duplicates import count_near_duplicates, count_repeats, drop_repeats
from sqft.data.items import SPLITS, Example, Split, Splits
from sqft.data.prompts import PromptFormat
from sqft.data.records import Record, Source, source_name
from sqft.data.sources import read_records
from sqft.errors import DataError
from sqft.sections import DataSection

__all__ = ["load_splits"]

HELD_OUT: tuple[Split, ...] = ("test", "search")
USUAL = {"test": 300, "search": 64}  # items split off train, where there are enough
SHARE = {"test": 5, "search": 10}  # else one in so many
FEWEST = 4  # of fewer usable items, none is split off


def load_splits(section: DataSection, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Splits:
    """Read, format and tokenize the items, and make the splits disjoint.

    A split whose source is not given is drawn from train by the seed: as many items as the section says, or
    the usual number, or of small data a share, which may be none. An item of train that also occurs (the
    same prompt and answer but for case and spacing) in search or test is dropped from train, and one of
    search that occurs in test is dropped from search; near-duplicates are counted and kept.

    Raises: DataError for missing, empty or malformed files (with the line), items longer than
    sequence_length where the section refuses them, and splits that would be empty though they were named.
    """
    sources: dict[Split, Source | None] = {
        "train": section.train,
        "search": section.search,
        "test": section.test,
    }
    dropped: dict[str, Any] = {"null": {}, "too_long": {}}
    given: dict[Split, list[Example]] = {}
    forms: dict[str, str] = {}
    for name in SPLITS:
        source = sources[name]
        if source is not None:
            records = read_records(source)
            first = next(records)  # there is one, or an error
            form = PromptFormat.of(first, section, tokenizer)
            forms[name] = f"{form.form}, by the chat template" if form.chat else form.form
            given[name] = _load(chain([first], records), source, name, form, dropped)
    sizes, notes = _sizes(given, section)
    train, search, test = _split_off(given, sizes, seed)
    kept_search = drop_repeats(search, test)
    kept_train = drop_repeats(train, kept_search, test)
    dropped["in_held_out"] = {
        "train": len(train) - len(kept_train),
        "search": len(search) - len(kept_search),
    }
    kept: dict[Split, list[Example]] = {
        "train": kept_train[: section.train_items],
        "search": kept_search,
        "test": test,
    }
    for name in given:
        source = sources[name]
        if source is not None and not kept[name]:
            raise DataError(f"no {name} item is left of {source_name(source)}: dropped {_counts(dropped)}")
    report = {
        "forms": forms,
        "items": {name: len(items) for name, items in kept.items()},
        "dropped": dropped,
        "repeats": {name: count_repeats(items) for name, items in kept.items()},
        "near_duplicates": count_near_duplicates(kept["train"], {name: kept[name] for name in HELD_OUT}),
        "lengths": {name: _lengths(items, section) for name, items in kept.items() if items},
        "notes": notes + _notes(kept),
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
    records = read_records(section.test)
    first = next(records)
    form = PromptFormat.of(first, section, tokenizer)
    examples = _load(chain([first], records), section.test, "test", form, dropped)
    return examples, {reason: counts["test"] for reason, counts in dropped.items()}


def _load(
    records: Iterable[Record], source: Source, name: str, form: PromptFormat, dropped: dict[str, Any]
) -> list[Example]:
    examples: list[Example] = []
    limit = form.section.sequence_length
    dropped["null"][name] = dropped["too_long"][name] = 0
    for place, example in form.examples(records):
        if example is None:
            dropped["null"][name] += 1
        elif len(example) <= limit:
            examples.append(example)
        elif form.section.too_long == "drop":
            dropped["too_long"][name] += 1
        else:
            raise DataError(
                f"{place}: {len(example)} tokens, more than data.sequence_length {limit}; "
                "raise it, or write data.too_long: drop"
            )
    if not examples:
        raise DataError(
            f"{source_name(source)}: no item is left; {dropped['null'][name]} had a null field or an empty "
            f"answer, {dropped['too_long'][name]} were longer than {limit} tokens"
        )
    return examples


def _sizes(given: dict[Split, list[Example]], section: DataSection) -> tuple[dict[Split, int], list[str]]:
    """How many items of train each split that is not given gets, and what of it should be told.

    Raises: DataError if the section asks for more than there are.
    """
    asked = {"test": section.test_items, "search": section.search_items}
    missing = [name for name in HELD_OUT if name not in given]
    total = len(given["train"])
    sizes: dict[Split, int] = {}
    notes = []
    for name in missing:
        share = max(1, total // SHARE[name]) if total >= FEWEST else 0
        sizes[name] = asked[name] or min(USUAL[name], share)
        if asked[name] is None and sizes[name] < USUAL[name]:
            notes.append(f"{sizes[name]} {name} items are split off {total} ({USUAL[name]} are usual)")
    if sum(sizes.values()) >= total:
        wanted = " and ".join(f"{sizes[name]} {name} items" for name in missing)
        raise DataError(
            f"{source_name(section.train)} has {total} usable items; {wanted} cannot be split off it; lower "
            "data.test_items or data.search_items, or leave them out"
        )
    return sizes, notes


def _split_off(
    given: dict[Split, list[Example]], sizes: dict[Split, int], seed: int
) -> tuple[list[Example], list[Example], list[Example]]:
    train = given["train"]
    order = list(range(len(train)))
    random.Random(f"split:{seed}").shuffle(order)
    start, splits = 0, dict(given)
    for name, size in sizes.items():
        splits[name] = _take(train, order[start : start + size])
        start += size
    return _take(train, order[start:]), splits["search"], splits["test"]


def _take(examples: Sequence[Example], indices: Sequence[int]) -> list[Example]:
    return [examples[index] for index in sorted(indices)]


def _lengths(examples: Sequence[Example], section: DataSection) -> dict[str, float]:
    """Tokens: of the shortest, the median and the longest item, of all, and those that the loss counts."""
    lengths = [len(example.token_ids) for example in examples]
    return {
        "shortest": min(lengths),
        "median": median(lengths),
        "longest": max(lengths),
        "tokens": sum(lengths),
        "counted": sum(len(example.counted(section.loss_on)) for example in examples),
    }


def _notes(kept: dict[Split, list[Example]]) -> list[str]:
    uncounted = sum(example.uncounted_turns for items in kept.values() for example in items)
    if not uncounted:
        return []
    return [
        f"{uncounted} earlier turns of the assistant are not counted by the loss: the chat template writes "
        "them differently once others follow"
    ]


def _counts(dropped: dict[str, dict[str, int]]) -> str:
    found = [f"{sum(counts.values())} {reason.replace('_', ' ')}" for reason, counts in dropped.items()]
    return ", ".join(found)
