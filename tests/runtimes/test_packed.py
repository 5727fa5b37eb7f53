"""Packed directories in transformers: opened, generating, and refused where they cannot run."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sqft.errors import ModelError
from sqft.formats.packed import pack_model
from sqft.kernels.packed_matrix import kernel_library
from sqft.kernels.reference import multiply_reference
from sqft.models import load_model, read_quantized
from sqft.runtimes import packed as runtime
from sqft.runtimes.packed import PackedLinear
from tests.merged_models import write_merge

Maker = Callable[..., Path]
IDS = torch.arange(4, 24)[None]


@pytest.fixture
def packed(tiny_model_dir: Maker, tmp_path: Path) -> Callable[..., Path]:
    def make(arch: str = "llama", **changes: Any) -> Path:
        merged = write_merge(tiny_model_dir(arch), tmp_path / "made", **changes).merged
        pack_model(merged, tmp_path / "packed")
        return tmp_path / "packed"

    return make


def open_packed(directory: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, **({"dtype": torch.float32} | options))


def linears(model: PreTrainedModel) -> dict[str, PackedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("llama", {"pattern": "16:32 window 2"}),
        ("llama", {"pattern": "4:16", "scale_bits": 11}),
        ("mistral", {"symmetric": False}),
        ("phi3", {"sparsity": 0.6}),
        ("llama", {"bits": 8, "sparsity": 0.4}),
    ],
)
def test_a_packed_model_says_what_the_model_says(
    packed: Callable[..., Path], arch: str, changes: dict[str, Any]
) -> None:
    directory = packed(arch, **changes)
    model, expected = open_packed(directory), load_model(directory)
    assert len(linears(model)) == len(read_quantized(directory)) > 0
    with torch.no_grad():
        found, wanted = model(IDS).logits, expected(IDS).logits
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()  # activations are rounded to 8 bits
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0)
    assert cosine > 0.999


def test_a_linear_computes_what_the_reference_does(packed: Callable[..., Path]) -> None:
    if kernel_library() is None:
        pytest.skip("there is no C compiler here")
    directory = packed(pattern="16:32 window 2")
    name = "model.layers.0.mlp.up_proj"
    layer, weight = linears(open_packed(directory))[name], read_quantized(directory)[name]
    assert layer.matrix is not None
    assert layer.matrix.layout == "window2"
    x = torch.randn(2, 3, layer.in_features)
    expected = multiply_reference(
        (weight.codes.int() - 8).to(torch.int8), weight.qparams.scale, 32, x.flatten(0, 1)
    )
    found = layer(x)
    assert found.shape == (2, 3, layer.out_features)
    assert (found.flatten(0, 1) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert not dict(layer.named_buffers())  # nothing is kept twice


def test_generation_with_its_options(packed: Callable[..., Path]) -> None:
    directory = packed(pattern="16:32 window 2")
    model, plain = open_packed(directory), load_model(directory)
    greedy = model.generate(IDS, max_new_tokens=6, do_sample=False)
    assert torch.equal(greedy[:, : IDS.shape[1]], IDS)
    with torch.no_grad():  # each token is one that the model itself finds (nearly) best
        for end in range(IDS.shape[1], greedy.shape[1]):
            logits = plain(greedy[:, :end]).logits[0, -1]
            assert logits[greedy[0, end]] > logits.max() - 0.1 * logits.abs().max()
    beams = model.generate(IDS.repeat(2, 1), max_new_tokens=4, num_beams=3, do_sample=False)
    assert torch.equal(beams[0], beams[1])
    torch.manual_seed(0)
    assert model.generate(IDS, max_new_tokens=4, do_sample=True, top_p=0.9).shape[1] <= IDS.shape[1] + 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
def test_scales_keep_their_bits_in_every_dtype(packed: Callable[..., Path], dtype: Any) -> None:
    if kernel_library() is None:
        pytest.skip("there is no C compiler here")
    directory = packed(scale_bits=11)  # float16 scales, which bfloat16 does not hold
    model, weights = open_packed(directory, dtype=dtype), read_quantized(directory)
    for name, layer in linears(model).items():
        assert layer.matrix is not None
        steps, scale = layer.matrix.unpack()
        assert torch.equal(steps.int(), weights[name].codes.int() - 8)
        assert torch.equal(scale, weights[name].qparams.scale)


def test_without_kernels_weights_are_dequantized(
    packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = packed(pattern="4:16")
    monkeypatch.setattr("sqft.kernels.packed_matrix.kernel_library", lambda: None)
    monkeypatch.setattr(runtime, "kernel_library", lambda: None)
    model = open_packed(directory)
    assert all(layer.matrix is None for layer in linears(model).values())
    with torch.no_grad():
        found, wanted = model(IDS).logits, load_model(directory)(IDS).logits
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_what_a_packed_model_cannot_do_is_refused(packed: Callable[..., Path], tmp_path: Path) -> None:
    directory = packed(pattern="16:32 window 2")
    model = open_packed(directory)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "saved")
    x = torch.randn(1, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradient"):
        next(iter(linears(model).values()))(x)
    with pytest.raises(ModelError, match="runs on the CPU"):
        open_packed(directory, device_map={"": "cuda:0"})
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"version": 1', '"version": 7'))
    with pytest.raises(ModelError, match="packed in version 7"):
        open_packed(directory)


def test_plain_transformers_does_not_open_it_with_random_weights(packed: Callable[..., Path]) -> None:
    directory = packed(pattern="16:32 window 2")
    script = (
        "from transformers import AutoModelForCausalLM\n"
        f"try: AutoModelForCausalLM.from_pretrained({str(directory)!r})\n"
        "except OSError as error: print('refused', error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "refused" in done.stdout, done.stdout + done.stderr
