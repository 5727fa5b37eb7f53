"""A recipe from beginning to end, and what a workspace holds."""

import logging
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from sqft.artifacts import MANIFEST, read_elapsed
from sqft.errors import RecipeError
from sqft.launch import launched_processes
from sqft.marks import read_mark
from sqft.pipeline.checks import check_recipe
from sqft.pipeline.locks import hold
from sqft.pipeline.recipe import Recipe
from sqft.pipeline.results import RunResult, write_results
from sqft.pipeline.runner import Workspace, open_workspace, run_stages
from sqft.pipeline.starting import check_start
from sqft.pipeline.team import Team
from sqft.progress import SILENT, Progress
from sqft.sections import TrainSection

__all__ = ["StageStatus", "run_recipe", "workspace_status"]


@dataclass(frozen=True)
class StageStatus:
    """One stage directory of a workspace. finished False: begun, and continued by the next run."""

    name: str
    directory: Path
    finished: bool
    size_bytes: int
    elapsed_seconds: float


def run_recipe(
    recipe: Recipe,
    *,
    wait: bool = True,
    failures: dict[str, str] | None = None,
    team: Team | None = None,
    progress: Progress = SILENT,
) -> RunResult:
    """Run every stage that is not there yet, and write the report.

    Killed at any point, the next call goes on from the last finished stage, or block, or training checkpoint.
    Several processes may use a workspace: a stage that another one is making is waited for, unless `wait` is
    False. failures: as `run_stages` takes it. team: the processes that a launcher started, of which this is
    the first; the others `assist`.

    Raises: SqftError.
    """
    import torch

    from sqft.compression.processes import working_alone
    from sqft.models import model_outline, resolve_model

    if team is None:
        _refuse_launchers()
    started = time.perf_counter()
    logging.getLogger("sqft").setLevel(recipe.runtime.log_level.upper())
    if recipe.runtime.threads:
        torch.set_num_threads(recipe.runtime.threads)
    device = resolve_device(recipe.runtime.device)
    models_dir = Workspace(Path(recipe.runtime.workspace)).models
    outline = model_outline(recipe.model)
    check_start(recipe, outline, check_recipe(recipe, outline, models_dir))
    if team is not None:
        _check_batches(recipe)
    workspace = open_workspace(Path(recipe.runtime.workspace))
    with hold(workspace.lock("models"), "the model"):  # converting a model happens once
        model_directory = resolve_model(recipe.model, workspace.models, progress)
        given = _given(recipe, workspace.models, progress)
    with nullcontext() if team is None else working_alone():
        stages = run_stages(
            recipe,
            workspace,
            model_directory,
            device=device,
            given=given,
            wait=wait,
            failures=failures,
            team=team,
            progress=progress,
        )
    seconds = time.perf_counter() - started
    with hold(workspace.lock(recipe.name.replace("/", "--")), f"the results of {recipe.name}"):
        return write_results(recipe, stages, workspace.root, seconds, model_directory=model_directory)


def _given(recipe: Recipe, models_dir: Path, progress: Progress) -> dict[str, Path]:
    """What exists already beside the recipe's model: the adapter or model that `tune` takes, the adapter
    that `train` goes on from, a teacher.
    """
    from sqft.models import resolve_model

    models = {"tuned": recipe.tuned_model, "teacher_model": recipe.teacher_model}
    given = {name: resolve_model(model, models_dir, progress) for name, model in models.items() if model}
    adapter = recipe.tune.adapter if recipe.tune else None
    given |= {"tuned": Path(adapter)} if adapter else {}
    return given | ({"trained": recipe.starting_adapter} if recipe.starting_adapter else {})


def _refuse_launchers() -> None:
    """Refuse torchrun: its processes would wait for one another's stages for ever."""
    count = launched_processes()
    if count > 1:
        raise RecipeError(
            f"a launcher started {count} processes, and only sqft run trains in several; start this without "
            "torchrun or accelerate, and sqft sweep several times to share its runs"
        )


def _check_batches(recipe: Recipe) -> None:
    """Refuse, before anything else is made, a batch that the processes of a launch cannot share."""
    from sqft.training import check_arguments

    for section in (recipe.tune, recipe.adapters and (recipe.train or TrainSection())):
        if section:
            check_arguments(section)


def resolve_device(name: str) -> str:
    """The torch device that a recipe's `runtime.device` means here.

    Raises: RecipeError if it names a GPU that is not there.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise RecipeError(f"runtime.device is {name}, but torch sees no GPU; use auto or cpu")
    return name


def workspace_status(workspace: Path) -> list[StageStatus]:
    """Every stage directory of a workspace, finished or begun, by name."""
    rows = []
    for directory in sorted((workspace / "stages").glob("*")):
        if not directory.is_dir():
            continue
        finished = not directory.name.endswith(".partial") and (directory / MANIFEST).exists()
        mark = read_mark(directory)
        if mark is not None and mark.files is not None:  # without looking at every file
            size = sum(entry[0] for entry in mark.files.values())
        else:
            size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        seconds = read_elapsed(directory) if finished else 0.0
        name = directory.name.removesuffix(".partial").rsplit("-", 1)[0]
        rows.append(StageStatus(name, directory, finished, size, seconds))
    return rows
