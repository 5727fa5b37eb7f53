"""Measuring a finished model, adapter or export, without the recipe that made it.

Items are rendered by the same `DataSection` and `PromptFormat` as in training. What the model was trained
with stands beside its weights (`sqft.json`), so that only the file of items has to be named.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sqft.artifacts import FACTS, REPORT, digest_json, read_object
from sqft.directories import write_files
from sqft.errors import AdapterError, DataError, ModelError
from sqft.formats.openvino import XML
from sqft.marks import EVALUATIONS
from sqft.pipeline.opening import open_model
from sqft.pipeline.runner import environment
from sqft.progress import SILENT, Progress
from sqft.report import ModelRow
from sqft.report.content import finite_values
from sqft.report.summary import loss_unit
from sqft.sections import DataSection, EvaluateSection, ModelSection

if TYPE_CHECKING:
    from sqft.data import Example
    from sqft.evaluation.scoring import Scorable
    from sqft.runtimes.speed import Artefact

__all__ = ["Evaluation", "evaluate_path", "hub_entries", "recorded_prompt"]

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TASK_LENGTH = 2048  # tokens of context for tasks, whose prompts are not known in advance


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model. items: what each item gave. written: the files beside the model."""

    name: str
    runtime: str
    row: ModelRow
    items: dict[str, Any]
    loss_unit: str
    written: list[Path] = field(default_factory=list)


def recorded_prompt(path: Path) -> dict[str, Any] | None:
    """The keys of a data section that a model's prompts were made with, where its files tell; else None."""
    folder = path if path.is_dir() else path.parent
    prompt = read_object(folder / FACTS).get("prompt")
    if isinstance(prompt, dict):
        return prompt
    data = read_object(folder.parent / REPORT).get("recipe", {}).get("data")
    try:
        return DataSection.model_validate(data).rendering() if isinstance(data, dict) else None
    except ValueError:  # of another version
        return None


