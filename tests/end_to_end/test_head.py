"""`quantize.head`: embedding and head on a grid of 8 bits, trained through, certified, exported, packed."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import sqft.runtimes.packed
from sqft.artifacts import digest_files
from sqft.certificate import check_integrity, check_provenance
from sqft.cli import run_command_line
from sqft.errors import CompressionError
from sqft.export import export_model
from sqft.formats.packed import pack_model, unpack_model
from sqft.kernels.packed_matrix import kernel_library
from sqft.models import load_model, load_trainable, open_checkpoint
from sqft.ops.head_grid import head_codes
from sqft.pipeline import RunResult, parse_recipe, plan_recipe, run_recipe

EMBEDDING = "model.embed_tokens.weight"
IDS = torch.arange(4, 24)[None]
pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:openvino"),
]


@pytest.fixture
def values(
    recipe_values: Callable[..., dict[str, Any]], tiny_model_dir: Callable[..., Path]
) -> Callable[..., dict[str, Any]]:
    def make(**config: Any) -> dict[str, Any]:
        made = recipe_values("qa_sparse_peft", tiny_model_dir("llama", **config))
        made["sparsify"] = {"method": "wanda", "pattern": "16:32 window 2"}
        made["quantize"] = {"method": "rtn", "target": "gguf-q4_0", "head": "int8"}
        made["adapters"] = {"method": "scales"}
        made["train"] = {"max_steps": 2, "batch_size": 4}
        del made["search"], made["evaluate"]
        return made

    return make


@pytest.fixture(scope="module")
def runs() -> dict[bool, RunResult]:
    return {}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def run(
    request: pytest.FixtureRequest, values: Callable[..., dict[str, Any]], runs: dict[bool, RunResult]
) -> RunResult:
    """A tiny model whose embedding is its head, and one with a head of its own; do not write into it."""
    if request.param not in runs:
        runs[request.param] = run_recipe(parse_recipe(values(tie_word_embeddings=request.param)))
    return runs[request.param]


def test_what_was_trained_on_is_what_every_format_holds(run: RunResult, tmp_path: Path, capsys: Any) -> None:
    assert run.model_dir is not None
    assert run.base_dir is not None
    assert run.adapter_dir is not None
    merged, base = open_checkpoint(run.model_dir), open_checkpoint(run.base_dir)
    heads = [name for name in (EMBEDDING, "lm_head.weight") if name in merged.names]
    trained_on = load_trainable(run.base_dir).state_dict()
    for name in heads:
        assert merged.dtype(name) == torch.float16
        assert head_codes(merged.tensor(name)) is not None
        assert torch.equal(merged.tensor(name), base.tensor(name))
        assert torch.equal(merged.tensor(name).float(), trained_on[name])
    assert all(check.passed for check in check_provenance(run.model_dir, run.base_dir, run.adapter_dir))
    codes = next(check for check in check_integrity(run.model_dir) if check.name == "codes")
    assert EMBEDDING in codes.detail

    types = {"compressed-tensors": "float16", "gptq": "float16", "gguf": "Q8_0", "openvino": "i8"}
    for format, kind in types.items():
        result = export_model(run.model_dir, format, tmp_path / format)
        assert result.code_comparison.changed == result.code_comparison.weights_changed == 0
        assert result.head_type.count(f" {kind}") == len(heads), result.head_type

    packed, unpacked = tmp_path / "packed", tmp_path / "unpacked"
    pack_model(run.model_dir, packed)
    unpack_model(packed, unpacked)
    assert digest_files(unpacked) == digest_files(run.model_dir)
    with safe_open(packed / "packed.safetensors", framework="pt") as file:
        assert file.get_tensor("model.embed_tokens.byte_steps").dtype == torch.int8
        assert EMBEDDING not in file.keys()  # noqa: SIM118
    expected = load_model(run.model_dir)(IDS).logits
    assert torch.equal(load_model(packed)(IDS).logits, expected)
    assert export_model(packed, "gguf", tmp_path / "from-packed").code_comparison.weights_changed == 0
    assert run_command_line(["inspect", str(packed)]) == 0
    assert "INT8, groups of 32" in capsys.readouterr().out


@pytest.mark.parametrize("compiled", [True, False])
def test_transformers_computes_from_the_steps(
    run: RunResult, tmp_path: Path, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr("sqft.kernels.packed_matrix.kernel_library", lambda: None)
        monkeypatch.setattr(sqft.runtimes.packed, "kernel_library", lambda: None)
    elif kernel_library() is None:
        pytest.skip("there is no C compiler here")
    assert run.model_dir is not None
    pack_model(run.model_dir, tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    plain = load_model(run.model_dir)
    with torch.no_grad():
        assert torch.equal(model.get_input_embeddings()(IDS), plain.get_input_embeddings()(IDS))
        found, expected = model(IDS).logits, plain(IDS).logits
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()  # activations are rounded to 8 bits
    assert not [name for name, _ in model.named_parameters() if "norm" not in name]  # nothing is kept twice
    generated = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated[:, : IDS.shape[1]], IDS)
    with pytest.raises(IndexError):
        model(torch.tensor([[10_000]]))


def test_a_head_off_its_grid_is_no_certified_model(run: RunResult, tmp_path: Path) -> None:
    assert run.model_dir is not None
    shutil.copytree(run.model_dir, tmp_path / "damaged")
    path = tmp_path / "damaged" / "model.safetensors"
    tensors = load_file(path)
    tensors[EMBEDDING][3, :4] = torch.tensor([0.1, 0.2001, 0.3, 0.7])
    save_file(tensors, path, metadata={"format": "pt"})
    failed = {check.name: check.detail for check in check_integrity(path.parent) if not check.passed}
    assert f"1 groups of {EMBEDDING} are on no grid of 8 bits" in failed["codes"]


def test_what_has_no_grid_is_refused_before_the_run(values: Callable[..., dict[str, Any]]) -> None:
    made = values(hidden_size=80, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2)
    made["sparsify"] = {"method": "wanda", "sparsity": 0.5}
    made["quantize"] = {"method": "rtn", "group_size": 16, "head": "int8"}
    with pytest.raises(CompressionError, match=f"{EMBEDDING} has a width of 80"):
        plan_recipe(parse_recipe(made))
    made["quantize"]["head"] = "int4"
    with pytest.raises(Exception, match=r"quantize\.head"):
        parse_recipe(made)
