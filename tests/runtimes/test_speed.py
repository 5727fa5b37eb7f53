"""`sqft bench` from the command line."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from sqft.cli import run_command_line
from sqft.errors import ExportError
from sqft.export import export_adapter, export_model
from sqft.runtimes.speed import open_artefact
from tests.export.test_adapter_export import write_adapter

SHORT = ["--prompt-tokens", "4", "--new-tokens", "3", "--rounds", "1", "--threads", "1"]


def rows(shown: str) -> dict[str, list[str]]:
    """The cells of every row that names a runtime."""
    cells = [re.split(r"\s{2,}", line.strip()) for line in shown.splitlines()]
    return {row[0]: row[1:] for row in cells if len(row) == 6 and row[0] != "artefact"}


def test_merged_and_unmerged_run_side_by_side(
    merged_dir: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("xllamacpp")
    write_adapter(merged_dir(), tmp_path / "adapter")
    export_model(merged_dir(), "gguf", tmp_path / "q4")
    export_adapter(tmp_path / "adapter", merged_dir(), "gguf", tmp_path / "lora")
    monkeypatch.setenv("COLUMNS", "160")
    command = ["bench", str(tmp_path / "q4"), str(merged_dir()), "--adapter", str(tmp_path / "lora"), *SHORT]
    assert run_command_line(command) == 0
    shown = capsys.readouterr().out
    found = rows(shown)
    assert [name for name in found] == ["q4", merged_dir().name, "q4 + lora (unmerged)"]
    for runtime, size, first, speed, peak in found.values():
        assert runtime in {"llama.cpp", "transformers"}
        assert re.fullmatch(r"[\d.]+ .?i?B", size)
        assert re.fullmatch(r"\d+ ms", first)
        assert float(speed) > 0
        assert re.fullmatch(r"[\d.]+ .?i?B", peak)
    zeros = [line for line in shown.splitlines() if line.startswith("zeros in ")]
    assert [line.split(":")[0] for line in zeros] == ["zeros in llama.cpp", "zeros in transformers"]


@pytest.mark.slow
def test_merged_and_unmerged_run_in_transformers(
    merged_dir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(merged_dir(), tmp_path / "adapter")
    command = ["bench", str(merged_dir()), "--adapter", str(tmp_path / "adapter"), *SHORT]
    assert run_command_line(command) == 0
    shown = capsys.readouterr().out
    assert "+ adapter (unmerged)" in shown
    assert shown.count("zeros in ") == 1


def test_an_adapter_of_another_runtime_is_refused(merged_dir: Callable[..., Path], tmp_path: Path) -> None:
    write_adapter(merged_dir(), tmp_path / "adapter")
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(ExportError, match=r"llama\.cpp needs an adapter in GGUF, .*--to gguf"):
        open_artefact(tmp_path / "model.gguf", None, tmp_path / "adapter")
    (tmp_path / "lora.gguf").write_bytes(b"")
    assert open_artefact(tmp_path / "model.gguf", None, tmp_path / "lora.gguf").adapter is not None
    with pytest.raises(ExportError, match="is not a PEFT adapter"):
        open_artefact(merged_dir(), None, tmp_path / "lora.gguf")
