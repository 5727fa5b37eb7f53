"""Running a recipe: identities, atomic stage directories, reuse, resume."""

import importlib.metadata
import json
import logging
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqft import __version__
from sqft.artifacts import (
    DIGESTS,
    ENVIRONMENT,
    MANIFEST,
    Manifest,
    digest_file,
    digest_files,
    digest_json,
    write_json,
)
from sqft.directories import new_directory
from sqft.errors import AdapterError, DataError, WorkspaceError
from sqft.marks import damaged_since, read_mark
from sqft.pipeline.context import StageContext
from sqft.pipeline.locks import hold
from sqft.pipeline.recipe import Recipe
from sqft.pipeline.sources import source_digest
from sqft.pipeline.stages import Stage, recipe_stages
from sqft.pipeline.team import Team
from sqft.progress import SILENT, Progress
from sqft.sections import CalibrationSection, DataSource, ModelSection

__all__ = [
    "FinishedStage",
    "Workspace",
    "damaged_stage",
    "environment",
    "findable_keys",
    "open_workspace",
    "run_stages",
    "stage_keys",
]

logger = logging.getLogger(__name__)
READ_AT_ONCE = 2**30  # bytes, which take a second or two
VERSIONED = ("torch", "transformers", "peft", "compressed-tensors", "optuna", "numpy")


@dataclass(frozen=True)
class FinishedStage:
    """A stage whose directory is whole."""

    stage: Stage
    directory: Path
    manifest: Manifest
    reused: bool

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.stage.name


@dataclass
class Workspace:
    """The folder of all runs: `stages/`, one results folder for each recipe, and a cache of digests."""

    root: Path
    finished: dict[str, FinishedStage] = field(default_factory=dict)
    proven: set[Path] = field(default_factory=set)  # read through in this run

    @property
    def stages(self) -> Path:
        """Where stage directories live."""
        return self.root / "stages"

    @property
    def models(self) -> Path:
        """Where converted models live."""
        return self.root / "models"

    @property
    def digests(self) -> Path:
        """The cache of file digests."""
        return self.root / DIGESTS

    @property
    def locks(self) -> Path:
        """Where processes say what they are making."""
        return self.root / ".locks"

    def lock(self, name: str) -> Path:
        """The file by which processes agree who makes a stage, a model or results."""
        return self.locks / f"{name}.lock"

    def stage_directory(self, name: str, key: str) -> Path:
        """The directory of a stage with this identity."""
        return self.stages / f"{name}-{key[:12]}"


