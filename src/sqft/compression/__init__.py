"""Sparsifying and quantizing a model, one block in memory at a time."""

from typing import TYPE_CHECKING

from sqft.deferred import deferred_names

if TYPE_CHECKING:
    from sqft.compression.quantize import quantize_model
    from sqft.compression.reconstruct import BlockReport, reconstruct_model
    from sqft.compression.reports import LayerReport
    from sqft.compression.selection import choose_heads, choose_layers
    from sqft.compression.sparsify import sparsify_model

__all__ = [
    "BlockReport",
    "LayerReport",
    "choose_heads",
    "choose_layers",
    "quantize_model",
    "reconstruct_model",
    "sparsify_model",
]

__getattr__ = deferred_names(__name__, __file__)
