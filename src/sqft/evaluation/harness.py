"""lm-evaluation-harness on a model in memory, offline where its tasks are local."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from transformers import PreTrainedTokenizerBase

from sqft.errors import DataError, require

__all__ = ["evaluate_tasks"]


def evaluate_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    batch_size: int = 16,
    max_items: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Run tasks by name, or by the path of a task's YAML file, with lm-evaluation-harness (extra: eval).

    Only names make the harness read its own list of tasks, which takes some 20 seconds; files do not.
    Returns the figures of each task, metric by metric, standard errors and version included.

    Raises: MissingExtraError without lm-eval; DataError for an unknown task, a bad file, or missing data.
    """
    lm_eval = require("lm_eval", "eval")
    huggingface = require("lm_eval.models.huggingface", "eval")
    manager_module = require("lm_eval.tasks", "eval")
    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    names = [task for task in tasks if not task.endswith((".yaml", ".yml"))]
    wanted = names + [_task_name(path) for path in files]
    with _quiet():
        manager = manager_module.TaskManager(
            include_path=sorted({str(path.resolve().parent) for path in files}) or None,
            include_defaults=bool(names),
        )
        unknown = sorted(set(wanted) - set(manager.all_tasks))
        if unknown:
            raise DataError(
                f"lm-eval knows no task {', '.join(unknown)}; see `lm-eval ls tasks`, or name a YAML file"
            )
        harness = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        try:
            results = lm_eval.simple_evaluate(
                model=harness, tasks=wanted, task_manager=manager, limit=max_items, bootstrap_iters=0
            )
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"lm-eval cannot run {', '.join(wanted)}: {reason}") from error
    return {
        task: {name: _plain(value) for name, value in figures.items() if name != "alias"}
        | {
            "version": results["versions"].get(task),
            "num_items": _plain(results["n-samples"][task]["effective"]),
        }
        for task, figures in results["results"].items()
    }


def _task_name(path: Path) -> str:
    try:
        fields = yaml.load(path.read_text(encoding="utf-8"), Loader=_AnyTag)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; check evaluate.tasks") from error
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("task"), str):
        raise DataError(f"{path} has no 'task' name, so it is no task of lm-evaluation-harness")
    return str(fields["task"])


class _AnyTag(yaml.SafeLoader):
    """A loader that passes over lm-eval's `!function` tags."""


_AnyTag.add_multi_constructor("!", lambda loader, suffix, node: None)


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
