import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from sqft.errors import ExportError, ModelError
from sqft.export import FORMATS, ExportResult, export_model
from sqft.export.fidelity import compare_codes
from sqft.export.verification import check_export
from sqft.formats.weights import ExportSource, open_source
from sqft.models import load_model
from sqft.sections import QuantizeSection

MergedDir = Callable[..., Path]
RUNTIMES = {"gguf": "xllamacpp", "openvino": "openvino"}
GENAI = """
import json, sys
import numpy, openvino, openvino_genai
options = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
pipeline = openvino_genai.LLMPipeline(sys.argv[1], "CPU", **options)
prompt = openvino.Tensor(numpy.array(json.loads(sys.argv[2])))
print(list(pipeline.generate(prompt, max_new_tokens=6, do_sample=False).tokens[0]))
"""
# torch's tracer warns of every Python branch in transformers' masks and of its own deprecation.
pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:openvino"),
]


def export(directory: Path, format: str, tmp_path: Path, **options: Any) -> ExportResult:
    if format in RUNTIMES:
        pytest.importorskip(RUNTIMES[format])
    return export_model(directory, format, tmp_path / "artefact", **options)


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "safetensors", "gguf"])
@pytest.mark.parametrize("arch", ["llama", "mistral", "phi3"])
def test_no_code_changes_in_any_format(merged_dir: MergedDir, tmp_path: Path, arch: str, format: str) -> None:
    result = export(merged_dir(arch), format, tmp_path)
    assert result.code_comparison.changed == 0
    assert result.code_comparison.weights_changed == 0
    assert result.code_comparison.codes + result.code_comparison.weights > 70_000
    logits = result.logit_comparison
    assert (logits is None) == (format == "gptq")
    if logits is not None:
        assert logits.kl < (1e-3 if format == "gguf" else 1e-6)
        assert logits.largest_share is None or logits.largest_share < 1e-5
    assert result.damage is None
    assert result.serve
    assert (tmp_path / "artefact" / "README.md").is_file()
    assert json.loads((tmp_path / "artefact" / "sqft_export.json").read_text())["format"] == format


INTEGER_TYPES = {"Q4_0", "Q4_1", "Q8_0", "u4", "i4", "u8", "i8", "int32"}  # that codes may be stored in


@pytest.mark.parametrize(
    ("format", "changes", "kinds"),
    [
        ("gguf", {"group_size": 64}, {"Q4_0"}),
        ("gguf", {"symmetric": False, "scale_bits": 7}, {"Q4_1"}),
        ("gguf", {"symmetric": False}, {"Q4_1", "Q8_0"}),
        ("gguf", {"bits": 3, "symmetric": False}, {"Q4_0"}),
        ("gguf", {"bits": 8}, {"Q8_0"}),
        ("gptq", {"symmetric": False}, {"int32"}),
        ("gptq", {"bits": 8, "group_size": -1}, {"int32"}),
        ("gptq", {"bits": 3}, {"int32"}),
        ("openvino", {"arch": "phi3", "symmetric": False, "group_size": 64}, {"u4"}),
        ("openvino", {}, {"i4"}),
        ("safetensors", {"bits": 3}, {"float16"}),
        ("safetensors-float32", {"symmetric": False}, {"float32"}),
        ("compressed-tensors", {"symmetric": False, "bits": 2}, {"int32"}),
    ],
)
def test_other_grids_are_exact_too(
    merged_dir: MergedDir, tmp_path: Path, format: str, changes: dict[str, Any], kinds: set[str]
) -> None:
    directory = merged_dir(**changes)
    result = export(directory, format, tmp_path)
    assert result.code_comparison.changed == result.code_comparison.weights_changed == 0
    assert set(result.tensor_types) & INTEGER_TYPES == kinds & INTEGER_TYPES
    assert kinds <= set(result.tensor_types)


@pytest.mark.parametrize("format", ["safetensors", "gguf", "openvino"])
def test_a_sparse_model_keeps_its_weights(merged_dir: MergedDir, tmp_path: Path, format: str) -> None:
    result = export(merged_dir("mistral", quantized=False), format, tmp_path)
    assert result.code_comparison.weights_changed == 0
    assert result.logit_comparison is not None
    assert result.logit_comparison.kl < 1e-4


def test_what_a_format_cannot_hold_is_refused(merged_dir: MergedDir, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"groups of 16 .*formats that can: compressed-tensors, gptq"):
        export(merged_dir(group_size=16), "gguf", tmp_path)
    with pytest.raises(ExportError, match="exact in neither float16 nor bfloat16; formats"):
        export(merged_dir(bits=8), "safetensors", tmp_path)
    with pytest.raises(ExportError, match="not on an integer grid"):
        export(merged_dir(quantized=False), "gptq", tmp_path, allow_requantize=True)
    with pytest.raises(ExportError, match="unknown; choose from compressed-tensors"):
        export(merged_dir(), "onnx", tmp_path)
    with pytest.raises(ModelError):
        export(tmp_path, "gguf", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("format", "changes"), [("gguf", {"group_size": 16}), ("safetensors", {"bits": 8})])
def test_requantizing_reports_the_damage(
    merged_dir: MergedDir, tmp_path: Path, format: str, changes: dict[str, Any]
) -> None:
    damage = export(merged_dir(**changes), format, tmp_path, allow_requantize=True).damage
    assert damage is not None
    assert damage.changed > 0
    assert 0 < damage.relative_error < 0.2
    assert damage.zeros_lost == 0
    assert "moved to another grid" in (tmp_path / "artefact" / "README.md").read_text()


