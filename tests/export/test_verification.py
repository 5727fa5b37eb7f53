"""Damage to what was exported, whichever the format."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from sqft.cli import run_command_line
from sqft.export import export_model
from sqft.export.verification import check_export

Export = Callable[..., Path]


@pytest.fixture
def artefact(merged_dir: Callable[..., Path], tmp_path: Path) -> Export:
    def make(format: str, **changes: Any) -> Path:
        export_model(merged_dir(**changes), format, tmp_path / "artefact")
        return tmp_path / "artefact"

    return make


def failed(directory: Path, merged: Path | None = None) -> set[str]:
    return {finding.name for finding in check_export(directory, merged) if not finding.passed}


def flip(path: Path, name: str, mask: int) -> None:
    tensors = load_file(path)
    tensors[name].view(torch.int32 if tensors[name].dtype != torch.float16 else torch.int16)[0, 0] ^= mask
    save_file(tensors, path, metadata={"format": "pt"})


NAME = "model.layers.0.self_attn.v_proj"
DAMAGE: dict[str, tuple[str, Callable[[Path], Any], bool]] = {
    "gptq code": ("gptq", lambda d: flip(d / "model.safetensors", f"{NAME}.qweight", 1 << 4), True),
    "gptq scale": ("gptq", lambda d: flip(d / "model.safetensors", f"{NAME}.scales", 1), True),
    "gptq zero point": ("gptq", lambda d: flip(d / "model.safetensors", f"{NAME}.qzeros", 1), True),
    "code": (
        "compressed-tensors",
        lambda d: flip(d / "model.safetensors", f"{NAME}.weight_packed", 1 << 4),
        True,
    ),
    "tokenizer": ("gptq", lambda d: (d / "tokenizer.json").write_text("{}"), False),
    "masks": ("compressed-tensors", lambda d: (d / "sqft_masks.safetensors").write_bytes(b"0"), False),
    "truncated": (
        "gguf",
        lambda d: (d / "model.gguf").write_bytes((d / "model.gguf").read_bytes()[:-999]),
        True,
    ),
    "missing": ("gptq", lambda d: (d / "model.safetensors").unlink(), True),
    "added": ("gptq", lambda d: (d / "pytorch_model.bin").write_bytes(b"0"), False),
}


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_damage_is_caught(artefact: Export, merged_dir: Callable[..., Path], damage: str) -> None:
    format, change, in_codes = DAMAGE[damage]
    directory = artefact(format)
    assert not failed(directory, merged_dir())
    change(directory)
    assert failed(directory) == {"digests"}
    if in_codes:
        assert failed(directory, merged_dir()) == {"digests", "codes"}


def test_a_flipped_code_and_scale_in_gguf_are_caught(
    artefact: Export, merged_dir: Callable[..., Path]
) -> None:
    directory = artefact("gguf")
    path = directory / "model.gguf"
    tensor = next(t for t in GGUFReader(path).tensors if t.name == "blk.1.ffn_up.weight")
    for offset in (0, 5):
        data = bytearray(path.read_bytes())
        data[tensor.data_offset + offset] ^= 1
        damaged = directory.with_name(f"damaged{offset}")
        damaged.mkdir()
        for file in directory.iterdir():
            (damaged / file.name).write_bytes(file.read_bytes())
        (damaged / "model.gguf").write_bytes(data)
        assert failed(damaged, merged_dir()) == {"digests", "codes"}


def test_the_command_line_verifies_artefacts(
    artefact: Export, merged_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = artefact("gptq")
    assert run_command_line(["verify", str(directory), "--merged", str(merged_dir())]) == 0
    assert "export passed, 2 passed" in capsys.readouterr().out
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
