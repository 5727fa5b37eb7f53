"""lm-evaluation-harness on a model in memory, offline where its tasks are local."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sqft.artifacts import digest_json
from sqft.errors import DataError, SqftError, first_line, is_out_of_memory, require
from sqft.evaluation.definitions import find_definition, is_our_own
from sqft.evaluation.harness_models import wrap_model
from sqft.evaluation.scoring import Scorable
from sqft.evaluation.task_data import with_local_data
from sqft.evaluation.task_files import is_task_file, read_task, sandboxed_templates
from sqft.progress import SILENT, Progress, errors_only

__all__ = ["evaluate_tasks", "main_figure"]

BOOTSTRAP = 1000  # bootstrap rounds for the standard errors of metrics that are not means


def evaluate_tasks(
    model: Scorable,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    data_dir: Path | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    batch_size: int = 16,
    max_items: int | None = None,
    samples: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> dict[str, dict[str, Any]]:
    """Run tasks by name, or by the path of a task's YAML file, with lm-evaluation-harness (extra: eval).

    Only the definitions named are read. data_dir: take the data of tasks from `data_dir/NAME/SPLIT.jsonl`
    instead of the hub. num_fewshot: solved examples before each item, in place of the task's own number.
    chat: put prompts through the tokenizer's chat template. samples: keep every prompt and answer.
    trust_remote_code: let task files name Python code, and data sets and metrics of the hub. Tasks by name
    are those of the installed harness, code and data sets included.
    Returns for each task that was asked for: "version", "num_items", and its figures under the harness's own
    names "METRIC,FILTER" and "METRIC_stderr,FILTER", in the order in which the task lists its metrics; and
    "items", what each item gave, with "ids" that tell whether two models answered the same prompts.

    Raises: MissingExtraError without lm-eval; DataError for an unknown task, a bad file, missing data, or a
    file that asks for more than it may.
    """
    lm_eval = require("lm_eval", "eval")
    manager_module = require("lm_eval.tasks", "eval")
    specs: list[Any] = []
    sources: dict[str, Any] = {}  # of each task asked for, its data set on the hub
    files = [task for task in tasks if is_task_file(task)]
    for task in tasks:
        path = Path(task) if task in files else find_definition(task)
        if path is None:  # a group or tag, which the harness resolves
            if data_dir is not None:
                raise DataError(
                    f"{task} is a group of tasks; for data of your own, name each task of the group"
                )
            specs.append(task)
            sources[task] = None
            continue
        fields = _from_file(path, trust_remote_code) if task in files else _with_functions(path)
        sources[fields["task"]] = fields.get("dataset_path")
        if num_fewshot is not None:
            fields["num_fewshot"] = num_fewshot
        specs.append(fields if task in files else _with_data(fields, path, data_dir))
    templates = sandboxed_templates() if files and not trust_remote_code else nullcontext()
    whole_index = any(isinstance(spec, str) for spec in specs)
    logger = logging.getLogger("lm_eval")
    with errors_only(logger.getEffectiveLevel, logger.setLevel), _no_counting(), _no_noise(), templates:
        manager = manager_module.TaskManager(include_defaults=whole_index)
        try:
            results = lm_eval.simple_evaluate(
                model=wrap_model(model, tokenizer, batch_size=batch_size, progress=progress),
                tasks=specs,
                task_manager=manager,
                num_fewshot=num_fewshot,
                apply_chat_template=chat,
                limit=max_items,
                bootstrap_iters=BOOTSTRAP,
                random_seed=None,  # do not let it configure global logging and seeds
                numpy_random_seed=None,
                torch_random_seed=None,
            )
        except Exception as error:  # of many kinds: the harness, its templates, and the readers of data sets
            if isinstance(error, SqftError) or is_out_of_memory(error):
                raise
            raise DataError(_reason(error, ", ".join(sources))) from error
    return {
        task: _figures(task, results, samples) | {"data_set": data_set}
        for task, data_set in sources.items()
        if task in results["results"]
    }


def main_figure(figures: dict[str, Any]) -> tuple[str, float]:
    """(metric, value) of a task's first metric, which is the one its authors put first.

    The metric is called as the harness calls it, with its filter where that is not "none".

    Raises: DataError if the task has no figure that is a number.
    """
    for name, value in figures.items():
        metric, comma, kind = name.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            return (metric if kind == "none" else f"{metric}, {kind}"), float(value)
    raise DataError(f"lm-eval gave no figure for a task, only {', '.join(figures)}")


def _from_file(path: Path, trust_remote_code: bool) -> dict[str, Any]:
    """What was read is what runs; only a trusted file is read by the harness, with code that it names."""
    settings = read_task(path, trust_remote_code=trust_remote_code)
    return _with_functions(path) if trust_remote_code else settings


def _with_data(fields: dict[str, Any], path: Path, data_dir: Path | None) -> dict[str, Any]:
    if data_dir is not None:
        return with_local_data(fields, data_dir)
    if is_our_own(path):
        raise DataError(
            f"the data of task {fields['task']} are not here; name the folder that holds "
            f"{fields['dataset_path']}/test.jsonl with evaluate.tasks_data, or --tasks-data"
        )
    return fields


def _with_functions(path: Path) -> dict[str, Any]:
    loader = require("lm_eval.tasks._yaml_loader", "eval")
    fields: dict[str, Any] = loader.load_yaml(path, resolve_func=True)
    return fields


def _reason(error: Exception, shown: str) -> str:
    reason = first_line(error)
    names = {base.__name__ for base in type(error).__mro__}
    if names & {"ConnectionError", "OfflineModeIsEnabled", "DatasetNotFoundError", "LocalEntryNotFoundError"}:
        return (
            f"the data of {shown} are not here and cannot be fetched ({reason}); give a folder with "
            "NAME/test.jsonl as evaluate.tasks_data, or --tasks-data"
        )
    return f"lm-eval cannot run {shown}: {reason}"


def _figures(task: str, results: dict[str, Any], samples: bool) -> dict[str, Any]:
    """The metrics of one task; counts and names that the harness puts between them are left out."""
    found = results["results"][task]
    count = found.get("sample_len")  # of a group, the harness counts its tasks' items here only
    if task in results["n-samples"]:
        count = results["n-samples"][task]["effective"]
    figures = {name: _plain(value) for name, value in found.items() if "," in name}
    figures |= {"version": results["versions"].get(task), "num_items": _plain(count)}
    rows = results["samples"].get(task, [])
    figures["items"] = _items(rows)
    if samples:
        kept = ("doc_id", "filter", "doc", "arguments", "target", "resps", "filtered_resps", "metrics")
        figures["samples"] = [{key: row[key] for key in (*kept, *row["metrics"])} for row in rows]
    return figures


def _items(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """ids: of what was asked and expected; then each metric's value of each item, as "METRIC,FILTER"."""
    items: dict[str, list[Any]] = {"ids": []}
    for row in rows:
        if row["filter"] == rows[0]["filter"]:
            items["ids"].append(digest_json([row["prompt_hash"], row["doc_hash"], row["target_hash"]])[:16])
        for metric in row["metrics"]:
            value = _plain(row[metric])
            if isinstance(value, int | float):
                items.setdefault(f"{metric},{row['filter']}", []).append(float(value))
    return items


def _plain(value: Any) -> Any:
    """NumPy numbers as Python's, for JSON."""
    return value.item() if hasattr(value, "item") else value


@contextmanager
def _no_counting() -> Iterator[None]:
    """Keep datasets from telling its makers of every file that it opens, a local one too."""
    config: Any = require("datasets", "eval").config
    before = config.HF_UPDATE_DOWNLOAD_COUNTS
    config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        config.HF_UPDATE_DOWNLOAD_COUNTS = before


@contextmanager
def _no_noise() -> Iterator[None]:
    """Keep the harness and datasets from bars of their own, and git from answering on the terminal."""
    task: Any = require("lm_eval.api.task", "eval")
    evaluator: Any = require("lm_eval.evaluator", "eval")
    bars: Any = require("datasets.utils", "eval")
    before = task.tqdm, evaluator.get_git_commit_hash
    task.tqdm, evaluator.get_git_commit_hash = partial(task.tqdm, disable=True), lambda: None
    shown = not bars.are_progress_bars_disabled()
    bars.disable_progress_bars()
    try:
        yield
    finally:
        task.tqdm, evaluator.get_git_commit_hash = before
        if shown:
            bars.enable_progress_bars()
