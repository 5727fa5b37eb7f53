"""Sparsifying and quantizing a model, one block in memory at a time."""

from sqft.compression.quantize import quantize_model
from sqft.compression.reports import LayerReport
from sqft.compression.selection import choose_heads, choose_layers
from sqft.compression.sparsify import sparsify_model

__all__ = ["LayerReport", "choose_heads", "choose_layers", "quantize_model", "sparsify_model"]
