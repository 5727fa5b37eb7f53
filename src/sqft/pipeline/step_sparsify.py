"""The stage `sparsify`."""

from typing import Any

from sqft.pipeline.calibrated import read_calibration, record_layers
from sqft.pipeline.context import StageContext
from sqft.sections import SparsifySection

__all__ = ["sparsify"]


def sparsify(context: StageContext) -> dict[str, Any]:
    """model → masks and a sparse 16-bit model."""
    from sqft.compression import sparsify_model
    from sqft.models import CheckpointWriter, open_checkpoint

    section = context.recipe.sparsify or SparsifySection()
    tokens = read_calibration(context, section)
    source = open_checkpoint(context.dense, trust_remote_code=context.trusts_code)
    writer = CheckpointWriter(context.directory, source)
    layers = sparsify_model(source, section, tokens, writer, **context.compressing)
    writer.close()
    return record_layers(context, layers, tokens, {"tune", "sparsify"})
