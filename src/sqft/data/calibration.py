"""The token sequences that compression looks at."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sqft.data.items import Example
from sqft.data.records import source_name
from sqft.data.sources import read_records
from sqft.errors import DataError
from sqft.sections import CalibrationSection, DataSource, HubSource

__all__ = ["calibration_tokens"]

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
    rows: list[int] = []
    for setting, source, count in section.sources:
        stream: list[int] = []
        for ids in _texts(section, source, train, tokenizer, seed):
            if len(stream) >= count * length:
                break
            stream.extend(ids)
        if len(stream) < count * length:
            raise DataError(
                f"calibration {setting} {source_name(source)} has {len(stream)} tokens; {count} samples of "
                f"{length} need {count * length}: lower calibration.num_samples to "
                f"{section.num_samples * len(stream) // (count * length)}, shorten the samples, or give more "
                "text"
            )
        rows += stream[: count * length]
    return torch.tensor(rows, dtype=torch.long).view(section.num_samples, length)


def _texts(
    section: CalibrationSection,
    source: DataSource,
    train: Sequence[Example] | None,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> Iterator[Sequence[int]]:
    """Token ids of each text, the end-of-text token included if the tokenizer has one."""
    shuffle = random.Random(f"calibration:{seed}").shuffle
    if source == "train":
        if train is None:
            raise DataError("calibration.source is 'train', but there are no training items; name a file")
        examples = list(train)
        shuffle(examples)
        for example in examples:
            yield (*example.prompt_ids, *example.answer_ids)
        return
    texts = _read_texts(source, section.field)
    shuffle(texts)
    for text in texts:
        ids, end = tokenizer(text)["input_ids"], tokenizer.eos_token_id
        yield ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def _read_texts(source: DataSource, field: str) -> list[str]:
    if isinstance(source, HubSource) and source.records is None:
        source = source.model_copy(update={"records": HUB_TEXTS})
    texts: list[str] = []
    for record in read_records(source):
        value = record.fields.get(field)
        if field not in record.fields and record.fields.keys() == {"text"}:
            value = record.fields["text"]  # of a plain text file
        if not isinstance(value, str):
            have = ", ".join(map(repr, record.fields))
            raise DataError(
                f"{record.place}: no text in field {field!r}; it has {have}; set calibration.field"
            )
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
