"""What a recipe would do, before any weight is loaded: stages, modules, memory, disk.

Memory and disk are estimates from shapes (`estimate.py`), without the half gigabyte of Python and libraries;
times are estimates from shapes and the speed of this machine (`duration.py`, `machine.py`).
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft.pipeline.checks import (
    ChosenModules,
    check_libraries,
    check_modules,
    planned_grid,
    unusual_trainings,
)
from sqft.pipeline.duration import Durations
from sqft.pipeline.estimate import Estimate, ModulePlan, finds_gpu
from sqft.pipeline.machine import machine_speed
from sqft.pipeline.preview import DataPreview, ItemView, load_items, view_item
from sqft.pipeline.recall import recall
from sqft.pipeline.recipe import Recipe
from sqft.pipeline.runner import Workspace, findable_keys
from sqft.pipeline.stages import Stage, recipe_stages
from sqft.pipeline.starting import check_start, check_start_base
from sqft.pipeline.step_items import check_splits
from sqft.sections import CalibrationSection, ModelSection

if TYPE_CHECKING:
    from sqft.models import ModelOutline

__all__ = ["ModulePlan", "Plan", "StagePlan", "plan_recipe"]


@dataclass(frozen=True)
class StagePlan:
    """One stage: whether it is there already, and what it would need.

    directory: None of a large model in a new workspace: the name holds a digest, and all weights enter it.
    seconds: on this machine when nothing else runs; None where it is not known.
    """

    name: str
    directory: str | None
    reused: bool
    resumed: bool
    memory_bytes: int
    disk_bytes: int
    seconds: float | None = None


@dataclass(frozen=True)
class Plan:
    """What `sqft plan` shows. has_weights: False where there is only the config of a model."""

    name: str
    model: str
    num_parameters: int
    stages: list[StagePlan]
    modules: list[ModulePlan]
    data: DataPreview | None = None
    has_weights: bool = True


def plan_recipe(recipe: Recipe) -> Plan:
    """Work out a recipe from the model's configuration, its tokenizer and the data, which is opened.

    Raises: SqftError as the run would, but for what only the weights tell.
    """
    workspace = Workspace(Path(recipe.runtime.workspace))
    keys = findable_keys(recipe, workspace)
    outline = _outline(recipe.model, keys)
    chosen = check_modules(recipe, outline)
    _check_libraries(recipe, outline, chosen, keys, workspace)
    _check_start(recipe, outline, chosen, keys, workspace)
    modules = _modules(recipe, outline, chosen)
    data, longest = _data(recipe, outline, workspace, keys)
    estimate = Estimate(recipe, outline, modules, longest)
    durations = _durations(recipe, estimate, data)
    stages = [
        _stage(
            stage,
            workspace.stage_directory(stage.name, keys[stage.name]) if keys else None,
            estimate,
            durations,
        )
        for stage in recipe_stages(recipe)
    ]
    return Plan(
        recipe.name, recipe.model.source, outline.num_parameters, stages, modules, data, outline.has_weights
    )


def _outline(section: ModelSection, keys: dict[str, str]) -> "ModelOutline":
    """The shapes of a model, as they were found before if its files are known to be what they were."""

    def look() -> dict[str, Any]:
        from sqft.models import model_outline

        return asdict(model_outline(section))

    from sqft.models.shapes import ModelOutline

    if not keys or section.trust_remote_code:  # whose code may say something else every time
        return ModelOutline.read(look())
    return ModelOutline.read(recall("outline", keys["model"], look, module="sqft.models.outline"))


def _check_libraries(
    recipe: Recipe,
    outline: "ModelOutline",
    chosen: ChosenModules,
    keys: dict[str, str],
    workspace: Workspace,
) -> None:
    """`check_libraries`, which asks nothing that was answered before."""
    shapes = {name: outline.linears[name] for name in sorted(chosen.quantized)}
    trainings = [section.model_dump(mode="json") for section in unusual_trainings(recipe)]
    formats, grid = recipe.export.formats if recipe.export else [], planned_grid(recipe, outline)
    if keys:
        recall(
            "libraries",
            [keys["model"], shapes, trainings, formats, grid],
            lambda: check_libraries(recipe, shapes, grid, workspace.models),
            module="sqft.pipeline.checks",
        )
    else:
        check_libraries(recipe, shapes, grid, workspace.models)


def _check_start(
    recipe: Recipe,
    outline: "ModelOutline",
    chosen: ChosenModules,
    keys: dict[str, str],
    workspace: Workspace,
) -> None:
    """Refuse an adapter that cannot be gone on from: another base is told where the base is there already."""
    if recipe.starting_adapter is None:
        return
    stage = recipe.base_stage
    base = Path(recipe.model.source).expanduser()
    if stage != "model":
        base = workspace.stage_directory(stage, keys[stage]) if keys else Path()

    def look() -> None:
        check_start(recipe, outline, chosen)
        if keys and (base / "config.json").is_file():
            check_start_base(recipe, base)

    if not keys:
        look()
        return
    settings = recipe.model_dump(mode="json", include={"model", "adapters", "search"})
    question = [keys["trained"], keys[stage], base.is_dir(), settings, sorted(chosen.adapted | chosen.scaled)]
    recall("start", question, look, module=check_start.__module__)


def _data(
    recipe: Recipe, outline: "ModelOutline", workspace: Workspace, keys: dict[str, str]
) -> tuple[DataPreview | None, dict[str, int]]:
    """What the data holds with one item of it, and the tokens of the longest item of each split.

    That there is enough to calibrate on is checked as well.
    """
    if recipe.data is None:
        return None, {}
    if not outline.has_weights and not any((Path(recipe.model.source).expanduser()).glob("tokenizer*")):
        return None, {}  # of a config alone: nothing tells how long an item is

    def look() -> dict[str, Any]:
        return asdict(_read_data(recipe, workspace, keys))

    settings = recipe.model_dump(mode="json", include={"data", "calibration", "seed"})
    question = [keys.get("items"), settings, recipe.needs_calibration]
    found = recall("data", question, look, module=_read_data.__module__) if keys else look()
    check_splits(recipe, found["report"]["items"])
    longest = {name: int(lengths["longest"]) for name, lengths in found["report"]["lengths"].items()}
    return DataPreview(found["report"], [ItemView.read(item) for item in found["items"]]), longest


def _read_data(recipe: Recipe, workspace: Workspace, keys: dict[str, str]) -> DataPreview:
    from sqft.data import calibration_tokens

    assert recipe.data is not None
    splits, tokenizer = load_items(recipe, workspace, keys)
    calibration = recipe.calibration or CalibrationSection()
    if recipe.needs_calibration and calibration.source == "train":
        calibration_tokens(calibration, splits.train, tokenizer, seed=recipe.seed)
    first = [view_item(example, "train", tokenizer, recipe.data.loss_on) for example in splits.train[:1]]
    return DataPreview(splits.report, first)


def _durations(recipe: Recipe, estimate: Estimate, data: DataPreview | None) -> Durations | None:
    """What tells how long stages take; None on a GPU, and where data or the machine's speed is unknown."""
    device = recipe.runtime.device
    if device.startswith("cuda") or (device == "auto" and finds_gpu()) or (recipe.data and data is None):
        return None
    speed = machine_speed(recipe.runtime.threads)
    choices = data is not None and any(item.choices for item in data.items)
    return Durations(estimate, speed, data.report if data else {}, choices=choices) if speed else None


