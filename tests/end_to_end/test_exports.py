"""A recipe's export section: the merged model in the formats of runtimes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sqft.cli import run_command_line


def test_a_recipe_exports_what_it_merged(
    tiny_model_dir: Callable[..., Path],
    recipe_values: Callable[..., dict[str, Any]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    values = recipe_values("qa_sparse_peft", tiny_model_dir("llama"))
    values["quantize"] = {"method": "rtn", "target": "gguf-q4_0"}
    values["search"] = {"method": "median"}
    values["export"] = {"formats": ["gptq", "compressed-tensors"]}
    values.pop("evaluate")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    assert run_command_line(["run", str(recipe)]) == 0, capfd.readouterr().err
    records = [json.loads(path.read_text()) for path in (tmp_path / "runs").rglob("sqft_export.json")]
    assert sorted(record["format"] for record in records) == ["compressed-tensors", "gptq"]
    assert all(record["code_comparison"]["changed"] == 0 for record in records)
    cards = [path for path in (tmp_path / "runs" / "stages").glob("export-*/README.md")]
    assert len(cards) == 2
    assert "recomputed" in cards[0].read_text()
    assert '"target": "gguf-q4_0"' in cards[0].read_text()
    assert ".partial" not in cards[0].read_text()
