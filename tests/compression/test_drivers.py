"""sparsify_model and quantize_model over whole tiny models."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.compression.tiny_runs import quantize, sparsify, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from sqft.compression import quantize_model, sparsify_model
from sqft.compression.sparsify import METHODS as SPARSIFIERS
from sqft.compression.statistics import Hessian
from sqft.compression.walk import BlockWalk
from sqft.errors import CompressionError, ModelError
from sqft.models import (
    CheckpointWriter,
    load_model,
    load_trainable,
    open_checkpoint,
    read_latents,
    read_masks,
    read_quantized,
    target_linears,
)
from sqft.ops import dequantize, latent_codes
from sqft.ops.pattern import fits_pattern
from sqft.sections import QuantizeSection, SparsifySection

ALL = ["llama", "mistral", "phi3", "qwen2", "qwen3", "gemma2"]
Maker = Callable[..., Path]


@pytest.mark.parametrize("arch", ALL)
def test_walk_sees_what_the_model_sees(tiny_model_dir: Maker, arch: str) -> None:
    """Block by block from meta gives the hidden states of the whole model, also across batch sizes."""
    directory = tiny_model_dir(arch)
    calibration = tokens(rows=11, length=700)
    walk = BlockWalk(open_checkpoint(directory), calibration)
    model = load_model(directory)
    states = model(calibration, output_hidden_states=True).hidden_states
    assert torch.allclose(torch.cat(walk.hidden), states[0], atol=1e-5)
    walk.load("model.layers.0")
    walk.advance("model.layers.0")
    walk.unload("model.layers.0")
    assert torch.allclose(torch.cat(walk.hidden), states[1], atol=1e-5)
    walk.load("model.layers.1")
    assert all(p.device.type == "meta" for p in walk.blocks["model.layers.0"].parameters())


def test_linears_that_read_the_same_tensor_share_a_statistic(tiny_model_dir: Maker) -> None:
    directory = tiny_model_dir("llama")
    walk = BlockWalk(open_checkpoint(directory), tokens())
    block = walk.load("model.layers.0")
    linears = target_linears(block, None, [], prefix="model.layers.0")
    groups = walk.collect("model.layers.0", walk.input_groups("model.layers.0", linears), Hessian)
    ends = [[name.rsplit(".", 1)[-1] for name in group.names] for group in groups]
    assert ends == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    seen: list[Tensor] = []
    model = load_model(directory)
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, i: seen.append(i[0]))
    model(tokens()[:-1])  # the last sequence is held out
    x = seen[0].flatten(0, 1)
    assert torch.allclose(groups[3].statistic.matrix(), x.T @ x / len(x), rtol=1e-3, atol=1e-6)
    assert groups[3].statistic.num_tokens == 9 * 24


@pytest.mark.parametrize("arch", ALL)
@pytest.mark.parametrize("method", sorted(SPARSIFIERS))
def test_every_architecture_becomes_sparse(
    tiny_model_dir: Maker, tmp_path: Path, arch: str, method: str
) -> None:
    reports = sparsify(tiny_model_dir(arch), tmp_path / "out", method=method, sparsity=0.6)
    masks = read_masks(tmp_path / "out")
    assert sorted(r.name for r in reports) == sorted(masks)
    assert len(masks) == 2 * (4 if arch == "phi3" else 7)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    pruned = total = 0
    for name, mask in masks.items():
        assert torch.equal(model.get_submodule(name).weight != 0, mask)
        pruned, total = pruned + int((~mask).sum()), total + mask.numel()
    assert abs(pruned / total - 0.6) < 0.001
    load_trainable(tmp_path / "out")


@pytest.mark.parametrize("method", sorted(SPARSIFIERS))
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "16:32 window 2"])
def test_patterns(tiny_model_dir: Maker, tmp_path: Path, method: str, pattern: str) -> None:
    sparsify(tiny_model_dir("llama"), tmp_path / "out", method=method, pattern=pattern)
    masks = read_masks(tmp_path / "out")
    assert masks
    assert all(fits_pattern(mask, pattern) for mask in masks.values())


def test_wanda_equals_a_literal_one(tiny_model_dir: Maker, tmp_path: Path) -> None:
    """Without streaming: the whole model in memory, hooks, and block after block pruned in place."""
    directory = tiny_model_dir("llama")
    calibration = tokens(rows=6)
    sparsify(directory, tmp_path / "out", calibration, method="wanda", sparsity=0.5)
    masks = read_masks(tmp_path / "out")
    model = load_model(directory)
    for index, block in enumerate(model.model.layers):
        norms: dict[str, Tensor] = {}
        linears = target_linears(block, None, [], prefix=f"model.layers.{index}")
        handles = [
            m.register_forward_pre_hook(
                lambda _, x, n=n, norms=norms: norms.update({n: x[0].flatten(0, 1).norm(dim=0)})
            )
            for n, m in linears.items()
        ]
        model(calibration)
        for handle in handles:
            handle.remove()
        for name, module in linears.items():
            weight = module.get_parameter("weight")
            scores = weight.abs() * norms[name]
            pruned = torch.zeros_like(scores, dtype=torch.bool)
            pruned.scatter_(1, scores.argsort(dim=1)[:, : scores.shape[1] // 2], True)
            assert ((~pruned) != masks[name]).float().mean() < 0.001
            weight.data[~masks[name]] = 0


@pytest.mark.parametrize("arch", ALL)
def test_every_architecture_becomes_quantized(tiny_model_dir: Maker, tmp_path: Path, arch: str) -> None:
    directory = tiny_model_dir(arch)
    sparsify(directory, tmp_path / "sparse")
    masks = read_masks(tmp_path / "sparse")
    reports = quantize(directory, tmp_path / "out", masks)
    read, latents = read_quantized(tmp_path / "out"), read_latents(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = tokens(2)
    assert torch.equal(theirs(ids).logits, load_model(tmp_path / "out")(ids).logits)
    assert torch.equal(theirs(ids).logits, load_trainable(tmp_path / "out")(ids).logits)
    for name, mask in masks.items():
        value = dequantize(read[name].codes, read[name].qparams)
        assert torch.equal(theirs.get_submodule(name).weight, value)
        assert (value[~mask] == 0).all()
        assert torch.equal(latent_codes(latents[name]), read[name].codes)
    assert all(torch.equal(m, masks[n]) for n, m in read_masks(tmp_path / "out").items())
    assert all(0 < (r.error or 0) < 1 and r.damping == 0.01 for r in reports)
    assert all(abs(r.sparsity - 0.5) < 0.01 for r in reports)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 2},
        {"bits": 3, "group_size": -1},
        {"bits": 8},
        {"symmetric": False},
        {"activation_order": True},
    ],
)
def test_grids(tiny_model_dir: Maker, tmp_path: Path, method: str, settings: dict[str, Any]) -> None:
    if method == "rtn" and "activation_order" in settings:
        pytest.skip("rounding to nearest knows no order")
    quantize(tiny_model_dir("llama"), tmp_path / "out", method=method, **settings)
    options = {}
    if settings.get("symmetric") is False:
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, **options).eval()
    ids = tokens(2)
    assert torch.equal(theirs(ids).logits, load_model(tmp_path / "out")(ids).logits)
    assert torch.equal(theirs(ids).logits, load_trainable(tmp_path / "out")(ids).logits)


def test_gptq_is_closer_than_rounding(tiny_model_dir: Maker, tmp_path: Path) -> None:
    directory = tiny_model_dir("llama")
    dense = load_model(directory)(tokens(4, seed=5)).logits.log_softmax(-1)
    divergence = {}
    for method in ("gptq", "rtn"):
        quantize(directory, tmp_path / method, method=method, bits=3)
        got = load_model(tmp_path / method)(tokens(4, seed=5)).logits.log_softmax(-1)
        divergence[method] = float((dense.exp() * (dense - got)).sum(-1).mean())
    assert divergence["gptq"] < divergence["rtn"]


def test_two_runs_give_the_same_bytes(tiny_model_dir: Maker, tmp_path: Path) -> None:
    for name in ("a", "b"):
        quantize(tiny_model_dir("phi3"), tmp_path / name)
    for file in ("model.safetensors", "sqft_latent.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_partial_targets(tiny_model_dir: Maker, tmp_path: Path) -> None:
    directory = tiny_model_dir("llama")
    with pytest.raises(ModelError, match="runtimes fuse q_proj/k_proj/v_proj"):
        sparsify(directory, tmp_path / "no", target_modules=["q_proj"])
    sparsify(directory, tmp_path / "sparse", skip_modules=["layers.1.mlp.down_proj"])
    masks = read_masks(tmp_path / "sparse")
    assert len(masks) == 13
    quantize(directory, tmp_path / "out", masks, target_modules=["down_proj"])
    quantized = read_quantized(tmp_path / "out")
    assert sorted(quantized) == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    model = load_model(tmp_path / "out")
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        assert (weight[~mask] == 0).all()
        assert name in quantized or torch.equal(weight != 0, mask)
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(tokens(2)).logits,
        model(tokens(2)).logits,
    )


def test_a_quantized_model_is_refused(tiny_model_dir: Maker, tmp_path: Path) -> None:
    quantize(tiny_model_dir("llama"), tmp_path / "q", method="rtn")
    for compress in (sparsify, quantize):
        with pytest.raises(CompressionError, match="q is already quantized"):
            compress(tmp_path / "q", tmp_path / "again")


def test_what_does_not_fit_is_refused_before_anything_is_written(
    tiny_model_dir: Maker, tmp_path: Path
) -> None:
    directory = tiny_model_dir("llama")
    out = tmp_path / "out"
    with pytest.raises(
        CompressionError, match=r"layers\.0\.self_attn\.q_proj: group size 48 does not divide .* 64"
    ):
        quantize(directory, out, group_size=48)
    with pytest.raises(CompressionError, match="q_proj: pattern 2:48 does not fit a width of 64"):
        sparsify(directory, out, pattern="2:48")
    with pytest.raises(CompressionError, match=r"has shape \(1, 1\), the model has \(64, 64\)"):
        quantize(directory, out, {"model.layers.0.self_attn.q_proj": torch.ones(1, 1, dtype=torch.bool)})
    with pytest.raises(ModelError, match="no linear in the decoder blocks is called 'qq'"):
        sparsify(directory, out, target_modules=["qq"])
    writer = CheckpointWriter(out, open_checkpoint(directory))
    with pytest.raises(CompressionError, match="wanda needs calibration"):
        sparsify_model(writer.source, SparsifySection(), None, writer)
    with pytest.raises(CompressionError, match="gptq needs calibration"):
        quantize_model(writer.source, None, QuantizeSection(group_size=32), None, writer)
    assert not out.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(tiny_model_dir: Maker, tmp_path: Path, value: float) -> None:
    directory = shutil.copytree(tiny_model_dir("llama"), tmp_path / "model")
    whole = load_file(directory / "model.safetensors")
    broken = {n: t.clone() for n, t in whole.items()}
    broken["model.layers.1.mlp.up_proj.weight"][3, 3] = value
    save_file(broken, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressionError, match=r"layers\.1\.mlp\.\w+(:| holds) .*NaN"):
        sparsify(directory, tmp_path / "out")
    broken = {n: t.clone() for n, t in whole.items()}
    broken["model.embed_tokens.weight"][:] = value
    save_file(broken, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressionError, match="calibration gave NaN or infinite inputs"):
        sparsify(directory, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_few_tokens_are_told(tiny_model_dir: Maker, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = CheckpointWriter(tmp_path / "out", open_checkpoint(tiny_model_dir("llama")))
    with caplog.at_level(logging.WARNING):
        quantize_model(writer.source, None, QuantizeSection(group_size=32), tokens(2, 20), writer)
    assert "40 calibration tokens for a width of 64" in caplog.text


def test_dead_inputs_are_told(
    tiny_model_dir: Maker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = shutil.copytree(tiny_model_dir("llama"), tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][:5] = 0
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING):
        reports = quantize(directory, tmp_path / "out")
    assert "layers.0.mlp.down_proj: 5 of 128 inputs are 0" in caplog.text
    assert next(r for r in reports if r.name.endswith("layers.0.mlp.down_proj")).dead_inputs == 5


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.99])
def test_any_sparsity(tiny_model_dir: Maker, tmp_path: Path, sparsity: float) -> None:
    sparsify(tiny_model_dir("llama"), tmp_path / "out", sparsity=sparsity, method="magnitude")
    masks = read_masks(tmp_path / "out")
    pruned = sum(int((~m).sum()) for m in masks.values())
    assert abs(pruned / sum(m.numel() for m in masks.values()) - sparsity) < 0.001
    quantize(tiny_model_dir("llama"), tmp_path / "q", masks)


def test_a_singular_hessian_is_told_and_recorded(
    tiny_model_dir: Maker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tiny_model_dir("llama")
    sparsify(directory, tmp_path / "asked", tokens(1, 8), method="sparsegpt", damping=1e-12)
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        reports = sparsify(directory, tmp_path / "again", tokens(1, 8), method="sparsegpt", damping=1e-12)
    told = [record for record in caplog.records if "the Hessian is singular" in record.getMessage()]
    needed = [report for report in reports if report.damping > 1e-12]
    assert needed
    assert len(told) == len(needed)
