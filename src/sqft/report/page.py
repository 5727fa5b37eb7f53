"""report.json and report.html of a results directory."""

import json
from pathlib import Path
from typing import Any

import yaml

from sqft.artifacts import ITEM_FIGURES, REPORT, REPORT_PAGE
from sqft.directories import write_files
from sqft.report.answers import shown_answers
from sqft.report.comparison import ComparisonData, compare_table, differing_table
from sqft.report.content import ModelRow, ReportData, finite_values
from sqft.report.frontier import draw_frontier
from sqft.report.plots import draw_plots
from sqft.report.summary import format_bytes, format_seconds, label_model, loss_unit, summary_table
from sqft.report.templates import render_template

__all__ = ["render_comparison", "render_page", "write_comparison", "write_report"]


def write_report(
    data: ReportData, directory: Path, items: dict[str, dict[str, Any]] | None = None
) -> tuple[Path, Path]:
    """Write report.json and report.html and return their paths.

    A user's file of that name is left alone, and the report gets another.

    items: what every item gave, by model; becomes items.json, which comparisons are made from, and some of
    them are shown.
    """
    contents = {REPORT: _json(data.to_json()), REPORT_PAGE: render_page(data, items).encode()}
    if items:
        contents[ITEM_FIGURES] = _json(finite_values(items))
    json_path, html_path, *_ = write_files(directory, contents)
    return json_path, html_path


def write_comparison(data: ComparisonData, directory: Path) -> Path:
    """Write comparison.html, and return its path: another one where a user's is in the way."""
    (path,) = write_files(directory, {"comparison.html": render_comparison(data).encode()})
    return path


def render_comparison(data: ComparisonData) -> str:
    """A comparison as one HTML page."""
    header, *rows = compare_table(data)
    return render_template(
        "comparison",
        data=data,
        header=header,
        rows=rows,
        plots=draw_frontier(data),
        differing=differing_table(data),
    )


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def render_page(data: ReportData, items: dict[str, dict[str, Any]] | None = None) -> str:
    """One HTML page that needs no other file and no network. items: as `write_report` takes them."""
    header, *rows = summary_table(data)
    return render_template(
        "page",
        data=data,
        facts=_facts(data),
        header=header,
        rows=list(zip([row.name for row in data.models], rows, strict=True)),
        plots=draw_plots(data),
        answers=shown_answers(items or {}, [row.name for row in data.models]),
        labels={row.name: label_model(row, data.recipe) for row in data.models},
        recipe_text=yaml.safe_dump(_without_none(data.recipe), sort_keys=False, allow_unicode=True),
        stages=[(stage, format_seconds(seconds)) for stage, seconds in data.stage_seconds.items()],
        elapsed=format_seconds(data.elapsed_seconds),
        data_facts=[(key.replace("_", " "), _shown(value)) for key, value in data.data.items()],
    )


def _facts(data: ReportData) -> list[tuple[str, str, str]]:
    """The figures at the top of the page: (what, value, remark)."""
    by_name = {row.name: row for row in data.models}
    last = data.models[-1] if data.models else ModelRow("none")
    base = by_name.get("base")
    facts: list[tuple[str, str, str]] = []
    if last.accuracy is not None:
        remark = f"base {100 * base.accuracy:.1f} %" if base and base.accuracy is not None else ""
        facts.append((f"accuracy, {label_model(last, data.recipe)}", f"{100 * last.accuracy:.1f} %", remark))
    if last.loss is not None:
        remark = f"base {base.loss:.2f}" if base and base.loss is not None else ""
        facts.append((f"loss, {loss_unit(among_choices=data.among_choices)}", f"{last.loss:.2f}", remark))
    if last.size_bytes is not None:
        remark = f"base {format_bytes(base.size_bytes)}" if base and base.size_bytes else ""
        facts.append(("size on disk", format_bytes(last.size_bytes), remark))
    if last.sparsity is not None:
        facts.append(("zeros in the linear layers", f"{100 * last.sparsity:.1f} %", ""))
    facts.append(("time of the run", format_seconds(data.elapsed_seconds), ""))
    return facts


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_shown(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_shown(item) for item in value) or "none"
    return str(value)
