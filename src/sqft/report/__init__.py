"""What a run measured, as JSON for programs and one HTML page for people. Plain data in, no torch."""

from sqft.report.content import LayerRow, LineageRow, ModelRow, ReportData, read_report
from sqft.report.page import write_report
from sqft.report.summary import markdown_table, summary_table

__all__ = [
    "LayerRow",
    "LineageRow",
    "ModelRow",
    "ReportData",
    "markdown_table",
    "read_report",
    "summary_table",
    "write_report",
]
