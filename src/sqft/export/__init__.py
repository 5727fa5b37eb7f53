"""Merged models in the formats that people serve, each checked in its real runtime."""

from sqft.export.adapter_export import export_adapter
from sqft.export.model_export import export_model
from sqft.export.result import ExportResult
from sqft.export.table import FORMATS

__all__ = ["FORMATS", "ExportResult", "export_adapter", "export_model"]
