"""What a run measured, as JSON for programs and one HTML page for people. Plain data in, no torch.

The rows of a report are in `report.content`.
"""

from sqft.report.content import ReportData, read_report
from sqft.report.page import write_report
from sqft.report.summary import markdown_table, summary_table

__all__ = ["ReportData", "markdown_table", "read_report", "summary_table", "write_report"]
