"""Every family that GGUF files are written of computes in llama.cpp what it computes in transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarks.families import FAMILIES as MODELS

from sqft.compression import quantize_model
from sqft.errors import ExportError
from sqft.export import export_model
from sqft.formats.gguf_families import FAMILIES
from sqft.models import CheckpointWriter, open_checkpoint
from sqft.sections import QuantizeSection

RTN = QuantizeSection(method="rtn", bits=4, group_size=32)


def quantize(directory: Path, target: Path) -> Path:
    source = open_checkpoint(directory)
    writer = CheckpointWriter(target, source)
    quantize_model(source, None, RTN, None, writer)
    writer.close()
    return target


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_llama_cpp_computes_the_same(
    family: str, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    directory = quantize(tiny_model_dir(family, **MODELS[family]), tmp_path / "int4")
    result = export_model(directory, "gguf", tmp_path / "gguf")
    assert result.code_comparison.changed == result.code_comparison.weights_changed == 0
    assert result.code_comparison.codes > 50_000
    assert result.logit_comparison is not None
    assert result.logit_comparison.kl < 4e-4


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gemma2", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar 24"),
    ("gemma2", {"layer_types": ["full_attention"] * 2}, "1 of every 2"),
    ("gemma3_text", {"layer_types": ["full_attention"] * 6}, "5 of every 6"),
    ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "layers without positions"),
    ("starcoder2", {"hidden_act": "silu"}, "the activation silu"),
    ("bloom", {}, "the architecture bloom"),
]


@pytest.mark.parametrize(("family", "changes", "reason"), REFUSED)
def test_what_is_compiled_into_llama_cpp_is_not_written_otherwise(
    family: str, changes: dict[str, Any], reason: str, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    directory = quantize(tiny_model_dir(family, **(MODELS[family] | changes)), tmp_path / "int4")
    with pytest.raises(ExportError, match=reason):
        export_model(directory, "gguf", tmp_path / "gguf")
