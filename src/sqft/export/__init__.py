"""Merged models in the formats that people serve, each checked in its real runtime."""

from typing import TYPE_CHECKING

from sqft.deferred import deferred_names

if TYPE_CHECKING:
    from sqft.export.adapter_export import export_adapter
    from sqft.export.model_export import export_model
    from sqft.export.result import ExportResult
    from sqft.export.table import FORMATS

__all__ = ["FORMATS", "ExportResult", "export_adapter", "export_model"]

__getattr__ = deferred_names(__name__, __file__)