def evaluate_path(
    target: str,
    section: EvaluateSection,
    data: Mapping[str, Any] | None = None,
    *,
    base: str | None = None,
    tokenizer_dir: Path | None = None,
    chat_tasks: bool = False,
    samples: bool = False,
    write: bool = True,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> Evaluation:
    """Measure a model directory, an adapter (with its base), a GGUF file, an OpenVINO model or a hub id.

    data: keys of a data section, its `test` the file of items; keys that are left out are those that the
    model was trained with. section: as in a recipe. base: of an adapter; default the one that it names.
    tokenizer_dir: of a GGUF file; default its own. write: put the results beside the model.

    Raises: DataError, ModelError, AdapterError, ExportError, MissingExtraError.
    """
    from sqft.evaluation.measurement import measure_model

    if data is None and not (section.general_text or section.perplexity or section.tasks):
        raise DataError("nothing to measure; name a file of items (--data), tasks, or a text")
    artefact = _describe(_locate(target), base)
    tokenizer = _tokenizer(artefact, tokenizer_dir, trust_remote_code)
    prompt = None if data is None else _data_section(artefact, data)
    examples, report = _items(prompt, tokenizer) if prompt else ([], {})
    length = max([len(example) for example in examples] + [TASK_LENGTH if section.tasks else 0])
    model = _open(artefact, max(length, section.sequence_length) + section.max_new_tokens, device,
                  trust_remote_code)  # fmt: skip
    row, items = measure_model(
        model,
        tokenizer,
        examples,
        section,
        chat_tasks=chat_tasks,
        samples=samples,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    bits = _bits(artefact, trust_remote_code)
    size = artefact.size_bytes
    name = artefact.name
    measured = ModelRow(name, **row, bits=bits, size_bytes=size)
    unit = loss_unit(among_choices=any(example.choices_ids for example in examples))
    found = Evaluation(name, artefact.runtime, measured, items, unit)
    record = _record(found, artefact, prompt, section, report, device)
    return replace(found, written=_write(artefact, record) if write else [])


def _locate(target: str) -> Path:
    """The file or directory that a target means; a hub id is fetched.

    Raises: ModelError if there is no such thing.
    """
    from sqft.models.location import fetch_from_hub, find_gguf

    section = ModelSection(source=target)
    path = Path(target).expanduser()
    if path.is_dir():
        return path
    return find_gguf(section) or fetch_from_hub(section)


def _describe(path: Path, base: str | None) -> "Artefact":
    """What a path is, and what runs it; an adapter becomes its base with the adapter beside it."""
    from sqft.runtimes import open_artefact

    config = path / "adapter_config.json"
    if not config.is_file():
        if base is not None:
            raise AdapterError(f"{path} is not an adapter, so --base does not apply")
        return open_artefact(path)
    named = base or read_object(config).get("base_model_name_or_path")
    try:
        if not isinstance(named, str) or not named:
            raise ModelError("it does not name one")
        found = _locate(named)
    except ModelError as error:
        raise AdapterError(
            f"the base of the adapter {path} is not here ({error}); name it with --base"
        ) from error
    return open_artefact(found, f"{found.resolve().name} + {path.resolve().name}", path)


def _tokenizer(artefact: "Artefact", given: Path | None, trust_remote_code: bool) -> Any:
    """The tokenizer beside the weights; of a GGUF file alone, the one inside."""
    from sqft.models import load_tokenizer

    if given is not None:
        return load_tokenizer(given, trust_remote_code=trust_remote_code)
    folder = artefact.path if artefact.path.is_dir() else artefact.path.parent
    if artefact.path.is_dir() or (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder, trust_remote_code=trust_remote_code)
    from sqft.models.gguf_description import gguf_tokenizer

    return gguf_tokenizer(artefact.path)


def _data_section(artefact: "Artefact", data: Mapping[str, Any]) -> DataSection:
    """The data section that renders the items: what was given, else what the model was trained with."""
    path = artefact.adapter or artefact.path
    recorded = recorded_prompt(path)
    told = {key: value for key, value in data.items() if value is not None}
    if recorded is None and "prompt" not in told:
        raise DataError(
            f"{path} does not record the prompt it was trained with; give --prompt and --answer, or --recipe"
        )
    values = {**(recorded or {}), **told}
    try:
        return DataSection.model_validate({"train": values["test"], **values})
    except ValueError as error:
        raise DataError(f"the items cannot be rendered: {str(error).splitlines()[-1].strip()}") from error


def _items(section: DataSection, tokenizer: Any) -> tuple[list["Example"], dict[str, Any]]:
    from sqft.data.records import source_name
    from sqft.data.sources import source_content
    from sqft.data.splits import load_test_items

    examples, dropped = load_test_items(section, tokenizer)
    assert section.test is not None
    return examples, {
        "file": source_name(section.test),
        "content": source_content(section.test),
        "dropped": dropped,
    }


def _open(artefact: "Artefact", length: int, device: str, trust_remote_code: bool) -> "Scorable":
    from sqft.runtimes import LlamaCpp, OpenVinoModel

    if artefact.runtime == "llama.cpp":
        return LlamaCpp(artefact.path, context=length, lora_path=artefact.adapter)
    if artefact.runtime == "openvino":
        return OpenVinoModel(artefact.path / XML, max_length=length)
    loading: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
    found: Scorable = open_model(artefact.path, artefact.adapter, **loading)
    return found


def _bits(artefact: "Artefact", trust_remote_code: bool) -> int | None:
    from sqft.models import open_checkpoint

    if artefact.runtime != "transformers":
        return None
    grid = open_checkpoint(artefact.path, trust_remote_code=trust_remote_code).grid
    return grid.bits if grid else None


def _record(
    found: Evaluation,
    artefact: "Artefact",
    prompt: DataSection | None,
    section: EvaluateSection,
    report: Mapping[str, Any],
    device: str,
) -> dict[str, Any]:
    """What is written of an evaluation: enough to repeat it, and to compare it item by item."""
    folder = artefact.adapter or (artefact.path if artefact.path.is_dir() else artefact.path.parent)
    recipe = dict(read_object(folder / FACTS).get("recipe") or {"model": {"source": str(artefact.path)}})
    if prompt is not None:
        recipe["data"] = prompt.rendering()
    recipe["evaluate"] = section.model_dump(mode="json", exclude_none=True)
    return {
        "sqft_evaluation": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {
            "path": str(artefact.path),
            "adapter": str(artefact.adapter) if artefact.adapter else None,
            "runtime": artefact.runtime,
        },
        "row": asdict(found.row),
        "data": dict(report),
        "recipe": recipe,
        "environment": environment(device),
        "items": found.items,
    }


def _write(artefact: "Artefact", record: dict[str, Any]) -> list[Path]:
    """Put the results beside the weights: as JSON for `sqft compare`, and as the hub shows them.

    The name holds a digest of what was measured, so that the same measurement made again takes the place of
    the earlier one; anything else of that name stays.
    """
    place = artefact.adapter or artefact.path
    folder = (place if place.is_dir() else place.parent) / EVALUATIONS
    tasks = record["items"].get("tasks", {})
    samples = {task: figures.pop("samples") for task, figures in tasks.items() if "samples" in figures}
    told = {"data": record["data"], "recipe": record["recipe"], "model": record["model"]}
    stem = Path(record["data"].get("file", "")).stem or "-".join(tasks)[:40] or "perplexity"
    name = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', stem)}-{digest_json(told)[:8]}"
    entries = hub_entries(record)
    contents = {f"{name}.json": _json(record)}
    contents |= {f"{name}.yaml": yaml.safe_dump(entries, sort_keys=False).encode()} if entries else {}
    contents |= {
        f"{name}-{task}.samples.jsonl": b"".join(_json(row, indent=None) for row in rows)
        for task, rows in samples.items()
    }
    return write_files(folder, contents)


def hub_entries(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The figures of tasks whose data set is on the hub, as its model pages read them from YAML."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    from sqft.evaluation.harness import main_figure

    entries = []
    for task, figures in record["items"].get("tasks", {}).items():
        if not HUB_ID.fullmatch(str(figures.get("data_set"))):
            continue
        metric, value = main_figure(figures)
        notes = f"lm-evaluation-harness, {metric}, {figures['num_items']} items"
        limit = record["recipe"]["evaluate"].get("max_items")
        notes += f", the first {limit} of the set" if limit else ""
        entry = EvalResultEntry(
            dataset_id=figures["data_set"],
            task_id=task,
            value=round(100 * value, 2),
            date=record["date"],
            notes=notes,
        )
        entries.append(entry)
    found: list[dict[str, Any]] = eval_result_entries_to_yaml(entries)
    return found


def _json(value: Any, indent: int | None = 1) -> bytes:
    text = json.dumps(finite_values(value), indent=indent, ensure_ascii=False, default=str)
    return (text + "\n").encode()
