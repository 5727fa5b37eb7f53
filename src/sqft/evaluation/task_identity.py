"""What the figures of a task hang on: its definition, the files that this names, and its data."""

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sqft.artifacts import digest_file
from sqft.data.sources import expand_paths
from sqft.errors import DataError
from sqft.evaluation.definitions import find_definition
from sqft.evaluation.task_data import local_files
from sqft.evaluation.task_files import TaskDefinition, is_task_file, read_definition

__all__ = ["task_content"]


def task_content(
    tasks: Sequence[str], *, data_dir: Path | None = None, trust_remote_code: bool = False
) -> list[Any]:
    """What identifies tasks, as `evaluate_tasks` would run them: one entry a task, digests of all its files.

    These are the definition, the files that it includes, the modules of the code that it names, and data that
    lie here. Of data on the hub the name is all that is known, and of a group the release of the harness.
    What a module of a task imports in its turn is not followed.

    Raises: MissingExtraError without lm-eval; DataError for an unknown task, a file that is not there or no
    task, and code where it is not trusted.
    """
    return [
        _of_file(Path(task), trust_remote_code) if is_task_file(task) else _of_name(task, data_dir)
        for task in tasks
    ]


def _of_file(path: Path, trust_remote_code: bool) -> Any:
    definition = read_definition(path, trust_remote_code=trust_remote_code)
    try:
        data = [digest_file(file) for file in _named_data(definition.settings)]
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return {"definition": _digests(definition), "data": data}


def _of_name(name: str, data_dir: Path | None) -> Any:
    path = find_definition(name)
    if path is None:
        return {"group": name, "harness": version("lm-eval")}
    definition = read_definition(path, trust_remote_code=True, is_installed=True)
    files = local_files(definition.settings, data_dir) if data_dir is not None else {}
    data = {split: digest_file(file) for split, file in sorted(files.items())}
    return {"task": name, "definition": _digests(definition), "data": data}


def _digests(definition: TaskDefinition) -> list[str]:
    return [digest_file(file) for file in definition.files]


def _named_data(settings: dict[str, Any]) -> Iterator[Path]:
    """The files of a task's data set as far as they lie here: those that it names, or all of a folder."""
    options = settings.get("dataset_kwargs")
    options = options if isinstance(options, dict) else {}
    source = Path(str(settings.get("dataset_path") or ""))
    within = source if source.name and source.is_dir() else Path()
    named = list(_names(options.get("data_files")))
    for name in named:
        if "://" not in name:
            yield from expand_paths(str(within / name))
    folder = options.get("data_dir") or (within if within.name and not named else None)
    if folder is not None:
        yield from sorted(path for path in Path(str(folder)).rglob("*") if path.is_file())


def _names(value: Any) -> Iterator[str]:
    """The names in `data_files`: one, a list, or either for each split."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _names(item)
