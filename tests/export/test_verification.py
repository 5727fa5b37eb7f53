"""`sqft verify`, `sqft export` and their errors, from the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sqft.cli import run_command_line
from sqft.export import export_model

Export = Callable[..., Path]


@pytest.fixture
def artefact(merged_dir: Callable[..., Path], tmp_path: Path) -> Export:
    def make(format: str, **changes: Any) -> Path:
        export_model(merged_dir(**changes), format, tmp_path / "artefact")
        return tmp_path / "artefact"

    return make


def test_the_command_line_verifies_artefacts(
    artefact: Export, merged_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = artefact("gptq")
    assert run_command_line(["verify", str(directory), "--merged", str(merged_dir())]) == 0
    assert "export passed, 5 passed" in capsys.readouterr().out
    (directory / "tokenizer.json").write_text("{}")
    assert run_command_line(["verify", str(directory)]) == 1
    assert run_command_line(["verify", str(merged_dir()), "--merged", str(merged_dir())]) == 2


def test_the_command_line_exports_and_tells_what_is_wrong(
    merged_dir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["export", str(merged_dir()), "--to", "gptq", "--output", str(out)]
    assert run_command_line(arguments) == 0
    assert "codes changed" in capsys.readouterr().out
    assert run_command_line([*arguments[:3], "onnx"]) == 2
    assert "choose from compressed-tensors" in capsys.readouterr().err
    assert run_command_line(["bench", str(tmp_path)]) == 2
    merge = [
        "merge",
        "--base",
        str(merged_dir()),
        "--adapter",
        str(tmp_path),
        "--output",
        str(tmp_path / "m"),
    ]
    assert run_command_line(merge) == 2
    assert "not a PEFT adapter" in capsys.readouterr().err
