from typing import Any

import pytest

from sqft.report.content import ModelRow
from sqft.report.summary import format_bytes, format_seconds, label_model, markdown_table, summary_table

from .invented import invent_report


def test_table_has_a_row_a_model_and_shows_intervals() -> None:
    header, *rows = summary_table(invent_report())
    assert header[:3] == ["model", "loss (nats, among the choices)", "accuracy"]
    assert [row[0] for row in rows][-1] == "merged, sparse INT4"
    assert rows[0][1:3] == ["1.200 (1.100-1.300)", "40.0 % (35.0-46.0)"]
    assert "270.0 MB" in rows[0]


def test_columns_without_figures_are_left_out_and_gaps_are_dashes() -> None:
    models = [ModelRow("base", loss=1.0), ModelRow("sparse", sparsity=0.5, tasks={"arc": 0.25})]
    table = summary_table(invent_report(models=models, chance_accuracy=None))
    assert table[0] == ["model", "loss (nats per answer token)", "sparsity", "arc"]
    assert table[1] == ["base, dense", "1.000", "-", "-"]
    assert table[2] == ["sparse", "-", "50.0 %", "0.250"]


def test_markdown_is_a_table() -> None:
    lines = markdown_table(invent_report()).splitlines()
    assert lines[1].startswith("| --- | ---: |")
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize(
    ("recipe", "name", "label"),
    [
        ({"sparsify": {}}, "merged", "merged, sparse"),
        ({"quantize": {"bits": 3}}, "quantized", "INT3"),
        ({"sparsify": {}, "quantize": {}}, "adapted", "sparse INT4 + adapter"),
        ({}, "something", "something"),
    ],
)
def test_labels_follow_the_recipe(recipe: dict[str, Any], name: str, label: str) -> None:
    assert label_model(ModelRow(name), recipe) == label


@pytest.mark.parametrize(
    ("row", "label"),
    [
        (ModelRow("base", sparsity=0.001), "base, dense"),
        (ModelRow("base", sparsity=0.5), "base, sparse"),
        (ModelRow("base", sparsity=0.15, bits=4), "base, INT4"),
        (ModelRow("base", sparsity=0.504, bits=4), "base, sparse INT4"),
        (ModelRow("merged", sparsity=0.5), "merged, sparse"),
    ],
)
def test_a_model_that_arrives_compressed_is_called_so(row: ModelRow, label: str) -> None:
    assert label_model(row, {}) == label


def test_units() -> None:
    assert [format_bytes(n) for n in (12, 1234, 98_000_000, 2.5e9, 3e12)] == [
        "12 B",
        "1.2 kB",
        "98.0 MB",
        "2.5 GB",
        "3.0 TB",
    ]
    assert [format_seconds(s) for s in (1.25, 42, 75, 7300)] == ["1.2 s", "42 s", "1 min 15 s", "2 h 1 min"]
