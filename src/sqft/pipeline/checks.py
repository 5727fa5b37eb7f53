"""Refusing in the first seconds what a run would refuse hours later: settings, shapes, missing extras."""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft.errors import AdapterError, CompressionError, ModelError, RecipeError, require
from sqft.pipeline.recipe import Recipe
from sqft.sections import DataSource, HubSource, QuantizeSection, SparsifySection, TrainSection, TuneSection

if TYPE_CHECKING:
    from sqft.models import ModelOutline

__all__ = [
    "ChosenModules",
    "check_libraries",
    "check_modules",
    "check_recipe",
    "planned_grid",
    "unusual_trainings",
]


@dataclass(frozen=True)
class ChosenModules:
    """The linears that are sparsified, quantized, given low-rank updates, and whose scales are trained.

    tuned: those that a LoRA is merged into before all that.
    """

    sparsified: frozenset[str]
    quantized: frozenset[str]
    adapted: frozenset[str]
    scaled: frozenset[str]
    tuned: frozenset[str]


def check_recipe(recipe: Recipe, outline: "ModelOutline", models_dir: Path) -> ChosenModules:
    """Refuse what would fail hours later: modules, widths, ranks, training arguments, formats, extras.

    models_dir: where the workspace keeps converted models.

    Raises: ModelError, CompressionError, AdapterError, TrainingError, ExportError, MissingExtraError.
    """
    modules = check_modules(recipe, outline)
    shapes = {name: outline.linears[name] for name in sorted(modules.quantized)}
    check_libraries(recipe, shapes, planned_grid(recipe, outline), models_dir)
    return modules


def planned_grid(recipe: Recipe, outline: "ModelOutline") -> dict[str, Any] | None:
    """The grid of the recipe's model: the one it makes, or the one that its model arrives on."""
    parts = ("bits", "group_size", "symmetric", "scale_bits")
    made = recipe.quantize
    return outline.grid if made is None else {part: getattr(made, part) for part in parts}


def check_modules(recipe: Recipe, outline: "ModelOutline") -> ChosenModules:
    """What of `check_recipe` needs no library: extras, modules, widths and ranks."""
    from sqft.compression import choose_heads

    for module, extra in _needed_extras(recipe):
        if importlib.util.find_spec(module) is None:
            require(module, extra)
    _check_grid(recipe, outline)
    quantized = set(_chosen(outline, recipe.quantize)) | set(outline.quantized)
    tuned = _tuned(recipe, outline)
    if recipe.quantize:
        choose_heads(outline, recipe.quantize)
    adapted, scaled = _trained(recipe, outline, quantized)
    return ChosenModules(
        frozenset(_chosen(outline, recipe.sparsify)),
        frozenset(quantized),
        frozenset(adapted),
        frozenset(scaled),
        frozenset(tuned),
    )


def check_libraries(
    recipe: Recipe,
    quantized: Mapping[str, tuple[int, int]],
    grid: Mapping[str, Any] | None,
    models_dir: Path,
) -> None:
    """What of `check_recipe` the libraries underneath are asked: training arguments, and formats.

    quantized: (out, in) of the linears on the grid, by name; grid: `planned_grid`.
    """
    trainings = unusual_trainings(recipe)
    if trainings:
        from sqft.training import check_arguments

        for section in trainings:
            check_arguments(section)
    if recipe.export:
        from sqft.export.foresight import check_exports
        from sqft.models.outline import model_config
        from sqft.models.source import source_tokenizer
        from sqft.ops import GridSpec

        tokenizer = source_tokenizer(recipe.model, models_dir) if "gguf" in recipe.export.formats else None
        spec = None if grid is None else GridSpec(**grid)
        check_exports(recipe.export.formats, model_config(recipe.model), quantized, spec, tokenizer)


def _check_grid(recipe: Recipe, outline: "ModelOutline") -> None:
    """Refuse what needs a grid where there is none, and what cannot be done to codes that exist already."""
    source = recipe.model.source
    method = recipe.adapters.method if recipe.adapters else None
    if outline.grid is None:
        if method == "qa_sparse_peft" and not recipe.quantize:
            raise RecipeError(
                f"adapters.method: qa_sparse_peft trains on a grid, and {source} has none; add a quantize "
                "section or use sparse_peft"
            )
        if method == "scales" and not recipe.quantize:
            raise RecipeError(
                f"adapters.method: scales trains the scales of a grid, and {source} has none; add a quantize "
                "section"
            )
        return
    for section, given in (("sparsify", recipe.sparsify), ("quantize", recipe.quantize)):
        if given is not None:
            raise CompressionError(
                f"{section}: {source} is quantized already; train on it without this section, or give the "
                "model that it was made from"
            )
    if method == "sparse_peft":
        raise RecipeError(
            f"adapters.method: sparse_peft merges into 16 bits, and {source} is quantized; use "
            "qa_sparse_peft or scales, which merge into its grid"
        )


