"""Which stage holds each model that a recipe reports, and what stages are called."""

from typing import Any

from sqft.pipeline.recipe import Recipe
from sqft.sections import AdapterSection, ReportedModel

__all__ = ["adapter_stage", "dense_adapters", "model_stage", "stage_name"]


def stage_name(kind: str, argument: str = "") -> str:
    """What a stage is called among the inputs of others: its kind, and which one of several."""
    return f"{kind}-{argument}" if argument else kind


def model_stage(recipe: Recipe, model: ReportedModel) -> str:
    """The stage that holds the weights of a reported model."""
    stages = {"base": "model", "dense_tuned": "model", "tuned": "tune"}
    stages |= {"sparse": "sparsify", "quantized": "quantize", "reconstructed": "reconstruct"}
    return stages.get(model) or {"adapted": recipe.base_stage, "merged": "merge"}[model]


def adapter_stage(recipe: Recipe, model: ReportedModel) -> str | None:
    """The stage that holds the adapter of a reported model, if it has one."""
    return {"dense_tuned": "train_dense", "adapted": recipe.adapter_stage}.get(model)


def dense_adapters(section: AdapterSection) -> AdapterSection:
    """The dense reference: plain LoRA of the maximal rank, on the same modules where these have updates."""
    plain = {"method": "lora", "gradient": "exact", "train_scales": None, "train_norms": None}
    targets: dict[str, Any] = {} if section.low_rank else {"target_modules": None, "skip_modules": []}
    return section.model_copy(update=plain | targets | {"ranks": [max(section.ranks)]})
