"""Tasks of lm-evaluation-harness on files that lie here, in place of the hub's data sets."""

import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sqft.data.files import read_file
from sqft.data.records import Record
from sqft.errors import DataError, require

__all__ = ["local_files", "with_local_data"]

SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
# A benchmark whose test answers are secret is measured on its validation set, which people also call test.
STAND_INS = ("test", "validation", "dev")


def with_local_data(fields: dict[str, Any], directory: Path) -> dict[str, Any]:
    """A task's definition whose data are `directory/NAME/SPLIT.jsonl`, NAME that of the task.

    Records have the fields that the definition reads, as on the hub; for ARC, OpenBookQA, PIQA and BoolQ
    `question`, `choices` (a list) and `label` (an index) do as well. Splits that are not there are left out,
    but the one that is measured must be.

    Raises: MissingExtraError without datasets; DataError if files are missing or a record does not fit.
    """
    datasets = require("datasets", "eval")
    task = str(fields["task"])
    files = local_files(fields, directory)
    convert = CONVERSIONS.get(task, _as_it_is)
    splits = {
        split: datasets.Dataset.from_list([convert(record, task) for record in read_file(path)])
        for split, path in files.items()
    }
    kept = {key: fields[key] if fields.get(key) in splits else None for key in SPLITS if key in fields}
    shots = fields.get("num_fewshot") or 0
    if shots and not any(kept.get(key) for key in ("fewshot_split", "training_split", "validation_split")):
        raise DataError(
            f"task {task} shows the model {shots} solved examples of {fields.get('fewshot_split', 'train')}"
            f".jsonl, which is not in {_folder(fields, directory)}; put it there, or ask for 0 examples"
        )
    source = {"dataset_path": str(directory), "dataset_name": None, "dataset_kwargs": None}
    return fields | kept | source | {"custom_dataset": lambda **_: splits}


def local_files(fields: Mapping[str, Any], directory: Path) -> dict[str, Path]:
    """The files of a task below `directory`, by split.

    Raises: DataError if the split that is measured is not among them.
    """
    folder = _folder(fields, directory)
    measured = fields.get("test_split") or fields.get("validation_split")
    found = {}
    for split in {fields[key] for key in SPLITS if isinstance(fields.get(key), str)}:
        names = dict.fromkeys((split, *STAND_INS)) if split == measured else (split,)
        path = next((p for name in names if (p := folder / f"{name}.jsonl").is_file()), None)
        if path is not None:
            found[split] = path
    if measured not in found:
        raise DataError(
            f"the data of task {fields['task']} are not here: there is no {folder / f'{measured}.jsonl'}"
        )
    return found


def _folder(fields: Mapping[str, Any], directory: Path) -> Path:
    metadata = fields.get("metadata")
    name = metadata.get("data") if isinstance(metadata, dict) else None
    return directory / str(name or fields["task"])


def _as_it_is(record: Record, task: str) -> dict[str, Any]:
    return record.fields


def _arc(record: Record, task: str) -> dict[str, Any]:
    """question, choices {text, label}, answerKey; of OpenBookQA the question is called question_stem."""
    fields = record.fields
    stem = "question_stem" if task == "openbookqa" else "question"
    if isinstance(fields.get("choices"), dict):
        return fields
    question, choices, label = _simple(record, task)
    letters = list(string.ascii_uppercase[: len(choices)])
    return {
        stem: question,
        "choices": {"text": choices, "label": letters},
        "answerKey": letters[label],
    }


def _piqa(record: Record, task: str) -> dict[str, Any]:
    if "goal" in record.fields:
        return record.fields
    question, choices, label = _simple(record, task)
    if len(choices) != 2:
        raise DataError(f"{record.place}: task {task} has two choices, not {len(choices)}")
    return {"goal": question, "sol1": choices[0], "sol2": choices[1], "label": label}


def _boolq(record: Record, task: str) -> dict[str, Any]:
    fields = record.fields
    if isinstance(fields.get("answer"), bool):
        fields = fields | {"label": int(fields["answer"])}
    if "passage" not in fields or "question" not in fields or fields.get("label") not in (0, 1):
        raise DataError(f"{record.place}: task {task} needs passage, question and label (0 or 1) or answer")
    return {key: fields[key] for key in ("passage", "question", "label")}


def _simple(record: Record, task: str) -> tuple[str, list[str], int]:
    question, choices, label = (record.fields.get(key) for key in ("question", "choices", "label"))
    fits = isinstance(question, str) and isinstance(choices, list) and isinstance(label, int)
    if not fits or not 0 <= label < len(choices):  # type: ignore[operator, arg-type]
        raise DataError(
            f"{record.place}: task {task} needs the fields it has on the hub, or question, choices (a list) "
            "and label (the index of the right one)"
        )
    return question, [str(choice) for choice in choices], label  # type: ignore[return-value, union-attr]


CONVERSIONS: dict[str, Callable[[Record, str], dict[str, Any]]] = {
    "arc_challenge": _arc,
    "arc_easy": _arc,
    "boolq": _boolq,
    "openbookqa": _arc,
    "piqa": _piqa,
}
