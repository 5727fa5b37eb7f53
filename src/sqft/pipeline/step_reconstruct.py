"""The stage `reconstruct`."""

from dataclasses import replace
from typing import Any

from sqft.artifacts import LAYERS, read_object
from sqft.pipeline.calibrated import read_calibration, record_layers
from sqft.pipeline.context import StageContext
from sqft.sections import ReconstructSection

__all__ = ["reconstruct"]


def reconstruct(context: StageContext) -> dict[str, Any]:
    """The dense and the compressed model → the compressed one, its blocks fitted to the dense ones."""
    from sqft.compression import LayerReport, reconstruct_model
    from sqft.models import CheckpointWriter, open_checkpoint

    recipe = context.recipe
    section = recipe.reconstruct or ReconstructSection()
    code = {"trust_remote_code": context.trusts_code}
    before = context.inputs[recipe.compressed_stage]
    dense, compressed = open_checkpoint(context.dense, **code), open_checkpoint(before, **code)
    tokens = read_calibration(context, section)
    assert tokens is not None
    writer = CheckpointWriter(context.directory, compressed)
    blocks = reconstruct_model(
        dense, compressed, section, tokens, writer, seed=recipe.seed, **context.compressing
    )
    writer.close()
    # Errors were measured before the blocks were fitted, and are not those of the layers any more.
    found = [LayerReport.from_json(row | {"seconds": 0.0}) for row in read_object(before / LAYERS)["layers"]]
    layers = [replace(layer, error=None) for layer in found]
    made_with = {"tune", "sparsify", "quantize", "reconstruct"}
    return record_layers(context, layers, tokens, made_with, blocks)
