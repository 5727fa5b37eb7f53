"""Task files for lm-evaluation-harness, read as plain values: no Python of theirs, no hub, no URL.

The harness runs Python that a task file names (`!function`), renders its templates with everything that
Python offers, and fetches data sets and metrics. A file that comes with somebody's recipe may do none of it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2
import yaml

from sqft.errors import DataError, require
from sqft.untrusted import BoundedSandbox, parse_yaml, read_bounded

__all__ = ["TaskDefinition", "is_task_file", "read_definition", "read_task", "sandboxed_templates"]

LIMIT_BYTES = 256 * 1024
INCLUDES = 20
LOCAL_FORMATS = ("arrow", "csv", "json", "parquet", "text")
ALLOWED = {
    "task", "tag", "dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split",
    "test_split", "fewshot_split", "output_type", "doc_to_text", "doc_to_target", "doc_to_choice",
    "target_delimiter", "fewshot_delimiter", "description", "num_fewshot", "fewshot_config",
    "generation_kwargs", "repeats", "filter_list", "should_decontaminate", "doc_to_decontamination_query",
    "metadata", "metric_list", "gen_prefix", "process_results", "process_docs",
}  # fmt: skip


def is_task_file(task: str) -> bool:
    """Whether a task is named by the path of its file, not by its name."""
    return task.endswith((".yaml", ".yml"))


@dataclass(frozen=True)
class TaskDefinition:
    """A task file with those that it includes. files: these, and the modules of the code that they name."""

    settings: dict[str, Any]
    files: list[Path]


def read_definition(path: Path, *, trust_remote_code: bool, is_installed: bool = False) -> TaskDefinition:
    """The settings of a task file, code in them by name alone, and the files that they came from.

    is_installed: it comes with the harness, which has files that give a key twice.

    Raises: DataError if it is no YAML, or names code and trust_remote_code is False.
    """
    files: list[Path] = []
    parse = partial(parse_yaml, loader=_AnyTag if trust_remote_code else _NoCode)
    return TaskDefinition(_read(path, _parse_installed if is_installed else parse, [], files), files)


def read_task(path: Path, *, trust_remote_code: bool) -> dict[str, Any]:
    """The settings of a task file with those of the files that it includes.

    Raises: DataError if it is not a task, or asks for code or network and trust_remote_code is False.
    """
    settings = read_definition(path, trust_remote_code=trust_remote_code).settings
    if not isinstance(settings.get("task"), str):
        raise DataError(f"{path} has no 'task' name, so it is not a task of lm-evaluation-harness")
    if not trust_remote_code:
        wrong = _asks_for_more(settings)
        if wrong:
            raise DataError(f"{path}: {wrong}; set model.trust_remote_code if you trust this file")
    return settings


@contextmanager
def sandboxed_templates() -> Iterator[None]:
    """Let the harness render templates without access to Python's internals, and not for ever."""
    module: Any = require("lm_eval.utils", "eval")
    before: jinja2.Environment = module.env
    sandbox = BoundedSandbox(
        loader=before.loader, undefined=before.undefined, keep_trailing_newline=before.keep_trailing_newline
    )
    sandbox.filters.update(before.filters)
    module.env = sandbox
    try:
        yield
    finally:
        module.env = before


def _read(
    path: Path, parse: Callable[[str], Any], including: list[Path], files: list[Path]
) -> dict[str, Any]:
    try:
        settings = parse(read_bounded(path, LIMIT_BYTES).decode("utf-8"))
    except FileNotFoundError as error:
        by = f"included by {including[-1]}" if including else "check evaluate.tasks"
        raise DataError(f"{path} does not exist; {by}") from error
    except _Code:
        raise DataError(
            f"{path} names Python code (!function), which runs only with model.trust_remote_code"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise DataError(f"{path} has no 'task' name, so it is not a task of lm-evaluation-harness")
    including = [*including, path.resolve()]
    if len(including) > INCLUDES or len(set(including)) < len(including):
        raise DataError(f"{path} includes itself, or too many others")
    files.append(path)
    files += [module for name in _code_names(settings) if (module := _module_file(name, path.parent))]
    included = settings.pop("include", [])
    merged: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        part = _read(path.parent / str(name), parse, including, files)
        part.pop("task_list", None)
        merged |= part
    return merged | settings


def _asks_for_more(settings: dict[str, Any]) -> str | None:
    """What a task asks for beyond plain values and local files; None if nothing."""
    unknown = sorted(set(map(str, settings)) - ALLOWED)
    if unknown:
        return f"'{unknown[0]}' can name code"
    data = settings.get("dataset_path")
    if data is not None and data not in LOCAL_FORMATS and not Path(str(data)).is_dir():
        return f"the data set {data} would be fetched from the hub"
    url = next((text for text in _texts(settings.get("dataset_kwargs")) if "://" in text), None)
    if url is not None:
        return f"{url} would be fetched"
    require("lm_eval.api.metrics", "eval")  # fills the table
    registry: Any = require("lm_eval.api.registry", "eval")
    for metric in settings.get("metric_list") or []:
        name = metric.get("metric") if isinstance(metric, dict) else metric
        if name not in registry.metric_registry or metric.get("hf_evaluate"):
            return f"the metric {name} would be fetched from the hub"
    return None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _code_names(settings: dict[str, Any]) -> list[str]:
    return [text for text in _texts(settings) if isinstance(text, _CodeName)]


def _module_file(name: str, folder: Path) -> Path | None:
    """The file of the module in MODULE.FUNCTION, which the harness looks for beside the task file first."""
    module = name.rpartition(".")[0]
    beside = folder / f"{module.replace('.', '/')}.py"
    if beside.is_file():
        return beside
    try:
        spec = find_spec(module) if module else None
    except (ImportError, ValueError):  # the harness says so when it runs the task
        return None
    return Path(spec.origin) if spec and spec.has_location and spec.origin else None


class _Code(Exception):
    """A file that names code."""


class _CodeName(str):
    """What stands after `!function`."""


class _AnyTag(yaml.SafeLoader):
    """A loader that leaves code at its name, and passes over other tags."""


class _NoCode(yaml.SafeLoader):
    """A loader that refuses them."""


def _refuse(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> None:
    raise _Code


def _name(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> _CodeName | None:
    is_code = suffix == "function" and isinstance(node, yaml.ScalarNode)
    return _CodeName(node.value) if is_code else None


def _parse_installed(text: str) -> Any:
    return yaml.load(text, _AnyTag)


_AnyTag.add_multi_constructor("!", _name)
_NoCode.add_multi_constructor("!", _refuse)
