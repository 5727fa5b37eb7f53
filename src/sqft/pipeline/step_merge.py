"""The stage `merge`."""

import shutil
from typing import Any

from sqft.artifacts import Manifest
from sqft.checks import require_passed
from sqft.errors import CertificateError
from sqft.pipeline.context import ADAPTER, StageContext
from sqft.pipeline.opening import open_adapted

__all__ = ["merge"]

REFERENCE_ITEMS = 4
# What of a recipe a merged model depends on; data enters by content.
DETERMINING = {
    "model", "seed", "calibration", "tune", "sparsify", "quantize", "adapters", "train", "search"
}  # fmt: skip


def merge(context: StageContext) -> dict[str, Any]:
    """The base and the sub-adapter → one model, re-opened and certified before it is called done."""
    from sqft.adapters import merge_adapters, merge_norms
    from sqft.certificate import certify_model
    from sqft.compression import choose_heads
    from sqft.data import read_items
    from sqft.models import load_model, open_checkpoint, read_masks, write_model

    adapter_dir = context.inputs[context.recipe.adapter_stage]
    adapter = adapter_dir / ADAPTER
    adapted = open_adapted(context.base, adapter, **context.opening).eval()
    merged = merge_adapters(adapted)
    linears = {name: weight.weight for name, weight in merged.items()}
    masks = read_masks(context.base)
    if context.adapters.low_rank:  # codes alone, which trained scales stand on, tell no mask
        existing = {name: weight.mask for name, weight in merged.items() if name not in masks}
        masks |= {name: mask for name, mask in existing.items() if not bool(mask.all())}
    # Of data too small to be split, what was trained on serves as well: logits are compared, not answers.
    items = read_items(context.inputs["items"], "test") or read_items(context.inputs["items"], "train")
    source = open_checkpoint(context.base, trust_remote_code=context.trusts_code)
    section = context.recipe.quantize
    heads = choose_heads(source.skeleton(), section) if section else []
    write_model(
        context.directory,
        source,
        linears,
        others={f"{name}.weight": weight for name, weight in merge_norms(adapted).items()},
        masks=masks,
        facts=_facts(context, heads),
    )
    checks = certify_model(
        context.directory,
        base_dir=context.base,
        adapter_dir=adapter,
        adapted=adapted,
        merged=load_model(context.directory, **context.loading),
        token_ids=[item.token_ids if item.is_text else item.prompt_ids for item in items[:REFERENCE_ITEMS]],
        trained_digest=Manifest.read(adapter_dir).metrics["codes_digest"],
        trust_remote_code=context.trusts_code,
        progress=context.progress,
    )
    try:
        require_passed(checks, "the merged model is not the one that was trained")
    except CertificateError:
        shutil.rmtree(context.directory)
        raise
    return {"checks": [vars(check) for check in checks]}


def _facts(context: StageContext, heads: list[str]) -> dict[str, Any]:
    """What sqft.json of a merged model says. heads: the weights on a grid of 8 bits."""
    recipe = context.recipe
    return {
        "kind": "merged",
        "method": context.adapters.method,
        "pattern": recipe.pattern,
        "heads": heads,
        "quantization": recipe.quantize.model_dump(mode="json") if recipe.quantize else None,
        "ranks": Manifest.read(context.inputs[recipe.adapter_stage]).metrics["ranks"],
        "lineage": context.lineage(recipe.adapter_stage),
        "recipe": recipe.model_dump(mode="json", include=DETERMINING, exclude_none=True),
        "prompt": context.data.rendering(),
    }