def unusual_trainings(recipe: Recipe) -> list[TuneSection | TrainSection]:
    """The trainings that Trainer may refuse; it is slow to import, and so not asked about others."""
    return [s for s in (recipe.tune, recipe.train) if s and (s.arguments or s.gradient_accumulation > 1)]


def _needed_extras(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Modules of optional dependencies that the recipe will import, each with its extra."""
    sources: list[DataSource | None] = []
    if recipe.data:
        sources += [recipe.data.train, recipe.data.search, recipe.data.test]
    if recipe.calibration:
        sources += [source for _, source, _ in recipe.calibration.sources]
    if recipe.distillation:
        sources.append(recipe.distillation.text)
    for source in sources:
        if isinstance(source, HubSource):
            yield "datasets", "hub"
        elif source is not None:
            named = [source] if isinstance(source, str) else source
            if any(name.removesuffix(".gz").endswith(".parquet") for name in named):
                yield "pyarrow", "hub"
    if recipe.evaluate and recipe.evaluate.tasks:
        yield "lm_eval", "eval"


def _chosen(outline: "ModelOutline", section: SparsifySection | QuantizeSection | None) -> list[str]:
    """The linears that a compression section touches, checked against its shapes."""
    from sqft.compression import choose_layers

    return [] if section is None else choose_layers(outline, section)


def _tuned(recipe: Recipe, outline: "ModelOutline") -> set[str]:
    """The linears that a LoRA is merged into before anything else.

    Raises: AdapterError if a target is missing, the rank is beyond a width, or an adapter that exists does
    not fit; ModelError if a tuned model that exists has another architecture.
    """
    section = recipe.tune
    if section is None:
        return set()
    if recipe.tuned_model is not None:
        from sqft.models import model_outline

        if model_outline(recipe.tuned_model).linears != outline.linears:
            raise ModelError(f"tune.model: {section.model} has other layers than {recipe.model.source}")
        return set()
    if section.adapter is not None:
        return _fitting(Path(section.adapter), outline)
    targets = set(_adapted(outline, section.target_modules, section.skip_modules))
    _check_rank(outline, targets, section.rank, "tune.rank")
    return targets


def _fitting(directory: Path, outline: "ModelOutline") -> set[str]:
    """The linears of an adapter that exists already. Raises: AdapterError if it is for another model."""
    from sqft.adapters.lora_files import open_foreign_adapter
    from sqft.foreign.fit import check_shapes

    adapter = open_foreign_adapter(directory)
    try:
        check_shapes(outline.linears | outline.other_linears, adapter)
    except AdapterError as error:
        raise AdapterError(f"tune.adapter: {error}; {directory} is of another model") from None
    return set(adapter.names)


def _check_rank(outline: "ModelOutline", targets: set[str], rank: int, setting: str) -> None:
    for name in sorted(targets):
        rows, columns = outline.linears[name]
        if rank > min(rows, columns):
            raise AdapterError(
                f"{setting}: {rank} is more than {name} of {rows} x {columns} can have; "
                f"{min(rows, columns)} is its full rank"
            )


def _trained(recipe: Recipe, outline: "ModelOutline", quantized: set[str]) -> tuple[set[str], set[str]]:
    """The linears with a low-rank update, and those whose scales are trained.

    Raises: AdapterError if a target is missing, one that needs a grid has none, or a rank is beyond a width.
    """
    section = recipe.adapters
    if section is None:
        return set(), set()
    if section.low_rank or section.target_modules is not None:
        targets = _adapted(outline, section.target_modules, section.skip_modules)
    else:
        targets = quantized & _adapted(outline, "all-linear", section.skip_modules)
    off_grid = sorted(targets - quantized)
    if section.method in ("qa_sparse_peft", "scales") and off_grid:
        raise AdapterError(
            f"{section.method} needs a quantized base, and {off_grid[0]} is not; quantize it, or leave "
            "it out of adapters.target_modules (or name it in adapters.skip_modules)"
        )
    if not section.low_rank:
        return set(), targets
    _check_rank(outline, targets, max(section.ranks), "adapters.ranks")
    return targets, quantized if section.trains_scales else set()


def _adapted(
    outline: "ModelOutline", targets: Sequence[str] | str | None, skip: Sequence[str] | str
) -> set[str]:
    from sqft.models.names import choose_adapted, is_repeated

    names = list(outline.linears | outline.other_linears)
    return set(choose_adapted(list(filter(is_repeated, names)) or names, targets, skip))
