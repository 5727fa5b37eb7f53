import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sqft.cli import run_command_line
from sqft.cli.demo import SIZES, demo_values
from sqft.models import read_masks
from sqft.pipeline import parse_recipe

DATA = {"train": "train.jsonl", "choices": "choices"}


@pytest.mark.parametrize("name", SIZES)
def test_every_size_is_a_valid_recipe(name: str) -> None:
    recipe = parse_recipe(demo_values(name) | {"data": DATA})
    assert recipe.name == name
    assert recipe.sparsify is not None
    assert recipe.quantize is not None
    assert recipe.adapters is not None
    assert recipe.sparsify.sparsity == 0.5
    assert (recipe.quantize.bits, recipe.quantize.group_size, recipe.quantize.symmetric) == (4, 64, True)
    assert recipe.adapters.method == "scales"
    assert recipe.adapters.trains_norms
    assert recipe.reported_models()[-1] == "merged"
    assert ("dense_tuned" in recipe.reported_models()) == (name == "demo-full")


def test_the_demo_runs_on_a_tiny_model(
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("reasoning_gym")
    values = demo_values("demo-small") | {"model": str(tiny_model_dir("llama"))}
    monkeypatch.setattr("sqft.cli.demo.demo_values", lambda name: values)
    assert run_command_line(["demo", "--small", "--workspace", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    results = tmp_path / "demo-small"
    assert str(results / "report.html") in shown
    assert "from_pretrained" in shown
    report = json.loads((results / "report.json").read_text())
    assert [row["name"] for row in report["models"]] == ["base", "sparse", "quantized", "merged"]
    assert {row["num_items"] for row in report["models"]} == {SIZES["demo-small"][1]["test_items"]}
    assert len(report["training"]) == SIZES["demo-small"][0]["train"]["max_steps"]
    assert report["certificate"]["passed"]
    masks = read_masks(results / "merged")
    assert len(masks) == 14
    assert all(abs(mask.float().mean().item() - 0.5) < 0.001 for mask in masks.values())


def test_two_sizes_at_once_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["demo", "--small", "--full"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--small or --full" in said


@pytest.mark.slow
def test_the_demo_runs_on_the_real_model(tmp_path: Path) -> None:
    assert run_command_line(["demo", "--small", "--workspace", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "demo-small" / "report.json").read_text())
    assert report["certificate"]["passed"]
