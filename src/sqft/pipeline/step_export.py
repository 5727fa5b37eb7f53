"""The stages `export`, one for each format."""

from typing import Any

from sqft.artifacts import Manifest
from sqft.pipeline.context import StageContext
from sqft.pipeline.reported import stage_name

__all__ = ["export"]


def export(context: StageContext) -> dict[str, Any]:
    """The recipe's product in the format of a runtime."""
    from sqft.export.model_export import plan_export, write_export

    result = write_export(
        plan_export(context.inputs[context.recipe.final_stage], context.argument),
        context.directory,
        final=context.final,
        recipe=context.recipe.model_dump(mode="json", exclude={"runtime"}, exclude_none=True),
        evaluation=_evaluated_rows(context),
        progress=context.progress,
    )
    return {"export": result.as_dict()}


def _evaluated_rows(context: StageContext) -> list[dict[str, Any]]:
    """The figures of every model that the recipe has measured by now."""
    stages = [stage_name("evaluate", name) for name in context.recipe.reported_models()]
    return [Manifest.read(context.inputs[s]).metrics["row"] for s in stages if s in context.inputs]
