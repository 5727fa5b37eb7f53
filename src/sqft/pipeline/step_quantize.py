"""The stage `quantize`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sqft.pipeline.calibrated import read_calibration, record_layers
from sqft.pipeline.context import StageContext
from sqft.pipeline.opening import tell_kept_zeros
from sqft.sections import QuantizeSection

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["quantize"]


def quantize(context: StageContext) -> dict[str, Any]:
    """The dense model and the masks → a compressed-tensors model, and the weights before rounding."""
    from sqft.compression import quantize_model
    from sqft.models import CheckpointWriter, ExistingMasks, StoredMasks, open_checkpoint

    section = context.recipe.quantize or QuantizeSection()
    source = open_checkpoint(context.dense, trust_remote_code=context.trusts_code)
    masks: Mapping[str, Tensor] = {}
    if context.recipe.sparsify:
        masks = StoredMasks(context.inputs["sparsify"])
    elif section.method != "joint":  # which chooses zeros by itself
        masks = ExistingMasks(source)
        tell_kept_zeros(len(masks))
    tokens = read_calibration(context, section)
    writer = CheckpointWriter(context.directory, source)
    layers = quantize_model(source, masks, section, tokens, writer, **context.compressing)
    writer.close()
    return record_layers(context, layers, tokens, {"tune", "sparsify", "quantize"})
