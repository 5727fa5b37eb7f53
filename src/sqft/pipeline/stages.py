"""The whole system as one table: which stages a recipe has, what each reads, and what enters its identity.

A stage is a function that reads finished directories and fills a new one. Its directory is called
`NAME-KEY`, where KEY hashes the stage's name and version, the settings it obeys, and the keys of its inputs;
the model and the data enter by content. So equal work is done once, and two recipes share what they have in
common.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from sqft.pipeline.context import StageContext
from sqft.pipeline.recipe import LOW_RANK, Recipe
from sqft.pipeline.reported import adapter_stage, dense_adapters, model_stage, stage_name
from sqft.pipeline.step_evaluation import evaluate
from sqft.pipeline.step_export import export
from sqft.pipeline.step_items import prepare_items
from sqft.pipeline.step_merge import merge
from sqft.pipeline.step_quantize import quantize
from sqft.pipeline.step_reconstruct import reconstruct
from sqft.pipeline.step_search import search
from sqft.pipeline.step_sparsify import sparsify
from sqft.pipeline.step_teacher import teach
from sqft.pipeline.step_training import train, train_dense
from sqft.pipeline.step_tuning import tune
from sqft.sections import (
    AdapterSection,
    CalibrationSection,
    DistillationSection,
    EvaluateSection,
    ReportedModel,
    SearchSection,
    Section,
    TrainingSection,
    TrainSection,
)

__all__ = ["Stage", "StageKind", "recipe_stages"]

StageKind = Literal[
    "items", "tune", "sparsify", "quantize", "reconstruct", "teacher", "train", "search", "merge",
    "train_dense", "evaluate", "export",
]  # fmt: skip
# Settings of evaluate that other stages make, or that enter by content.
CONTENT = {"models", "general_text", "perplexity", "tasks", "tasks_data"}
# Fields of TrainingArguments that only say what is reported of a training.
REPORTING = ("report_to", "run_name", "logging_dir", "logging_steps", "logging_strategy", "project")

Step = Callable[[StageContext], dict[str, Any]]


@dataclass(frozen=True)
class Stage:
    """One row: what it is, what it reads, the settings that enter its identity, the function that does it.

    argument: which one, of a kind that a recipe has several of: the reported model, or the format.
    inputs: names of other stages, or "model", "tuned", "trained", "teacher_model", "data", "calibration",
    "texts" and "distillation", which are texts too. resumes: an unfinished directory is continued.
    """

    kind: StageKind
    inputs: tuple[str, ...]
    settings: dict[str, Any]
    step: Step
    argument: str = ""
    version: int = 1
    resumes: bool = False

    @property
    def name(self) -> str:
        """What other stages call it, and its directory begins with."""
        return stage_name(self.kind, self.argument)


def recipe_stages(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe, in the order in which they run."""
    base = recipe.base_stage
    stages: list[Stage] = []

    if recipe.data:
        stages.append(Stage("items", ("model", "data"), {}, prepare_items))
    if recipe.tune:
        stages.append(_tune_stage(recipe))
    if recipe.distillation:  # before what takes hours: a teacher or texts that do not fit are refused here
        stages.append(_teacher_stage(recipe, recipe.distillation))
    if recipe.sparsify:
        settings, inputs = _compression_inputs(recipe, recipe.sparsify.calibrates)
        settings["sparsify"] = _settings(recipe.sparsify)
        stages.append(Stage("sparsify", inputs, settings, sparsify, resumes=True))
    if recipe.quantize:
        settings, inputs = _compression_inputs(recipe, recipe.quantize.calibrates)
        settings["quantize"] = _settings(recipe.quantize)
        inputs = (*inputs, *(["sparsify"] if recipe.sparsify else []))
        stages.append(Stage("quantize", inputs, settings, quantize, resumes=True))
    if recipe.reconstruct:
        settings, inputs = _compression_inputs(recipe, recipe.reconstruct.calibrates)
        settings["reconstruct"] = _settings(recipe.reconstruct)
        inputs = (*inputs, recipe.compressed_stage)
        stages.append(Stage("reconstruct", inputs, settings, reconstruct, resumes=True))
    if recipe.adapters:
        settings = _training_settings(recipe, recipe.adapters)
        searching = {
            "search": _settings(recipe.search or SearchSection()),
            "loss_on": recipe.data.loss_on if recipe.data else None,
            "base_precision": recipe.adapters.base_precision,
            "seed": recipe.seed,
        }
        inputs = (base, "items")
        if recipe.distillation:
            weights = {"text_weight", "item_weight", "batch_size"}
            settings["distillation"] = recipe.distillation.model_dump(mode="json", include=weights)
            inputs = (*inputs, "teacher")
        if recipe.starting_adapter:
            inputs = (*inputs, "trained")
        stages.append(Stage("train", inputs, settings, train, resumes=True))
        if recipe.adapters.low_rank:
            stages.append(Stage("search", (base, "train", "items"), searching, search, resumes=True))
    if recipe.merges:
        stages.append(Stage("merge", (base, recipe.adapter_stage, "items"), {}, merge))
    if "dense_tuned" in recipe.reported_models() and recipe.adapters:
        settings = _training_settings(recipe, dense_adapters(recipe.adapters))
        stages.append(Stage("train_dense", ("model", "items"), settings, train_dense, resumes=True))
    for name in recipe.reported_models():
        stages.append(_evaluate_stage(recipe, name))
    if recipe.export:
        # The model card shows what was measured, so an export is made anew when a measurement is.
        measured = [stage_name("evaluate", name) for name in recipe.reported_models()]
        for target in recipe.export.formats:
            inputs = (recipe.final_stage, *measured)
            stages.append(Stage("export", inputs, {"format": target}, export, argument=target))
    return stages


