"""Running a sweep: what it would do, and doing it, alone or with other processes."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqft.artifacts import MANIFEST, SWEEP, Manifest
from sqft.directories import write_files
from sqft.errors import SqftError, WorkspaceError, is_out_of_memory
from sqft.pipeline.locks import StageBusyError
from sqft.pipeline.run import run_recipe
from sqft.pipeline.runner import Workspace, stage_keys
from sqft.pipeline.stages import recipe_stages
from sqft.pipeline.sweep import Cell, Sweep
from sqft.progress import SILENT, Progress

__all__ = ["SweepPlan", "SweepResult", "plan_sweep", "run_sweep"]

WAIT_SECONDS = 2.0

Tell = Callable[[str], None]


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep would do.

    wanted: stages over all cells; distinct: those that differ; done: those of them that are there.
    seconds: for those that are not there, by how long finished ones of their kind took in this workspace;
    unknown: kinds of which none is finished, so that the seconds are without them.
    """

    name: str
    num_cells: int
    wanted: int
    distinct: int
    done: int
    seconds: float
    unknown: list[str]

    @property
    def to_run(self) -> int:
        """Stages that are not there yet."""
        return self.distinct - self.done


@dataclass(frozen=True)
class SweepResult:
    """The results directories of the cells that are done, and why the others failed."""

    directory: Path
    done: dict[str, Path]
    failed: dict[str, str] = field(default_factory=dict)


def plan_sweep(sweep: Sweep) -> SweepPlan:
    """Count the stages of all cells, before any is run.

    Raises: ModelError, DataError for a model or file that is not there, naming the cell.
    """
    from sqft.models import model_identity

    models: dict[str, str] = {}
    stages: dict[Path, str] = {}
    wanted = 0
    for cell in sweep.cells:
        recipe, workspace = cell.recipe, _workspace(cell)
        model = json.dumps(recipe.model.model_dump(mode="json"))
        try:
            if model not in models:
                models[model] = model_identity(recipe.model, workspace.digests)
            keys = stage_keys(recipe, models[model])
        except SqftError as error:
            raise type(error)(f"cell {cell.name}: {error}") from error
        for stage in recipe_stages(recipe):
            wanted += 1
            stages[workspace.stage_directory(stage.name, keys[stage.name])] = stage.kind
    left = {path: kind for path, kind in stages.items() if not path.exists()}
    took = _seconds_of_kinds(_workspace(sweep.cells[0]))
    seconds = sum(took.get(kind, 0.0) for kind in left.values())
    unknown = sorted({kind for kind in left.values() if kind not in took})
    done = len(stages) - len(left)
    return SweepPlan(sweep.name, len(sweep.cells), wanted, len(stages), done, seconds, unknown)


def run_sweep(sweep: Sweep, *, tell: Tell = lambda line: None, progress: Progress = SILENT) -> SweepResult:
    """Run every cell that is not done, one after the other; a cell that fails does not stop the others.

    Killed at any point, the next call goes on. Several processes, on machines that share the workspace, may
    run the same sweep: each takes cells whose stages nobody else is making. tell: is given a line a cell.
    """
    pending = list(sweep.cells)
    done: dict[str, Path] = {}
    failed: dict[str, str] = {}
    failures: dict[str, str] = {}
    while pending:
        busy = []
        for cell in pending:
            started = time.monotonic()
            try:
                result = run_recipe(cell.recipe, wait=False, failures=failures, progress=progress)
            except StageBusyError:
                busy.append(cell)
                continue
            except Exception as error:
                failed[cell.name] = _reason(error)
                tell(f"{cell.name}: failed: {failed[cell.name]}")
                continue
            done[cell.name] = result.report_json.parent
            again = all(stage.reused for stage in result.stages)
            tell(f"{cell.name}: {'done before' if again else f'{time.monotonic() - started:.0f} s'}")
        if busy and len(busy) == len(pending):
            time.sleep(WAIT_SECONDS)
        pending = busy
    directory = _workspace(sweep.cells[0]).root / sweep.name
    _record(sweep, directory, done, failed)
    return SweepResult(directory, done, failed)


def _workspace(cell: Cell) -> Workspace:
    return Workspace(Path(cell.recipe.runtime.workspace))


def _seconds_of_kinds(workspace: Workspace) -> dict[str, float]:
    """How long a stage of each kind took, by those that are finished: the median."""
    found: dict[str, list[float]] = {}
    for path in workspace.stages.glob(f"*/{MANIFEST}"):
        if path.parent.name.endswith(".partial"):
            continue
        try:
            manifest = Manifest.read(path.parent)
        except WorkspaceError:
            continue
        found.setdefault(manifest.stage.split("-")[0], []).append(manifest.elapsed_seconds)
    return {kind: statistics.median(seconds) for kind, seconds in found.items()}


def _reason(error: Exception) -> str:
    """One line; of a defect its kind as well."""
    text = " ".join(str(error).split())
    if isinstance(error, SqftError):
        return text
    return "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {text}"


def _record(sweep: Sweep, directory: Path, done: dict[str, Path], failed: dict[str, str]) -> None:
    """sweep.json: which cell took what, and how it ended."""
    cells: list[dict[str, Any]] = [
        {
            "name": cell.name,
            "choices": cell.choices,
            "results": str(done[cell.name].name) if cell.name in done else None,
            "failed": failed.get(cell.name),
        }
        for cell in sweep.cells
    ]
    text = json.dumps({"name": sweep.name, "cells": cells}, indent=1, ensure_ascii=False) + "\n"
    write_files(directory, {SWEEP: text.encode()})
