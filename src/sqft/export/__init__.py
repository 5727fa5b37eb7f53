"""Merged models in the formats that people serve, each checked in its real runtime."""

from sqft.export.adapter_export import export_adapter
from sqft.export.exporting import ExportResult, export_model
from sqft.export.formats import FORMATS
from sqft.export.merging import MergeResult, merge_foreign

__all__ = ["FORMATS", "ExportResult", "MergeResult", "export_adapter", "export_model", "merge_foreign"]
