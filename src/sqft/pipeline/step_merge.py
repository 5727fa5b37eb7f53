"""The stage `merge`."""

from typing import Any

from sqft.artifacts import FACTS, Manifest, read_object
from sqft.pipeline.context import ADAPTER, StageContext
from sqft.pipeline.merging import write_certified

__all__ = ["merge"]

# Sections of a recipe that a merged model depends on; data enters by content.
DETERMINING = {
    "model", "seed", "calibration", "tune", "sparsify", "quantize", "reconstruct", "adapters",
    "distillation", "train", "search",
}  # fmt: skip


def merge(context: StageContext) -> dict[str, Any]:
    """The base and the sub-adapter → one model, re-opened and certified before it is called done."""
    from sqft.data import read_items

    adapter_dir = context.inputs[context.recipe.adapter_stage]
    # Data too small to be split has no test items; training items do as well, since only logits are compared.
    items = read_items(context.inputs["items"], "test") or read_items(context.inputs["items"], "train")
    checks = write_certified(
        context.directory,
        context.base,
        adapter_dir / ADAPTER,
        token_ids=[item.token_ids if item.is_text else item.prompt_ids for item in items],
        facts=_facts(context),
        quantize=context.recipe.quantize,
        trained_digest=Manifest.read(adapter_dir).metrics["codes_digest"],
        progress=context.progress,
        **context.opening,
    )
    return {"checks": [vars(check) for check in checks]}


def _facts(context: StageContext) -> dict[str, Any]:
    """What sqft.json of a merged model says."""
    recipe = context.recipe
    arrived = read_object(context.base / FACTS)  # of a base that was merged before, whose grid and zeros stay
    return {
        "kind": "merged",
        "method": context.adapters.method,
        "pattern": recipe.pattern or arrived.get("pattern"),
        "quantization": recipe.quantize.model_dump(mode="json")
        if recipe.quantize
        else arrived.get("quantization"),
        "ranks": Manifest.read(context.inputs[recipe.adapter_stage]).metrics["ranks"],
        "lineage": context.lineage(recipe.adapter_stage),
        "recipe": recipe.model_dump(mode="json", include=DETERMINING, exclude_none=True),
        "prompt": context.data.rendering(),
    }
