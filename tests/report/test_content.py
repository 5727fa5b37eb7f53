import json
import math
from pathlib import Path

import pytest

from sqft.checks import Check
from sqft.errors import WorkspaceError
from sqft.report.content import ModelRow, ReportData, read_report
from sqft.report.page import write_report

from .invented import invent_report


def test_report_json_has_the_documented_keys(tmp_path: Path) -> None:
    json_path, _ = write_report(invent_report(), tmp_path)
    report = json.loads(json_path.read_text())
    keys = {"models", "certificate", "elapsed_seconds", "versions", "recipe"}
    assert keys <= report.keys()
    row = {"name", "loss", "accuracy", "accuracy_low", "accuracy_high", "num_items", "size_bytes", "sparsity"}
    assert all(row <= model.keys() for model in report["models"])
    assert [model["name"] for model in report["models"]] == [
        "base",
        "dense_tuned",
        "sparse",
        "quantized",
        "merged",
    ]
    assert report["certificate"]["passed"] is True
    assert report["certificate"]["checks"][0]["name"] == "codes in range"


def test_reading_gives_back_what_was_written(tmp_path: Path) -> None:
    data = invent_report()
    write_report(data, tmp_path)
    assert read_report(tmp_path) == data


@pytest.mark.parametrize(
    ("checks", "passed"),
    [
        (None, None),
        ([], False),
        ([Check("a", True)], True),
        ([Check("a", True), Check("b", False)], False),
    ],
)
def test_certificate_passes_only_if_all_checks_do(checks: list[Check] | None, passed: bool | None) -> None:
    data = invent_report(checks=checks)
    assert data.passed is passed
    certificate = data.to_json()["certificate"]
    assert certificate is None if checks is None else certificate["passed"] is passed


def test_figures_that_are_not_finite_become_null(tmp_path: Path) -> None:
    json_path, _ = write_report(
        invent_report(models=[ModelRow("base", math.inf, accuracy=math.nan)]), tmp_path
    )
    model = json.loads(json_path.read_text(), parse_constant=pytest.fail)["models"][0]
    assert model["loss"] is None
    assert model["accuracy"] is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"models": [{"nom": 1}], "certificate": null}'])
def test_a_damaged_report_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(WorkspaceError, match=r"report\.json is not a report"):
        read_report(tmp_path)


def test_a_missing_report_is_told(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="run a recipe first"):
        read_report(tmp_path)


def test_a_report_needs_few_figures(tmp_path: Path) -> None:
    data = ReportData("compress-only", [ModelRow("sparse", size_bytes=10)], {"model": "m"}, {}, 1.0)
    _, html_path = write_report(data, tmp_path)
    assert "certificate" not in html_path.read_text().split("<body>")[1]
    assert read_report(tmp_path) == data