def _stage(
    stage: Stage, directory: Path | None, estimate: Estimate, durations: Durations | None
) -> StagePlan:
    memory, disk = estimate.of(stage)
    partial = directory.with_name(directory.name + ".partial") if directory else None
    reused = directory is not None and directory.exists()
    return StagePlan(
        stage.name,
        str(directory) if directory else None,
        reused=reused,
        resumed=stage.resumes and partial is not None and partial.exists() and not reused,
        memory_bytes=int(memory),
        disk_bytes=int(disk),
        seconds=None if durations is None or reused else durations.of(stage),
    )


def _modules(recipe: Recipe, outline: "ModelOutline", chosen: ChosenModules) -> list[ModulePlan]:
    rank = max(recipe.adapters.ranks) if recipe.adapters else 0
    tuned = recipe.tune.rank if recipe.tune and recipe.tune.trains else 0
    grid = planned_grid(recipe, outline)
    size = grid["group_size"] if grid else -1
    rows: dict[ModulePlan, int] = {}
    for name, shape in outline.linears.items():
        end = ".".join(name.split(".")[-2:])
        scales = shape[0] * (1 if size == -1 else shape[1] // size) if name in chosen.scaled else 0
        ranks = rank if name in chosen.adapted else 0
        compressed = name in chosen.sparsified, name in chosen.quantized
        row = ModulePlan(end, shape, 0, *compressed, ranks, scales, tuned if name in chosen.tuned else 0)
        rows[row] = rows.get(row, 0) + 1
    return [replace(row, count=count) for row, count in rows.items()]
