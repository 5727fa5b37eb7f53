"""What a run would refuse later, told in the first seconds: from settings, shapes and what is installed."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sqft.errors import AdapterError, require
from sqft.pipeline.recipe import Recipe
from sqft.sections import DataSource, HubSource, QuantizeSection, SparsifySection

if TYPE_CHECKING:
    from sqft.models import ModelOutline

__all__ = ["ChosenModules", "check_recipe"]


@dataclass(frozen=True)
class ChosenModules:
    """The linears that are sparsified, quantized, given low-rank updates, and whose scales are trained."""

    sparsified: frozenset[str]
    quantized: frozenset[str]
    adapted: frozenset[str]
    scaled: frozenset[str]


def check_recipe(recipe: Recipe, outline: "ModelOutline", models_dir: Path) -> ChosenModules:
    """Refuse what would fail hours later: modules, widths, ranks, training arguments, formats, extras.

    models_dir: where the workspace keeps converted models.

    Raises: ModelError, CompressionError, AdapterError, TrainingError, ExportError, MissingExtraError.
    """
    for module, extra in _needed_extras(recipe):
        if importlib.util.find_spec(module) is None:
            require(module, extra)
    quantized = set(_chosen(outline, recipe.quantize))
    adapted, scaled = _trained(recipe, outline, quantized)
    modules = ChosenModules(
        frozenset(_chosen(outline, recipe.sparsify)),
        frozenset(quantized),
        frozenset(adapted),
        frozenset(scaled),
    )
    if recipe.train:
        from sqft.training import check_arguments

        check_arguments(recipe.train)
    if recipe.export:
        from sqft.export.foresight import check_exports
        from sqft.models.source import source_tokenizer

        shapes = {name: outline.linears[name] for name in sorted(modules.quantized)}
        tokenizer = source_tokenizer(recipe.model, models_dir) if "gguf" in recipe.export.formats else None
        check_exports(recipe.export.formats, outline.skeleton.config, shapes, recipe.quantize, tokenizer)
    return modules


def _needed_extras(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Modules of optional dependencies that the recipe will import, each with its extra."""
    sources: list[DataSource | None] = []
    if recipe.data:
        sources += [recipe.data.train, recipe.data.search, recipe.data.test]
    if recipe.calibration:
        sources.append(recipe.calibration.source)
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

    return [] if section is None else choose_layers(outline.skeleton, outline.linears, section)


def _trained(recipe: Recipe, outline: "ModelOutline", quantized: set[str]) -> tuple[set[str], set[str]]:
    """The linears with a low-rank update, and those whose scales are trained.

    Raises: AdapterError if a target is missing, one that needs a grid has none, or a rank is beyond a width.
    """
    section = recipe.adapters
    if section is None:
        return set(), set()
    from sqft.adapters.targets import find_targets

    everywhere = not section.low_rank and section.target_modules is None
    targets = quantized if everywhere else set(find_targets(outline.skeleton, section.target_modules))
    off_grid = sorted(targets - quantized)
    if section.method in ("qa_sparse_peft", "scales") and off_grid:
        raise AdapterError(
            f"{section.method} needs a quantized base, and {off_grid[0]} is not; quantize it, or leave "
            "it out of adapters.target_modules"
        )
    if not section.low_rank:
        return set(), targets
    for name in sorted(targets):
        rows, columns = outline.linears[name]
        if max(section.ranks) > min(rows, columns):
            raise AdapterError(
                f"adapters.ranks: {max(section.ranks)} is more than {name} of {rows} x {columns} can have; "
                f"{min(rows, columns)} is its full rank"
            )
    return targets, quantized if section.trains_scales else set()