def _tune_stage(recipe: Recipe) -> Stage:
    section = recipe.tune
    assert section is not None
    if not section.trains:
        given = {"tune": "adapter" if section.adapter else "model"}
        return Stage("tune", ("model", "tuned"), given, tune, resumes=True)
    low_rank = section.model_dump(
        mode="json", include={"rank", "alpha", "dropout", "target_modules", "skip_modules"}
    )
    settings = _trainer_settings(recipe, section, recipe.tuning_seed)
    return Stage("tune", ("model", "items"), {"tune": low_rank} | settings, tune, resumes=True)


def _teacher_stage(recipe: Recipe, section: DistillationSection) -> Stage:
    predicted = section.model_dump(mode="json", include={"field", "num_samples", "sequence_length", "top_k"})
    items = ["items"] if section.item_weight else []
    texts = ["distillation"] if section.text is not None else []
    settings = {
        "distillation": predicted,
        "loss_on": recipe.data.loss_on if recipe.data and items else None,
        "seed": recipe.seed if texts else None,
    }
    return Stage("teacher", (recipe.teacher_stage, "model", *items, *texts), settings, teach)


def _evaluate_stage(recipe: Recipe, model: ReportedModel) -> Stage:
    section = recipe.evaluate or EvaluateSection()
    adapter = adapter_stage(recipe, model)
    inputs = [model_stage(recipe, model)]
    if adapter:
        inputs.append(adapter)
    if recipe.data:
        inputs.append("items")
    if section.general_text or section.perplexity or section.tasks:
        inputs.append("texts")
    settings = {
        "evaluate": section.model_dump(mode="json", exclude=CONTENT),
        "model": model,
    }
    return Stage("evaluate", tuple(inputs), settings, evaluate, argument=model)


def _compression_inputs(recipe: Recipe, calibrates: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(settings, inputs) of a compression stage, without those of a calibration that it does not look at."""
    if not calibrates:
        return {}, (recipe.dense_stage,)
    calibration = recipe.calibration or CalibrationSection()
    settings = {
        "calibration": calibration.model_dump(mode="json", exclude={"source", "mix"}),
        "seed": recipe.seed,
    }
    items = ["items"] if calibration.source == "train" else []
    texts = ["calibration"] if not items or calibration.mix is not None else []
    return settings, (recipe.dense_stage, *items, *texts)


def _training_settings(recipe: Recipe, adapters: AdapterSection) -> dict[str, Any]:
    settled = _trainer_settings(recipe, recipe.train or TrainSection(), recipe.training_seed)
    settings, trained = settled["train"], _settings(adapters)
    for name, there in (
        ("learning_rate", adapters.low_rank),
        ("scale_learning_rate", adapters.trains_scales),
        ("norm_learning_rate", adapters.trains_norms),
    ):
        if not there:
            del settings[name]
    if not adapters.low_rank:
        trained = {name: value for name, value in trained.items() if name not in LOW_RANK}
    return settled | {"adapters": trained}


def _trainer_settings(recipe: Recipe, section: TrainingSection, seed: int) -> dict[str, Any]:
    """The settings of the trainer that enter a training's identity."""
    rates = {"scale_learning_rate", "norm_learning_rate"} if isinstance(section, TrainSection) else set()
    fields = set(TrainingSection.model_fields) | rates
    watching = set() if section.selects else {"eval_steps", "early_stopping", "keep"}
    ignored = {"checkpoint_steps", "seed"} | watching
    settings = section.model_dump(mode="json", include=fields - ignored)
    settings["arguments"] = {k: v for k, v in section.arguments.items() if k not in REPORTING}
    return {"train": settings, "loss_on": recipe.data.loss_on if recipe.data else None, "seed": seed}


def _settings(section: Section) -> dict[str, Any]:
    return section.model_dump(mode="json")
