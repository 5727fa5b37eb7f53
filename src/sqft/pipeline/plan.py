"""What a recipe would do, before any weight is loaded: stages, modules, memory, disk.

Memory and disk are estimates from shapes: weights, optimizer state, Hessians and the largest activations,
without the 0.5 GiB that Python and its libraries take.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sqft.pipeline.checks import ChosenModules, check_recipe
from sqft.pipeline.preview import DataPreview, load_items, view_item
from sqft.pipeline.recipe import Recipe
from sqft.pipeline.runner import Workspace, stage_keys
from sqft.pipeline.stages import Stage, recipe_stages
from sqft.pipeline.step_items import check_splits
from sqft.sections import (
    CalibrationSection,
    DataSection,
    EvaluateSection,
    HubSource,
    TrainingSection,
    TrainSection,
    TuneSection,
)

if TYPE_CHECKING:
    from sqft.models import ModelOutline

__all__ = ["ModulePlan", "Plan", "StagePlan", "plan_recipe"]

FLOAT32 = 4
ACTIVATIONS_PER_HIDDEN = (
    34  # floats kept for backward per token and hidden unit of a block (Korthikanti 2205.05198)
)


@dataclass(frozen=True)
class StagePlan:
    """One stage: whether it is there already, and what it would need."""

    name: str
    directory: str
    reused: bool
    resumed: bool
    memory_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class ModulePlan:
    """Linears of one kind, and what happens to them.

    rank: the largest of an adapter, 0 without one. num_scales: the trained scales of each linear, 0 without.
    tuned_rank: of the LoRA that is trained on the dense model, 0 without one.
    """

    name: str
    shape: tuple[int, int]
    count: int
    sparsified: bool
    quantized: bool
    rank: int
    num_scales: int = 0
    tuned_rank: int = 0


@dataclass(frozen=True)
class Plan:
    """What `sqft plan` shows."""

    name: str
    model: str
    num_parameters: int
    stages: list[StagePlan]
    modules: list[ModulePlan]
    data: DataPreview | None = None


def plan_recipe(recipe: Recipe) -> Plan:
    """Work out a recipe from the model's configuration, its tokenizer and the data, which is opened.

    Raises: SqftError as the run would, but for what only the weights tell.
    """
    from sqft.models import model_identity, model_outline

    outline = model_outline(recipe.model)
    workspace = Workspace(Path(recipe.runtime.workspace))
    chosen = check_recipe(recipe, outline, workspace.models)
    keys = stage_keys(recipe, model_identity(recipe.model, workspace.digests))
    modules = _modules(recipe, outline, chosen)
    data = _data(recipe, workspace, keys)
    estimate = _Estimate(recipe, outline, modules)
    stages = [
        _stage(stage, workspace.stage_directory(stage.name, keys[stage.name]), estimate)
        for stage in recipe_stages(recipe)
    ]
    return Plan(recipe.name, recipe.model.source, outline.num_parameters, stages, modules, data)


def _data(recipe: Recipe, workspace: Workspace, keys: dict[str, str]) -> DataPreview | None:
    """What the data holds, and one item of it; that there is enough to calibrate on is checked as well."""
    from sqft.data import calibration_tokens

    if recipe.data is None:
        return None
    splits, tokenizer = load_items(recipe, workspace, keys)
    check_splits(recipe, splits)
    calibration = recipe.calibration or CalibrationSection()
    if recipe.needs_calibration and calibration.source == "train":
        calibration_tokens(calibration, splits.train, tokenizer, seed=recipe.seed)
    first = [view_item(example, "train", tokenizer, recipe.data.loss_on) for example in splits.train[:1]]
    return DataPreview(splits.report, first)


def _stage(stage: Stage, directory: Path, estimate: "_Estimate") -> StagePlan:
    memory, disk = estimate.of(stage)
    partial = directory.with_name(directory.name + ".partial")
    return StagePlan(
        stage.name,
        str(directory),
        reused=directory.exists(),
        resumed=stage.resumes and partial.exists() and not directory.exists(),
        memory_bytes=int(memory),
        disk_bytes=int(disk),
    )


def _modules(recipe: Recipe, outline: "ModelOutline", chosen: ChosenModules) -> list[ModulePlan]:
    rank = max(recipe.adapters.ranks) if recipe.adapters else 0
    tuned = recipe.tune.rank if recipe.tune and recipe.tune.trains else 0
    size = recipe.quantize.group_size if recipe.quantize else -1
    rows: dict[ModulePlan, int] = {}
    for name, shape in outline.linears.items():
        end = ".".join(name.split(".")[-2:])
        scales = shape[0] * (1 if size == -1 else shape[1] // size) if name in chosen.scaled else 0
        ranks = rank if name in chosen.adapted else 0
        compressed = name in chosen.sparsified, name in chosen.quantized
        row = ModulePlan(end, shape, 0, *compressed, ranks, scales, tuned if name in chosen.tuned else 0)
        rows[row] = rows.get(row, 0) + 1
    return [replace(row, count=count) for row, count in rows.items()]


class _Estimate:
    """Bytes of memory and disk for each stage of a recipe."""

    def __init__(self, recipe: Recipe, outline: "ModelOutline", modules: list[ModulePlan]) -> None:
        self.recipe = recipe
        self.outline = outline
        self.block_weights = sum(m.count * math.prod(m.shape) for m in modules)
        self.other_weights = outline.num_parameters - self.block_weights
        self.quantized_weights = sum(m.count * math.prod(m.shape) for m in modules if m.quantized)
        self.adapter_weights = sum(m.count * (m.rank * sum(m.shape) + m.num_scales) for m in modules)
        self.tuned_weights = sum(m.count * m.tuned_rank * sum(m.shape) for m in modules)
        self.widest = max((m.shape[1] for m in modules), default=0)

    def of(self, stage: Stage) -> tuple[float, float]:
        """(memory, disk) of one stage."""
        kind = stage.kind
        if kind == "items":
            return 0, self._items()
        if kind in ("sparsify", "quantize"):
            return self._compression(), self._stored(quantized=kind == "quantize", latent=kind == "quantize")
        if kind == "tune":
            return self._tuning()
        if kind in ("train", "train_dense"):
            return self._training(
                self.recipe.train or TrainSection(), dense=kind == "train_dense"
            ), 4 * FLOAT32 * self.adapter_weights
        if kind == "search":
            return self._inference(), FLOAT32 * self.adapter_weights
        if kind in ("merge", "export"):
            quantized = self.recipe.quantize is not None
            return self._inference(), self._stored(quantized=quantized, latent=False)
        return self._inference(), 0

    def _items(self) -> float:
        """Texts and token ids: about three times the files that they are read from."""
        from sqft.data.sources import expand_paths

        data = self.recipe.data
        sources = [data.train, data.search, data.test] if data else []
        files = [path for s in sources if s and not isinstance(s, HubSource) for path in expand_paths(s)]
        return 3 * sum(path.stat().st_size for path in files)

    def _compression(self) -> float:
        calibration = self.recipe.calibration or CalibrationSection()
        tokens = calibration.num_samples * calibration.sequence_length if self.recipe.needs_calibration else 0
        block = FLOAT32 * self.block_weights / max(self.outline.num_blocks, 1)
        hessians = 2 * FLOAT32 * self.widest**2
        embedding = 2 * FLOAT32 * self.outline.vocab_size * self.outline.hidden_size
        return 2 * block + hessians + embedding + 2 * FLOAT32 * tokens * self.outline.hidden_size

    def _stored(self, *, quantized: bool, latent: bool) -> float:
        section = self.recipe.quantize
        masks = self.block_weights / 8 if self.recipe.sparsify else 0
        if not (quantized and section):
            return self._dense_bytes() + masks
        group = section.group_size if section.group_size > 0 else self.widest
        codes = self.quantized_weights * (section.bits / 8 + 2 / group)
        sixteen = 2 * (self.block_weights - self.quantized_weights + self.other_weights)
        return (
            codes
            + sixteen
            + masks
            + (self.quantized_weights * (1 if section.bits <= 4 else 2) if latent else 0)
        )

    def _tuning(self) -> tuple[float, float]:
        """(memory, disk) of a LoRA that is trained on the dense model, if none exists, and merged."""
        section = self.recipe.tune or TuneSection()
        disk = self._dense_bytes() + 4 * FLOAT32 * self.tuned_weights
        linear = FLOAT32 * max((math.prod(shape) for shape in self.outline.linears.values()), default=0)
        return self._training(section, dense=True) if section.trains else 3 * linear, disk

    def _dense_bytes(self) -> float:
        return 2 * (self.block_weights + self.other_weights)

    def _training(self, train: TrainingSection, *, dense: bool) -> float:
        data = self.recipe.data
        length = data.sequence_length if data else 0
        tokens = train.batch_size // train.gradient_accumulation * length
        base = self._dense_bytes()
        if self.recipe.quantize and not dense:
            packed = self.recipe.adapters is not None and self.recipe.adapters.loaded_as == "packed"
            half = packed and self.recipe.quantize.bits <= 4
            base -= self.quantized_weights + (self.quantized_weights // 2 if half else 0)
        blocks = 1 if train.gradient_checkpointing else self.outline.num_blocks
        kept = ACTIVATIONS_PER_HIDDEN * tokens * self.outline.hidden_size * blocks
        logits = 3 * FLOAT32 * tokens * self.outline.vocab_size
        trained = self.tuned_weights if isinstance(train, TuneSection) else self.adapter_weights
        return base + 4 * FLOAT32 * trained + kept + logits

    def _inference(self) -> float:
        section = self.recipe.evaluate or EvaluateSection()
        length = max((self.recipe.data or DataSection(train="")).sequence_length, 1)
        logits = 2 * FLOAT32 * section.batch_size * length * self.outline.vocab_size
        return FLOAT32 * (self.block_weights + self.other_weights) + logits
