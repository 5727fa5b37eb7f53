"""`sqft pack`, `sqft unpack` and what other commands make of a packed directory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sqft.artifacts import digest_files
from sqft.certificate import write_certificate
from sqft.certificate.reference import write_reference
from sqft.cli import run_command_line
from sqft.models import load_model
from tests.merged_models import write_merge

Maker = Callable[..., Path]


@pytest.fixture
def merged(tiny_model_dir: Maker, tmp_path: Path) -> Path:
    directory = write_merge(tiny_model_dir("llama"), tmp_path / "made", pattern="16:32 window 2").merged
    items = [list(range(4, 24)), [9, 200, 7]]
    write_reference(directory, load_model(directory, dtype=torch.float32), items)
    write_certificate(directory, [])
    return directory


def succeed(*arguments: Any) -> None:
    assert run_command_line([str(argument) for argument in arguments]) == 0


def test_there_and_back(merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    succeed("pack", merged)
    packed = merged.with_name("merged-packed")
    shown = capsys.readouterr().out
    assert "50.0% of their weights kept" in shown
    assert "every file comes back bit for bit" in shown
    succeed("unpack", packed, "--output", tmp_path / "back")
    assert digest_files(tmp_path / "back") == digest_files(merged)
    succeed("verify", tmp_path / "back")

    capsys.readouterr()
    succeed("verify", packed)
    assert "pack passed, 3 passed, 0 failed" in capsys.readouterr().out
    succeed("inspect", packed)
    shown = capsys.readouterr().out
    assert "16:32 window 2" in shown
    assert "INT4, groups of 32, symmetric" in shown
    path = packed / "packed.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert run_command_line(["verify", str(packed)]) == 1
    assert "packed.safetensors is truncated or was changed" in capsys.readouterr().out
    assert run_command_line(["unpack", str(packed), "--output", str(tmp_path / "no")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "no").exists()


def test_unpacking_to_a_format(merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    succeed("pack", merged, "--output", tmp_path / "packed")
    succeed("unpack", tmp_path / "packed", "--to", "compressed-tensors", "--output", tmp_path / "tensors")
    assert "codes changed" in capsys.readouterr().out
    succeed("verify", tmp_path / "tensors", "--merged", merged)
    succeed("export", tmp_path / "packed", "--to", "safetensors-float32", "--output", tmp_path / "plain")
    assert run_command_line(["unpack", str(tmp_path / "packed"), "--to", "floppy"]) == 2
    assert "choose from original, packed, compressed-tensors" in capsys.readouterr().err
    assert run_command_line(["unpack", str(tmp_path / "packed"), "--to", "packed"]) == 2
    assert "it can be used as it is" in capsys.readouterr().err


def test_the_download_form(merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("zstandard")
    succeed("pack", merged, "--output", tmp_path / "packed")
    succeed("pack", merged, "--zstd", "--output", tmp_path / "small")
    assert (tmp_path / "small" / "packed.safetensors.zst").is_file()
    assert not (tmp_path / "small" / "packed.safetensors").exists()
    succeed("unpack", tmp_path / "small", "--output", tmp_path / "back")
    assert digest_files(tmp_path / "back") == digest_files(merged)
    succeed("unpack", tmp_path / "small", "--to", "packed", "--output", tmp_path / "again")
    assert digest_files(tmp_path / "again") == digest_files(tmp_path / "packed")
    succeed("unpack", tmp_path / "small", "--to", "safetensors", "--output", tmp_path / "plain")
    path = tmp_path / "small" / "packed.safetensors.zst"
    whole = path.read_bytes()
    flipped = bytes([*whole[:900], whole[900] ^ 16, *whole[901:]])
    for damaged in (whole[:-9], flipped, b"", whole[:3]):
        path.write_bytes(damaged)
        capsys.readouterr()
        assert run_command_line(["unpack", str(tmp_path / "small"), "--output", str(tmp_path / "no")]) == 2
        assert "fetch it again" in capsys.readouterr().err
        assert not (tmp_path / "no").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "back", "made", "packed", "plain", "small"]


def test_the_download_form_needs_its_extra(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    assert run_command_line(["pack", str(merged), "--zstd", "--output", str(tmp_path / "no")]) == 2
    assert "sqft[zstd]" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
