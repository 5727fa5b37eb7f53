"""The stages `evaluate`, one for each reported model."""

from typing import Any, cast

from sqft.artifacts import ITEM_FIGURES, write_json
from sqft.pipeline.context import ADAPTER, StageContext
from sqft.pipeline.opening import open_model
from sqft.pipeline.reported import adapter_stage, model_stage
from sqft.sections import EvaluateSection, ReportedModel

__all__ = ["evaluate"]


def evaluate(context: StageContext) -> dict[str, Any]:
    """One model, measured on the test or search items and the text that the recipe names."""
    from sqft.data import read_items
    from sqft.evaluation.measurement import measure_model, size_on_disk
    from sqft.models import load_tokenizer, open_checkpoint

    name = cast(ReportedModel, context.argument)
    directory = context.inputs[model_stage(context.recipe, name)]
    stage = adapter_stage(context.recipe, name)
    adapter = context.inputs[stage] / ADAPTER if stage else None
    section = context.recipe.evaluate or EvaluateSection()
    items = read_items(context.inputs["items"], section.split) if context.recipe.data else []
    row, figures = measure_model(
        open_model(directory, adapter, **context.opening),
        load_tokenizer(context.inputs["model"], trust_remote_code=context.trusts_code),
        items,
        section,
        trust_remote_code=context.trusts_code,
        progress=context.progress,
    )
    write_json(context.directory / ITEM_FIGURES, figures)
    grid = open_checkpoint(directory, trust_remote_code=context.trusts_code).grid
    row |= {"name": name, "bits": grid.bits if grid else None}
    row |= {"size_bytes": size_on_disk(directory) + (size_on_disk(adapter) if adapter else 0)}
    return {"row": row}