def test_the_head_may_be_smaller_and_is_named(merged_dir: MergedDir, tmp_path: Path) -> None:
    result = export(merged_dir(), "gguf", tmp_path, head_type="q8_0")
    assert result.head_type == "token_embd.weight Q8_0, output.weight Q8_0"
    assert result.code_comparison.changed == 0
    assert result.code_comparison.weights_changed > 0
    with pytest.raises(ExportError, match="head type 'q2' is unknown"):
        export(merged_dir(), "gguf", tmp_path, head_type="q2")


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "safetensors", "openvino"])
def test_a_head_type_switches_no_check_off(merged_dir: MergedDir, tmp_path: Path, format: str) -> None:
    with pytest.raises(ExportError, match="a head type is for gguf only"):
        export(merged_dir(), format, tmp_path, head_type="q8_0")
    with pytest.raises(ExportError, match=r"'q2' is unknown; choose from auto, f16, bf16, f32, q8_0"):
        export(merged_dir(), format, tmp_path, head_type="q2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("head", ["q8_0", "f16"])
def test_only_embedding_and_head_may_be_rounded(
    merged_dir: MergedDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    directory = merged_dir("mistral", quantized=False)
    export(directory, "gguf", tmp_path, head_type=head)
    whole = FORMATS["gguf"]
    victims: list[str] = []

    def read(source: ExportSource, place: Path) -> Any:
        for name, value in whole.read(source, place):
            yield name, value + 1 if name in victims and isinstance(value, torch.Tensor) else value

    monkeypatch.setitem(FORMATS, "gguf", replace(whole, read=read))
    expected = {
        "model.layers.0.mlp.up_proj.weight": "weights differ",
        "model.embed_tokens.weight": f"embed_tokens.weight is not the model's, rounded to {head}",
    }
    for victim, message in expected.items():
        victims[:] = [victim]
        with pytest.raises(ExportError, match=message):
            export(directory, "gguf", tmp_path, head_type=head)
        (found,) = [f for f in check_export(tmp_path / "artefact", directory) if not f.passed]
        assert found.name == "codes"


def test_a_rounded_head_is_bounded_in_kl(
    merged_dir: MergedDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqft.export.model_export.LARGEST_KL", 1e-9)
    with pytest.raises(ExportError, match=r"KL of .* nats \(allowed 1e-09\); gguf was not written"):
        export(merged_dir(), "gguf", tmp_path, head_type="q8_0")


def test_a_changed_code_in_an_artefact_is_counted(merged_dir: MergedDir, tmp_path: Path) -> None:
    directory = merged_dir(symmetric=False)
    export(directory, "gptq", tmp_path)
    path = tmp_path / "artefact" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.qweight"][1, 1] ^= 1 << 8
    tensors["model.layers.1.mlp.up_proj.qzeros"][0, 0] ^= 1
    save_file(tensors, path)
    source = open_source(directory)
    compared = compare_codes(source, FORMATS["gptq"].read(source, tmp_path / "artefact"))
    assert compared.changed == 1 + 32


def test_a_missing_tensor_in_an_artefact_is_told(merged_dir: MergedDir, tmp_path: Path) -> None:
    export(merged_dir(), "gptq", tmp_path)
    path = tmp_path / "artefact" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.scales"]
    save_file(tensors, path)
    source = open_source(merged_dir())
    with pytest.raises(ExportError, match=r"lacks model.layers.0.mlp.up_proj.scales"):
        list(FORMATS["gptq"].read(source, tmp_path / "artefact"))


@pytest.mark.parametrize(
    ("values", "grid"),
    [
        ({"target": "gguf-q4_0"}, (4, True, 32)),
        ({"target": "gguf-q4_0", "group_size": 64}, (4, True, 64)),
        ({"target": "gguf-q4_1"}, (4, False, 32)),
        ({"target": "gguf-q8_0"}, (8, True, 32)),
        ({}, (4, True, 64)),
    ],
)
def test_a_target_fixes_the_grid(values: dict[str, Any], grid: tuple[int, bool, int]) -> None:
    section = QuantizeSection(**values)
    assert (section.bits, section.symmetric, section.group_size) == grid


@pytest.mark.parametrize(
    "values", [{"symmetric": False}, {"bits": 8}, {"group_size": 16}, {"group_size": -1}]
)
def test_a_grid_that_a_target_cannot_hold_is_refused_at_once(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="target gguf-q4_0 needs"):
        QuantizeSection(target="gguf-q4_0", **values)


def test_openvino_genai_runs_what_was_written(merged_dir: MergedDir, tmp_path: Path) -> None:
    pytest.importorskip("openvino_genai")
    directory = merged_dir()
    export(directory, "openvino", tmp_path)
    model = load_model(directory)
    prompt = torch.tensor([[5, 9, 200, 7, 30]])
    # In a process of its own: what it leaves behind does not survive a SIGTERM that another test sends.
    command = [sys.executable, "-c", GENAI, str(tmp_path / "artefact"), str(prompt.tolist())]
    # The limit that oneDNN's variable sets reaches OpenVINO's kernels but not its choice among them.
    environment = {name: value for name, value in os.environ.items() if name != "ONEDNN_MAX_CPU_ISA"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False)[0, 5:].tolist()
    assert json.loads(done.stdout) == expected
