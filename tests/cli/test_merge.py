"""`sqft merge` from the command line."""

from collections.abc import Callable
from pathlib import Path

import pytest
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
    assert "rung polish was skipped: needs calibration data" in shown
    assert (tmp_path / "out-safetensors-float32" / "sqft_export.json").is_file()


def test_a_format_is_checked_before_the_work(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command_line([*arguments, "--into", "onnx"]) != 0
    assert "format 'onnx' is unknown" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