def open_workspace(root: Path) -> Workspace:
    """Open a workspace, which several processes may use at a time: each stage has a lock of its own.

    Raises: WorkspaceError if it cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / ".lock").open("w"):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WorkspaceError(f"cannot write to the workspace {root}: {reason}") from error
    return Workspace(root)


def run_stages(
    recipe: Recipe,
    workspace: Workspace,
    model_directory: Path,
    *,
    device: str,
    given: dict[str, Path] | None = None,
    wait: bool = True,
    failures: dict[str, str] | None = None,
    team: Team | None = None,
    progress: Progress = SILENT,
) -> list[FinishedStage]:
    """Run what is not there yet, in order, and return every stage of the recipe.

    given: what exists already beside the model: "tuned", the adapter or model that `tune` takes, "trained",
    the adapter that `train` goes on from, and "teacher_model".
    wait: for stages that another process makes now; else StageBusyError. failures: directories of stages that
    failed before, and why; they are not tried again, and a new failure is entered. team: as `StageContext`
    has it.
    """
    from sqft.models import model_identity

    failures = {} if failures is None else failures
    keys = stage_keys(recipe, model_identity(recipe.model, workspace.digests))
    directories = {"model": model_directory} | (given or {})
    for stage in recipe_stages(recipe):
        key = keys[stage.name]
        final = workspace.stage_directory(stage.name, key)
        context = StageContext(
            recipe, stage.argument, final, directories, device, progress, keys=keys, team=team
        )
        finished = _reuse(stage, final, key, workspace)
        if finished is None and final.name in failures:
            raise WorkspaceError(f"its stage {final.name} failed before: {failures[final.name]}")
        if finished is None:
            with hold(workspace.lock(final.name), final.name, wait=wait):
                finished = _reuse(stage, final, key, workspace)  # another process may have made it
                if finished is None:
                    _prove_inputs(stage, directories, workspace)
                    finished = _run_noting(stage, key, keys, context, failures)
                    workspace.proven.add(final)
        how = "is there already" if finished.reused else f"took {finished.manifest.elapsed_seconds:.1f} s"
        logger.info("%s %s (%s)", stage.name, how, final)
        directories[stage.name] = final
        workspace.finished[stage.name] = finished
    return list(workspace.finished.values())


def stage_keys(recipe: Recipe, model_key: str) -> dict[str, str]:
    """The identity of every stage, and of every input that is not a stage."""
    keys = {"model": model_key, "data": _data_key(recipe), "texts": _texts_key(recipe)}
    keys["calibration"] = _calibration_key(recipe)
    keys["distillation"] = _distillation_key(recipe)
    keys["tuned"] = _tuned_key(recipe)
    keys["trained"] = _adapter_key(recipe.starting_adapter, "train.adapter")
    keys["teacher_model"] = _model_key(recipe, recipe.teacher_model)
    for stage in recipe_stages(recipe):
        keys[stage.name] = digest_json(
            {
                "stage": stage.name,
                "version": stage.version,
                "settings": stage.settings,
                "inputs": {name: keys[name] for name in stage.inputs},
                "source": source_digest(stage.step.__module__),
            }
        )
    return keys


def findable_keys(recipe: Recipe, workspace: Workspace) -> dict[str, str]:
    """The identity of every stage as `stage_keys` has it, for those who only look what is there already.

    Empty where nothing is, and the weights, which enter the identities, are so many that reading them all
    takes long.
    """
    from sqft.models import model_identity, source_bytes

    is_new = not any(workspace.stages.glob("*"))
    if is_new and source_bytes(recipe.model) > READ_AT_ONCE:
        return {}
    return stage_keys(recipe, model_identity(recipe.model, workspace.digests))


def environment(device: str) -> dict[str, str]:
    """Everything but the recipe that a bit-identical result depends on."""
    import torch

    versions = {name: importlib.metadata.version(name) for name in VERSIONED}
    kind = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or "cpu"
    return {
        "sqft": __version__,
        "python": platform.python_version(),
        **versions,
        "device": f"{device.split(':')[0]} ({kind})",
        "threads": str(torch.get_num_threads()),
    }


def _reuse(stage: Stage, final: Path, key: str, workspace: Workspace) -> FinishedStage | None:
    if not final.exists():
        return None
    mark = read_mark(final)
    stated = (mark.files or {}).get(MANIFEST) if mark else None
    if stated is not None and (final / MANIFEST).is_file() and digest_file(final / MANIFEST) != stated[2]:
        raise damaged_stage(final, f"its {MANIFEST} changed")
    manifest = Manifest.read(final)
    found = {name: digest for name, digest in digest_files(final, cache=workspace.digests).items()}
    found.pop(MANIFEST, None)
    changed = sorted(name for name in manifest.files if found.get(name) != manifest.files[name])
    if manifest.key != key or changed:
        what = f"{', '.join(changed[:3])} in it changed" if changed else "its manifest names another identity"
        raise damaged_stage(final, what)
    return FinishedStage(stage, final, manifest, reused=True)


def damaged_stage(directory: Path, what: str) -> WorkspaceError:
    """The message about a stage that is not as it was written."""
    return WorkspaceError(f"{directory} is damaged ({what}); delete that folder and run again")


def _prove_inputs(stage: Stage, directories: dict[str, Path], workspace: Workspace) -> None:
    """Read through, once a run, what a stage is about to build on: size and time do not show every damage."""
    for name in stage.inputs:
        directory = directories.get(name)
        if directory is None or directory in workspace.proven:
            continue
        changed = damaged_since(directory)
        if changed is not None:
            raise damaged_stage(directory, f"{changed} in it changed")
        workspace.proven.add(directory)


def _run(stage: Stage, key: str, keys: dict[str, str], context: StageContext) -> FinishedStage:
    started = time.perf_counter()
    with new_directory(context.final, keep_partial=stage.resumes, about={"stage": key}) as directory:
        context = context.working_in(directory)
        now = environment(context.device)
        _tell_if_environment_changed(stage, directory, now)
        metrics = stage.step(context)
        files = digest_files(directory)
        files.pop(MANIFEST, None)
        manifest = Manifest(
            stage=stage.name,
            key=key,
            settings=stage.settings,
            inputs={name: keys[name] for name in stage.inputs},
            metrics=metrics,
            environment=now,
            files=files,
            elapsed_seconds=time.perf_counter() - started,
        )
        manifest.write(directory)
    return FinishedStage(stage, context.final, manifest, reused=False)


def _run_noting(
    stage: Stage, key: str, keys: dict[str, str], context: StageContext, failures: dict[str, str]
) -> FinishedStage:
    try:
        return _run(stage, key, keys, context)
    except Exception as error:
        failures[context.final.name] = str(error).strip() or type(error).__name__
        raise


def _tell_if_environment_changed(stage: Stage, directory: Path, now: dict[str, str]) -> None:
    """A resumed stage is bit-identical only in the same environment; where it differs, say so."""
    path = directory / ENVIRONMENT
    before = _read_environment(path)
    if before:
        changed = [f"{k} {before.get(k)} → {v}" for k, v in now.items() if before.get(k) != v]
        if changed:
            what = ", ".join(changed)
            logger.warning("%s resumes in another environment (%s); bits may differ", stage.name, what)
    write_json(path, now)


def _read_environment(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _data_key(recipe: Recipe) -> str:
    """The identity of the items: contents of files, their format, and how missing splits are drawn."""
    data = recipe.data
    if data is None:
        return ""
    elsewhere = {"train", "search", "test", "loss_on"}
    given = {f"{split}_items" for split in ("search", "test") if getattr(data, split)}
    settings = data.model_dump(mode="json", exclude=elsewhere | given)
    splits = ("train", "search", "test")
    contents = {split: _source_content(getattr(data, split), f"data.{split}") for split in splits}
    return digest_json({"settings": settings, "sources": contents, "seed": recipe.seed})


def _texts_key(recipe: Recipe) -> str:
    """The identity of what `evaluate` reads beside the items: the perplexity text and the tasks."""
    from sqft.evaluation import general_path

    section = recipe.evaluate
    if section is None:
        return ""
    general = general_path(section.general_text) if section.general_text else None
    texts: dict[str, Any] = {
        "general": _content(str(general) if general else None, "evaluate.general_text"),
        "perplexity": _content(section.perplexity, "evaluate.perplexity"),
        "tasks": [],
    }
    if section.tasks:
        from sqft.evaluation import task_content

        data_dir = Path(section.tasks_data) if section.tasks_data is not None else None
        trusted = recipe.model.trust_remote_code
        try:
            texts["tasks"] = task_content(section.tasks, data_dir=data_dir, trust_remote_code=trusted)
        except DataError as error:
            raise DataError(f"evaluate.tasks: {error}") from None
    return digest_json(texts)


def _tuned_key(recipe: Recipe) -> str:
    """The identity of an adapter or a tuned model that exists already."""
    adapter = recipe.tune.adapter if recipe.tune else None
    if adapter is not None:
        return _adapter_key(Path(adapter), "tune.adapter")
    return _model_key(recipe, recipe.tuned_model)


def _adapter_key(directory: Path | None, setting: str) -> str:
    """The identity of an adapter that exists already."""
    if directory is None:
        return ""
    from sqft.adapters.lora_files import adapter_digests

    try:
        return digest_json(adapter_digests(directory))
    except AdapterError as error:
        raise AdapterError(f"{setting}: {error}") from None


def _model_key(recipe: Recipe, model: ModelSection | None) -> str:
    """The identity of a model beside the recipe's own."""
    from sqft.models import model_identity

    return model_identity(model, Workspace(Path(recipe.runtime.workspace)).digests) if model else ""


def _distillation_key(recipe: Recipe) -> str:
    """The identity of the texts that a teacher is asked about."""
    text = recipe.distillation.text if recipe.distillation else None
    return "" if text is None else digest_json(_source_content(text, "distillation.text"))


def _calibration_key(recipe: Recipe) -> str:
    """The identity of calibration texts; training items come from a stage of their own."""
    calibration = recipe.calibration or CalibrationSection()
    texts = [(setting, source) for setting, source, _ in calibration.sources if source != "train"]
    if not texts or not recipe.needs_calibration:
        return ""
    return digest_json([_source_content(source, f"calibration.{setting}") for setting, source in texts])


def _source_content(source: DataSource | None, key: str) -> Any:
    from sqft.data.sources import source_content

    try:
        return None if source is None else source_content(source)
    except DataError as error:
        raise DataError(f"{key}: {error}") from None


def _content(path: str | None, key: str) -> str | None:
    if path is None:
        return None
    try:
        return digest_file(Path(path))
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"{key}: there is no file {path}") from None
