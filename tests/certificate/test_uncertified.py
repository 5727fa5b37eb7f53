"""`sqft verify` on models that no certificate is about, and on one that has lost its own."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sqft.artifacts import CERTIFICATE, FACTS, write_json
from sqft.cli import run_command_line
from sqft.directories import new_directory
from tests.merged_models import MergedDirectories


def verify(directory: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """(exit code, what it printed, its one line on stderr)."""
    code = run_command_line(["verify", str(directory)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_nothing_to_verify_is_said_in_a_line(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_model_dir("llama")
    code, out, line = verify(source, capsys)
    assert (code, out) == (2, "")
    assert "carries no certificate" in line
    assert "sqft did not write it" in line

    with new_directory(tmp_path / "model") as partial:  # as `tune` and compression leave it
        for path in source.iterdir():
            shutil.copyfile(path, partial / path.name)
    code, out, line = verify(tmp_path / "model", capsys)
    assert (code, out) == (2, "")
    assert "its files are as sqft wrote them" in line

    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, out, line = verify(tmp_path / "model", capsys)
    assert (code, line) == (1, "")
    assert "FAILED  files  model.safetensors is not as sqft wrote it" in out


def test_a_merge_without_its_certificate_fails(
    merge_copy: Callable[..., MergedDirectories], capsys: pytest.CaptureFixture[str]
) -> None:
    merged = merge_copy().merged
    assert not (merged / CERTIFICATE).exists()
    write_json(merged / FACTS, {"kind": "merged"})
    code, out, _ = verify(merged, capsys)
    assert code == 1
    assert "FAILED  record" in out
