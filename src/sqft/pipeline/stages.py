"""The whole system as one table: which stages a recipe has, what each reads, and what enters its identity.

A stage is a function that reads finished directories and fills a new one. Its directory is called
`NAME-KEY`, where KEY hashes the stage's name and version, the settings it obeys, and the keys of its inputs;
the model and the data enter by content. So equal work is done once, and two recipes share what they have in
common.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqft.pipeline import steps
from sqft.pipeline.context import StageContext
from sqft.pipeline.recipe import Recipe, adapter_stage, dense_adapters, model_stage
from sqft.sections import (
    AdapterSection,
    CalibrationSection,
    EvaluateSection,
    ReportedModel,
    SearchSection,
    Section,
    TrainSection,
)

__all__ = ["Stage", "recipe_stages"]

# Fields of TrainingArguments that say what is told of a training, and change nothing in it.
REPORTING = ("report_to", "run_name", "logging_dir", "logging_steps", "logging_strategy", "project")

Step = Callable[[StageContext], dict[str, Any]]


@dataclass(frozen=True)
class Stage:
    """One row: a name, what it reads, the settings that enter its identity, and the function that does it.

    inputs: names of other stages, or "model", "data", "calibration", "texts". packages: those whose source
    enters the identity in a development install. resumes: an unfinished directory is continued.
    """

    name: str
    inputs: tuple[str, ...]
    settings: dict[str, Any]
    step: Step
    packages: tuple[str, ...]
    version: int = 1
    resumes: bool = False


def recipe_stages(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe, in the order in which they run."""
    base = recipe.base_stage
    compression = ("ops", "models", "data", "compression")
    training = ("ops", "models", "data", "adapters", "training")
    stages: list[Stage] = []

    if recipe.sparsify:
        settings, inputs = _compression_inputs(recipe, recipe.sparsify.calibrates)
        settings["sparsify"] = _settings(recipe.sparsify)
        stages.append(Stage("sparsify", inputs, settings, steps.sparsify, compression, resumes=True))
    if recipe.quantize:
        settings, inputs = _compression_inputs(recipe, recipe.quantize.calibrates)
        settings["quantize"] = _settings(recipe.quantize)
        inputs = (*inputs, *(["sparsify"] if recipe.sparsify else []))
        stages.append(Stage("quantize", inputs, settings, steps.quantize, compression, resumes=True))
    if recipe.adapters:
        settings = _training_settings(recipe, recipe.adapters)
        search = {
            "search": _settings(recipe.search or SearchSection()),
            "loss_on": recipe.data.loss_on if recipe.data else None,
            "base_precision": recipe.adapters.base_precision,
            "seed": recipe.seed,
        }
        searching = ("ops", "models", "data", "adapters", "evaluation", "search")
        stages += [
            Stage("train", (base, "data"), settings, steps.train, training, resumes=True),
            Stage("search", (base, "train", "data"), search, steps.search, searching, resumes=True),
        ]
    if recipe.merges:
        merging = ("ops", "models", "adapters", "certificate")
        stages.append(Stage("merge", (base, "search", "data"), {}, steps.merge, merging))
    if "dense_tuned" in recipe.reported_models() and recipe.adapters:
        settings = _training_settings(recipe, dense_adapters(recipe.adapters))
        dense = Stage("train_dense", ("model", "data"), settings, steps.train_dense, training, resumes=True)
        stages.append(dense)
    for name in recipe.reported_models():
        stages.append(_evaluate_stage(recipe, name))
    if recipe.export:
        # The model card shows what was measured, so an export is made anew when a measurement is.
        inputs = (recipe.final_stage, *(f"evaluate-{name}" for name in recipe.reported_models()))
        for target in recipe.export.formats:
            stages.append(Stage(f"export-{target}", inputs, {"format": target}, steps.export, ("export",)))
    return stages


def _evaluate_stage(recipe: Recipe, model: ReportedModel) -> Stage:
    section = recipe.evaluate or EvaluateSection()
    adapter = adapter_stage(model)
    inputs = [model_stage(recipe, model)]
    if adapter:
        inputs.append(adapter)
    if recipe.data:
        inputs.append("data")
    if section.perplexity or section.tasks:
        inputs.append("texts")
    settings = {
        "evaluate": section.model_dump(mode="json", exclude={"models", "perplexity", "tasks", "tasks_data"}),
        "model": model,
    }
    packages = ("ops", "models", "data", "adapters", "evaluation")
    return Stage(f"evaluate-{model}", tuple(inputs), settings, steps.evaluate, packages)


def _compression_inputs(recipe: Recipe, calibrates: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(settings, inputs) of a compression stage, without those of a calibration that it does not look at."""
    if not calibrates:
        return {}, ("model",)
    calibration = recipe.calibration or CalibrationSection()
    settings = {"calibration": calibration.model_dump(mode="json", exclude={"source"}), "seed": recipe.seed}
    return settings, ("model", "calibration")


def _training_settings(recipe: Recipe, adapters: AdapterSection) -> dict[str, Any]:
    train = recipe.train or TrainSection()
    settings = train.model_dump(mode="json", exclude={"checkpoint_steps"})
    settings["arguments"] = {k: v for k, v in train.arguments.items() if k not in REPORTING}
    loss_on = recipe.data.loss_on if recipe.data else None
    return {"adapters": _settings(adapters), "train": settings, "loss_on": loss_on, "seed": recipe.seed}


def _settings(section: Section) -> dict[str, Any]:
    return section.model_dump(mode="json")
