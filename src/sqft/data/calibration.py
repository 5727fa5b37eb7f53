"""The token sequences that compression looks at, and texts that a teacher is asked about."""

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sqft.data.items import Example
from sqft.data.records import source_name
from sqft.data.sources import read_records
from sqft.errors import DataError
from sqft.sections import CalibrationSection, DataSource, DistillationSection, HubSource

__all__ = ["calibration_tokens", "text_tokens"]

HUB_TEXTS = 10_000  # texts of a hub data set that are looked at, unless its source says how many
BLOCK = 2000  # characters
PLAIN = (".txt", ".md")  # files that are one text


def calibration_tokens(
    section: CalibrationSection,
    train: Sequence[Example] | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
) -> Int64[Tensor, "num_samples sequence_length"]:
    """Token ids (num_samples, sequence_length): the texts in an order drawn by the seed, each followed by the
    end-of-text token if there is one, joined and cut into rows; those of `section.mix` come last.

    train: the training items, whose prompts and answers are the texts if the source is 'train'. Search and
    test items are never read.

    Raises: DataError if a source is missing, malformed, or has too few tokens.
    """
    length = section.sequence_length
    rows: list[Tensor] = []
    for setting, source, count in section.sources:
        if source == "train":
            texts: Iterable[Sequence[int]] = _item_texts(train, seed)
        else:
            texts = _token_ids(source, section.field, "calibration", tokenizer, seed)
        place = f"calibration {setting} {source_name(source)}"
        rows.append(_pack(texts, count, length, place, "calibration.num_samples", section.num_samples))
    return torch.cat(rows)


def text_tokens(
    section: DistillationSection, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> Int64[Tensor, "num_samples sequence_length"]:
    """Token ids of a section's texts, ordered, joined and cut into rows as those of a calibration.

    Raises: DataError as `calibration_tokens`.
    """
    assert section.text is not None
    texts = _token_ids(section.text, section.field, "distillation", tokenizer, seed)
    place, count = f"distillation text {source_name(section.text)}", section.num_samples
    return _pack(texts, count, section.sequence_length, place, "distillation.num_samples", count)


def _pack(
    texts: Iterable[Sequence[int]], count: int, length: int, place: str, setting: str, asked: int
) -> Tensor:
    """`count` rows of `length` tokens. setting: that which asks for so many, and for how many with others."""
    stream: list[int] = []
    for ids in texts:
        if len(stream) >= count * length:
            break
        stream.extend(ids)
    if len(stream) < count * length:
        raise DataError(
            f"{place} has {len(stream)} tokens; {count} samples of {length} need {count * length}: lower "
            f"{setting} to {asked * len(stream) // (count * length)}, shorten the samples, or give more text"
        )
    return torch.tensor(stream[: count * length], dtype=torch.long).view(count, length)


def _item_texts(train: Sequence[Example] | None, seed: int) -> Iterator[Sequence[int]]:
    """Prompt and answer of each item."""
    if train is None:
        raise DataError("calibration.source is 'train', but there are no training items; name a file")
    examples = list(train)
    random.Random(f"calibration:{seed}").shuffle(examples)
    for example in examples:
        yield (*example.prompt_ids, *example.answer_ids)


def _token_ids(
    source: DataSource, field: str, place: str, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Iterator[Sequence[int]]:
    """Token ids of each text, the end-of-text token included if the tokenizer has one."""
    texts = _read_texts(source, field, place)
    random.Random(f"calibration:{seed}").shuffle(texts)
    for text in texts:
        ids, end = tokenizer(text)["input_ids"], tokenizer.eos_token_id
        yield ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def _read_texts(source: DataSource, field: str, place: str) -> list[str]:
    if isinstance(source, HubSource) and source.records is None:
        source = source.model_copy(update={"records": HUB_TEXTS})
    texts: list[str] = []
    for record in read_records(source):
        value = record.fields.get(field)
        if field not in record.fields and record.fields.keys() == {"text"}:
            value = record.fields["text"]  # of a plain text file
        if not isinstance(value, str):
            have = ", ".join(map(repr, record.fields))
            raise DataError(f"{record.place}: no text in field {field!r}; it has {have}; set {place}.field")
        plain = Path(record.place.removesuffix(".gz")).suffix in PLAIN
        texts += _blocks(value) if plain else [value]
    return texts


def _blocks(text: str) -> Iterator[str]:
    """A text in blocks of some 2,000 characters, cut at line ends, whose order the seed can draw."""
    block, size = list[str](), 0
    for line in text.splitlines(keepends=True):
        block.append(line)
        size += len(line)
        if size >= BLOCK:
            yield "".join(block)
            block, size = [], 0
    if block:
        yield "".join(block)
