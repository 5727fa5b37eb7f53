"""Facts about a model from its directory and from the report of its run."""

import json
from pathlib import Path
from typing import Any

from sqft.artifacts import CERTIFICATE, FACTS, MERGE_RECORD, REPORT, read_object

__all__ = ["model_records", "read_certificate"]


Rows = list[dict[str, Any]]


def model_records(directory: Path) -> tuple[dict[str, Any] | None, Rows | None]:
    """The recipe and the evaluation of a model, from its directory or from the report of its run."""
    report = read_object(directory.parent / REPORT)
    if Path(str(report.get("merged_dir"))).name != directory.resolve().name:
        report = {}
    recipe = read_object(directory / FACTS).get("recipe") or report.get("recipe")
    rows = list(report.get("models") or [])
    merge = read_object(directory / MERGE_RECORD)
    for name in ("base", "unmerged", "trained_on"):
        if merge.get(f"{name}_loss") is not None:
            rows.append({"name": name, "loss": merge[f"{name}_loss"]})
    for rung in merge.get("rungs", []):
        if rung["name"] == merge.get("chosen") and rung["loss"] is not None:
            rows.append(rung | {"name": f"merged ({rung['name']})"})
    return recipe, rows or None


def read_certificate(directory: Path) -> dict[str, Any] | None:
    """The certificate of a merged model; None if it carries none."""
    path = directory / CERTIFICATE
    if not path.is_file():
        return None
    certificate: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return certificate
