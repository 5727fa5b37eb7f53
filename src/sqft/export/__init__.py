"""Merged models in the formats that people serve, each checked in its real runtime."""

from sqft.export.adapter_export import export_adapter
from sqft.export.model_export import ExportResult, export_model
from sqft.export.table import FORMATS
from sqft.foreign.merge import MergeResult, merge_foreign

__all__ = ["FORMATS", "ExportResult", "MergeResult", "export_adapter", "export_model", "merge_foreign"]
