"""What a large GGUF file tells beside its weights is read once, and kept by content."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, LlamaConfig

from sqft.errors import ModelError
from sqft.models import gguf_description


def test_a_large_file_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf_description, "LARGE_BYTES", 1)
    monkeypatch.setattr(gguf_description, "read_gguf_header", lambda path: None)
    path = tmp_path / "model.gguf"
    path.write_bytes(b"one")
    reads: list[str] = []

    def config(*_: Any, gguf_file: str = "", **__: Any) -> Any:
        reads.append(gguf_file)
        return LlamaConfig(hidden_size=64)

    original = AutoConfig.from_pretrained
    monkeypatch.setattr(
        AutoConfig,
        "from_pretrained",
        lambda *a, **k: config(*a, **k) if "gguf_file" in k else original(*a, **k),
    )
    for _ in range(2):
        assert gguf_description.gguf_config(path).hidden_size == 64
    assert reads == ["model.gguf"]
    path.write_bytes(b"another")
    gguf_description.gguf_config(path)
    assert len(reads) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")  # where nothing can be kept
    assert gguf_description.gguf_config(path).hidden_size == 64


def test_a_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"none")
    for read in (gguf_description.gguf_config, gguf_description.gguf_tokenizer):
        with pytest.raises(ModelError, match=r"model\.gguf"):
            read(path)
