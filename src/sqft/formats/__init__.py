"""What a file can hold: every format written and read back; nothing here runs a model."""

from sqft.formats.weights import ExportSource, IntegerWeight, open_source

__all__ = ["ExportSource", "IntegerWeight", "open_source"]
