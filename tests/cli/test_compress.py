import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sqft.cli import run_command_line


def test_compressing_alone_gives_a_model(
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("\n".join(f"{n} plus {n} is {2 * n}" for n in range(400)))
    settings = ["sparsify.sparsity=0.5", "quantize.group_size=32", "calibration.source=texts.txt"]
    settings += ["calibration.num_samples=8", "calibration.sequence_length=64"]
    assert run_command_line(["compress", str(tiny_model_dir("llama")), *settings]) == 0
    assert "runs/compressed/model" in capsys.readouterr().out
    config = json.loads((tmp_path / "runs/compressed/model/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert run_command_line(["inspect", "runs/compressed/model"]) == 0
    shown = capsys.readouterr().out
    assert "INT4, groups of 32, symmetric" in shown
    assert "50.0 %" in shown
    assert "2:4" not in shown
    layers = Path("runs/compressed/model/sqft_layers.json")
    record = json.loads(layers.read_text())
    assert record["recipe"]["calibration"]["source"] == "texts.txt"
    assert all(0 < row["error"] < 1 for row in record["layers"])
    layers.write_text(layers.read_text()[:-40])
    assert run_command_line(["inspect", "runs/compressed/model"]) == 2
    assert "sqft_layers.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["quantize.method=rtn", "quantize.group_size=32"]])
def test_inspecting_shows_the_pattern(
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["sparsify.method=magnitude", "sparsify.pattern=2:4", "sparsify.skip_modules=[layers.0.mlp.*]"]
    assert run_command_line(["compress", str(tiny_model_dir("llama")), *settings, *more]) == 0
    capsys.readouterr()
    assert run_command_line(["inspect", "--layers", "runs/compressed/model"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert any("pattern" in line for line in shown)
    patterns = {line.split()[0]: "2:4" in line for line in shown if "proj" in line}
    assert len(patterns) == 14
    assert {name for name, there in patterns.items() if not there} == {
        f"model.layers.0.mlp.{end}_proj" for end in ("gate", "up", "down")
    }


def test_compressing_to_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["compress", "model"]) == 2
    assert "say what to do" in capsys.readouterr().err
