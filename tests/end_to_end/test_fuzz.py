"""A short round of broken files, and the minimal cases of what longer rounds found."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sqft.cli import run_command_line

ROOT = Path(__file__).parents[2]
QUICK = ("recipes", "data", "safetensors", "configs", "adapters")  # begin with nothing but a tiny model


def round_of(module: str, tmp_path: Path, *options: str) -> dict[str, Any]:
    """The results of a round of a campaign in a process of its own."""
    output = tmp_path / "round.json"
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        f"benchmarks.{module}",
        "--threads",
        "1",
        "--json",
        str(output),
        *options,
    ]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    results: dict[str, Any] = json.loads(output.read_text())["results"]
    return results


@pytest.mark.parametrize(
    ("kinds", "seconds", "seed"),
    [(QUICK, 5, 1), pytest.param((), 600, 2, marks=pytest.mark.slow)],
)
def test_broken_files_end_right_or_in_one_line(
    kinds: tuple[str, ...], seconds: int, seed: int, tmp_path: Path
) -> None:
    named = [word for kind in kinds for word in ("--only", kind)]
    results = round_of("fuzz", tmp_path, "--seconds", str(seconds), "--seed", str(seed), *named)
    assert sum(result["tries"] for result in results.values()) > 0
    assert [bad for result in results.values() for bad in result["bad"]] == []


@pytest.mark.slow
@pytest.mark.parametrize("module", ["tampering", "payloads"])
def test_damage_edits_and_planted_code_are_told(module: str, tmp_path: Path) -> None:
    options = ("--seconds", "600") if module == "tampering" else ()
    results = round_of(module, tmp_path, *options)
    assert [bad for result in results.values() for bad in result["bad"]] == []


@pytest.fixture
def refused(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """`refused(name, change)`: the line that a run ends with whose model has this file changed."""

    def run(name: str = "", change: Callable[[str], str] = str, content: str = "") -> str:
        model = tmp_path / "model"
        model.mkdir()
        for path in tiny_model_dir("llama").iterdir():
            (model / path.name).write_bytes(path.read_bytes())
        if name:
            (model / name).write_text(change((model / name).read_text()))
        items = [json.dumps({"question": f"what is {i}?", "answer": str(i)}) for i in range(20)]
        (tmp_path / "train.jsonl").write_text(content + "\n".join(items))
        values = {
            "model": str(model),
            "data": {"train": str(tmp_path / "train.jsonl"), "prompt": "{question}"},
            "sparsify": {"method": "magnitude"},
            "runtime": {"workspace": str(tmp_path / "runs"), "device": "cpu"},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        assert run_command_line(["run", str(tmp_path / "recipe.yaml")]) == 2
        said = capsys.readouterr().err.splitlines()
        (line,) = [line for line in said if line.startswith("sqft: ") and "WARNING" not in line]
        return line

    return run


def changed(**values: Any) -> Callable[[str], str]:
    return lambda text: json.dumps(json.loads(text) | values)


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("tokenizer_config.json", {"model_max_length": "a"}, "tokenizer"),
        ("generation_config.json", {"max_new_tokens": "a"}, "generation_config.json"),
        ("config.json", {"dtype": 5}, "config.json"),
        ("config.json", {"quantization_config": {"config_groups": [1]}}, "quantization_config"),
        ("config.json", {"quantization_config": {"config_groups": {"a": {"weights": 3}}}}, "config"),
    ],
)  # fmt: skip
def test_settings_of_a_wrong_kind(
    name: str, values: dict[str, Any], words: str, refused: Callable[..., str]
) -> None:
    assert words in refused(name, changed(**values))


@pytest.mark.parametrize("answer", ['"\\ud800"', "Infinity"])
def test_texts_that_no_file_can_hold_again_and_numbers_that_are_none(
    answer: str, refused: Callable[..., str]
) -> None:
    assert "train.jsonl:1: not JSON" in refused(content=f'{{"question": "a", "answer": {answer}}}\n')
