"""The token sequences that compression looks at."""

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sqft.data.items import Example
from sqft.data.records import read_records
from sqft.errors import DataError, require
from sqft.sections import CalibrationSection

__all__ = ["calibration_tokens"]

HUB_TEXTS = 10_000  # texts of a hub data set that are looked at, at most


def calibration_tokens(
    section: CalibrationSection,
    train: Sequence[Example] | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
) -> Int64[Tensor, "num_samples sequence_length"]:
    """Texts in an order drawn by the seed, each with the end-of-text token, if any; cut into rows.

    train: the training items (prompt and answer), which source 'train' stands for; neither search nor test
    items are looked at.

    Raises: DataError if the source is missing, malformed, or has too few tokens.
    """
    needed = section.num_samples * section.sequence_length
    stream: list[int] = []
    for ids in _texts(section, train, tokenizer, seed):
        stream.extend(ids)
        if len(stream) >= needed:
            break
    if len(stream) < needed:
        raise DataError(
            f"calibration source {section.source} has {len(stream)} tokens; {section.num_samples} samples of "
            f"{section.sequence_length} need {needed}: lower calibration.num_samples to "
            f"{len(stream) // section.sequence_length}, shorten the samples, or give more text"
        )
    rows = torch.tensor(stream[:needed], dtype=torch.long)
    return rows.view(section.num_samples, section.sequence_length)


def _texts(
    section: CalibrationSection,
    train: Sequence[Example] | None,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> Iterator[Sequence[int]]:
    """Token ids of each text, the end-of-text token included if the tokenizer has one."""
    shuffle = random.Random(f"calibration:{seed}").shuffle
    if section.source == "train":
        if train is None:
            raise DataError("calibration.source is 'train', but there are no training items; name a file")
        examples = list(train)
        shuffle(examples)
        for example in examples:
            yield (*example.prompt_ids, *example.answer_ids)
        return
    texts = _read_texts(section)
    shuffle(texts)
    for text in texts:
        ids, end = tokenizer(text)["input_ids"], tokenizer.eos_token_id
        yield ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def _read_texts(section: CalibrationSection) -> list[str]:
    source = section.source
    if source.startswith("hub:"):
        return _read_hub(source.removeprefix("hub:"), section.field)
    if source.endswith(".jsonl"):
        return [_field(record.fields, section.field, record.place) for record in read_records(source)]
    if source.endswith(".txt"):
        return [*_paragraphs(Path(source))]
    raise DataError(f"calibration.source {source!r} is not 'train', a .txt or .jsonl file, or hub:NAME")


def _paragraphs(path: Path) -> Iterator[str]:
    """Blocks of about 2,000 characters, cut at line ends, so that the order can be drawn by the seed."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; check calibration.source") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check calibration.source") from error
    block: list[str] = []
    for line in lines:
        block.append(line)
        if sum(map(len, block)) >= 2000:
            yield "".join(block)
            block = []
    if block:
        yield "".join(block)


def _read_hub(name: str, field: str) -> list[str]:
    datasets = require("datasets", "hub")
    repository, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(repository, config or None, split="train", streaming=True)
        return [
            _field(row, field, f"hub:{name}, record {i}") for i, row in enumerate(islice(rows, HUB_TEXTS))
        ]
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"hub:{name} cannot be read: {reason}; name a local file instead") from error


def _field(fields: dict[str, Any], name: str, place: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        have = ", ".join(map(repr, fields))
        raise DataError(f"{place}: no text in field {name!r}; it has {have}; set calibration.field")
    return value
