"""`sqft merge` from the command line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from sqft.cli import run_command_line
from sqft.models import load_model


@pytest.fixture
def arguments(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> list[str]:
    model = get_peft_model(
        load_model(tiny_model_dir()), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "adapter")
    base, adapter = str(tiny_model_dir()), str(tmp_path / "adapter")
    return ["merge", "--base", base, "--adapter", adapter, "--output", str(tmp_path / "out")]


def test_a_merge_goes_into_a_format(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command_line([*arguments, "--into", "safetensors-float32"]) == 0
    shown = capsys.readouterr().out
    for layer in range(2):
        assert f"model.layers.{layer}.self_attn.q_proj" in shown
    assert shown.index("plain rounding erases") < shown.index("rung round: loss not measured")
    assert "rung polish is skipped: needs calibration data" in shown
    assert (tmp_path / "out-safetensors-float32" / "sqft_export.json").is_file()


def test_a_merge_as_json(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"] == "round"
    assert len(found["erasure"]) == 2


def test_a_format_is_checked_before_the_work(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command_line([*arguments, "--into", "onnx"]) != 0
    assert "format 'onnx' is unknown" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_merge_into_16_bits_is_read_back(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command_line([*arguments, "--into", "safetensors", "--layers"]) == 0
    shown = capsys.readouterr().out
    assert f"exported: {tmp_path / 'out-safetensors'}, 0 codes changed" in shown
    merged, exported = (load_model(tmp_path / name) for name in ("out", "out-safetensors"))
    for name, weight in merged.state_dict().items():
        assert torch.equal(weight.float(), exported.state_dict()[name].float()), name


def test_only_the_worst_layers_are_shown_without_asking(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqft.cli.merge.WORST", 1)
    assert run_command_line(arguments) == 0
    shown = capsys.readouterr().out
    assert shown.count("self_attn.q_proj") == 1
    assert "mean of 2 layers (1 worst shown, all with --layers)" in shown
    assert run_command_line([*arguments, "--layers"]) == 0
    assert capsys.readouterr().out.count("self_attn.q_proj") == 2


def test_the_report_comes_as_the_ladder_is_climbed(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values: list[float] = []
    monkeypatch.setattr(
        "sqft.cli.merge._measurement",
        lambda *_: (torch.randint(4, 288, (4, 16)), lambda model: values.pop(0)),
    )
    values[:] = [1.0, 2.0, 1.5]
    assert run_command_line([*arguments, "--rungs", "round, feedback"]) == 0  # the adapter gained nothing
    shown = capsys.readouterr().out
    assert "loss of the base 1.0000, with the unmerged adapter 2.0000" in shown
    assert "gains nothing on these items, so that there is no retention" in shown
    assert "rung feedback is skipped: the base has no grid" in shown
    assert "rung round: loss 1.5000, retention undefined" in shown
    assert "chosen on the items that its retention was measured on" in shown
    record = json.loads((tmp_path / "out" / "sqft_merge.json").read_text())
    assert record["rungs"] == [{"name": "round", "loss": 1.5, "retention": None}]
    assert "chosen on the items" in record["note"]
    missing = ["merge", "--base", str(tmp_path / "none"), *arguments[3:], "--data", "items.jsonl"]
    assert run_command_line(missing) == 2
    assert "none is not a model directory: it has no config.json" in capsys.readouterr().err
    values[:] = [2.0, 1.0, 1.0]
    assert run_command_line([*arguments, "--rungs", "round,polish"]) == 0
    assert "rung polish is skipped: round retains enough" in capsys.readouterr().out
    values[:] = [2.0, 1.0, 1.9]
    assert run_command_line([*arguments, "--rungs", "round"]) != 0
    refused = capsys.readouterr()
    assert "plain rounding erases" in refused.out
    assert "rung round: loss 1.9000, retention 10.0%" in refused.out
    assert "merging would lose the adapter" in refused.err
    assert run_command_line([*arguments, "--rungs", "feedback"]) != 0
    assert "no rung fits a base without a grid" in capsys.readouterr().err


def test_the_report_goes_to_standard_output_beside_the_bars_of_a_terminal(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    assert run_command_line(arguments) == 0
    shown = capsys.readouterr().out
    assert "plain rounding erases" in shown
    assert "rung round: loss not measured" in shown
