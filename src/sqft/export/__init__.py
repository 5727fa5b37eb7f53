"""Merged models in the formats that people serve, each checked in its real runtime."""

from sqft.export.exporting import ExportResult, export_model
from sqft.export.formats import FORMATS

__all__ = ["FORMATS", "ExportResult", "export_model"]
