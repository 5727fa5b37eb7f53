"""lm-evaluation-harness on a model in memory, offline where its tasks are local."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from torch import nn
from transformers import PreTrainedTokenizerBase

from sqft.errors import DataError, require
from sqft.evaluation.task_files import read_task, sandboxed_templates

__all__ = ["evaluate_tasks", "main_figure"]


def evaluate_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    batch_size: int = 16,
    max_items: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, dict[str, Any]]:
    """Run tasks by name, or by the path of a task's YAML file, with lm-evaluation-harness (extra: eval).

    Only names make the harness read its own list of tasks, which takes some 20 seconds; files do not.
    trust_remote_code: let task files name Python code, and data sets and metrics of the hub. Tasks by name
    are those of the installed harness, code and data sets included.
    Returns for each task that was asked for: "version", "num_items", and its figures under the harness's own
    names "METRIC,FILTER" and "METRIC_stderr,FILTER", in the order in which the task lists its metrics.

    Raises: MissingExtraError without lm-eval; DataError for an unknown task, a bad file, missing data, or a
    file that asks for more than it may.
    """
    lm_eval = require("lm_eval", "eval")
    huggingface = require("lm_eval.models.huggingface", "eval")
    manager_module = require("lm_eval.tasks", "eval")
    files = {task: Path(task) for task in tasks if task.endswith((".yaml", ".yml"))}
    names = [task for task in tasks if task not in files]
    settings = {task: read_task(path, trust_remote_code=trust_remote_code) for task, path in files.items()}
    # What was read is what runs; only a trusted file is read by the harness itself, with code that it names.
    wanted = [*names, *(list(files) if trust_remote_code else settings.values())]
    asked = [*names, *(str(s["task"]) for s in settings.values())]
    shown = ", ".join(asked)
    templates = nullcontext() if trust_remote_code or not files else sandboxed_templates()
    with _quiet(), templates:
        manager = manager_module.TaskManager(include_defaults=bool(names))
        unknown = sorted(set(names) - set(manager.all_tasks))
        if unknown:
            raise DataError(
                f"lm-eval knows no task {', '.join(unknown)}; see `lm-eval ls tasks`, or name a YAML file"
            )
        harness = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        try:
            results = lm_eval.simple_evaluate(
                model=harness, tasks=wanted, task_manager=manager, limit=max_items, bootstrap_iters=0
            )
        except (OSError, ValueError, KeyError, TypeError, TemplateError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"lm-eval cannot run {shown}: {reason}") from error
    return {task: _figures(task, results) for task in asked if task in results["results"]}


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


def _figures(task: str, results: dict[str, Any]) -> dict[str, Any]:
    """The metrics of one task; counts and names that the harness puts between them are left out."""
    found = results["results"][task]
    items = found.get("sample_len")  # of a group, the harness counts its tasks' items here only
    if task in results["n-samples"]:
        items = results["n-samples"][task]["effective"]
    return {name: _plain(value) for name, value in found.items() if "," in name} | {
        "version": results["versions"].get(task),
        "num_items": _plain(items),
    }


def _plain(value: Any) -> Any:
    """NumPy numbers as Python's, for JSON."""
    return value.item() if hasattr(value, "item") else value


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
