"""Blocks fitted to the dense model's: closer than before on held-out rows, on the same zeros and grid."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.compression.test_resume import cut_after_the_first_block, flip, same_files
from tests.compression.tiny_runs import quantize, sparsify, tokens
from torch import Tensor

from sqft.compression import BlockReport, reconstruct_model
from sqft.compression.block_fit import fit_block
from sqft.compression.fitted import FittedLinear, FittedNorm
from sqft.errors import CompressionError
from sqft.models import CheckpointWriter, load_model, open_checkpoint, read_latents, read_masks
from sqft.ops import (
    GridSpec,
    QuantizedWeight,
    compute_qparams,
    decode_latent,
    encode_latent,
    latent_codes,
)
from sqft.ops import quantize as round_to_grid
from sqft.sections import ReconstructSection

Maker = Callable[..., Path]
ROWS = 16
SETTINGS: dict[str, Any] = {"epochs": 3, "batch_size": 2}


@pytest.fixture(scope="module")
def compressed(tiny_model_dir: Maker, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`compressed(kind)`: of the tiny llama: sparse, int4, int3 (both on the masks), or dense-int4."""
    root, dense = tmp_path_factory.mktemp("compressed"), tiny_model_dir("llama")

    def make(kind: str) -> Path:
        out = root / kind
        if not out.exists() and kind == "sparse":
            sparsify(dense, out)
        elif not out.exists():
            masks = None if kind.startswith("dense") else read_masks(make("sparse"))
            quantize(dense, out, masks, bits=int(kind[-1]))
        return out

    return make


def reconstruct(
    directory: Path, out: Path, source: Path, calibration: Tensor | None = None, **settings: Any
) -> list[BlockReport]:
    """A reconstructed model in `out`. directory: the dense one; source: the compressed one."""
    writer = CheckpointWriter(out, open_checkpoint(source))
    ids = tokens(ROWS) if calibration is None else calibration
    spill = settings.pop("spill", False)
    if settings.get("train_weights", True):
        settings = {"learning_rate": 3e-3} | settings
    section = ReconstructSection(**(SETTINGS | settings))
    reports = reconstruct_model(open_checkpoint(directory), writer.source, section, ids, writer, spill=spill)
    writer.close()
    return reports


def output_error(directory: Path, dense: Path) -> float:
    """How far the logits are from the dense model's on tokens that no calibration holds."""
    with torch.no_grad():
        expected, found = (load_model(path)(tokens(16, seed=9)).logits for path in (dense, directory))
    return float((expected - found).square().mean())


@pytest.mark.parametrize(
    "kind", ["sparse", "int4", pytest.param("int3", marks=pytest.mark.slow), "dense-int4"]
)
def test_blocks_come_closer_and_zeros_and_grid_stay(
    tiny_model_dir: Maker, compressed: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    dense, source = tiny_model_dir("llama"), compressed(kind)
    reports = reconstruct(dense, tmp_path / "out", source)
    assert [report.name for report in reports] == ["model.layers.0", "model.layers.1"]
    assert all(report.loss_after < report.loss_before and report.epoch for report in reports)
    assert {report.num_tokens for report in reports} == {3 * 14 * 24}
    assert output_error(tmp_path / "out", dense) < output_error(source, dense)
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    assert sorted(p.name for p in source.iterdir()) == sorted(
        p.name for p in [*(tmp_path / "out").iterdir(), *source.glob("sqft.json")]
    )
    assert after.grid == before.grid
    assert [(n, after.dtype(n), after.shape(n)) for n in after.names] == [
        (n, before.dtype(n), before.shape(n)) for n in before.names
    ]
    masks, latents = read_masks(tmp_path / "out"), read_latents(tmp_path / "out")
    assert set(masks) == set(read_masks(source))
    for name, mask in masks.items():
        assert torch.equal(mask, read_masks(source)[name])
        assert not after.weight(name)[~mask].any()
        assert after.grid or bool((after.weight(name)[mask] != 0).all())
    assert set(latents) == set(before.quantized_names)
    for name, latent in latents.items():
        weight = after.quantized(name)
        assert torch.equal(latent_codes(latent), weight.codes)
        assert torch.equal(
            decode_latent(latent, weight.qparams) != 0,
            masks.get(name, torch.tensor(True)).expand(latent.shape),
        )
        assert not torch.equal(weight.qparams.scale, before.quantized(name).qparams.scale)
        assert torch.equal(weight.qparams.zero_point, before.quantized(name).qparams.zero_point)
    name = "model.layers.1.mlp.down_proj"
    assert after.grid is None or not torch.equal(latents[name], read_latents(source)[name])
    assert not torch.equal(after.weight(name), before.weight(name))
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(after.tensor(norm), before.tensor(norm))
    assert torch.equal(after.tensor("model.norm.weight"), before.tensor("model.norm.weight"))


def test_only_what_is_chosen_is_fitted(
    tiny_model_dir: Maker, compressed: Callable[[str], Path], tmp_path: Path
) -> None:
    dense, source = tiny_model_dir("llama"), compressed("int4")
    chosen: dict[str, dict[str, Any]] = {
        "weights": {"train_scales": False, "train_norms": False},
        "scales": {"train_weights": False},
    }
    for name, settings in chosen.items():
        reconstruct(dense, tmp_path / name, source, **settings)
    before, codes, scales = (
        open_checkpoint(path) for path in (source, tmp_path / "weights", tmp_path / "scales")
    )
    name, norm = "model.layers.0.mlp.up_proj", "model.layers.0.input_layernorm.weight"
    assert torch.equal(codes.quantized(name).qparams.scale, before.quantized(name).qparams.scale)
    assert not torch.equal(codes.quantized(name).codes, before.quantized(name).codes)
    assert torch.equal(codes.tensor(norm), before.tensor(norm))
    assert torch.equal(scales.quantized(name).codes, before.quantized(name).codes)
    assert not torch.equal(scales.quantized(name).qparams.scale, before.quantized(name).qparams.scale)
    assert torch.equal(read_latents(scales.directory)[name], read_latents(source)[name])


def test_a_block_that_gets_worse_stays_as_it_was(
    tiny_model_dir: Maker,
    compressed: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = compressed("sparse")
    with caplog.at_level(logging.WARNING):
        reports = reconstruct(tiny_model_dir("llama"), tmp_path / "out", source, learning_rate=1.0)
    assert [report.epoch for report in reports] == [0, 0]
    assert all(report.loss_after == report.loss_before for report in reports)
    assert len([message for message in caplog.messages if message.endswith("stays as it was")]) == 2
    for file in ("model.safetensors", "sqft_masks.safetensors"):
        before, after = load_file(source / file), load_file(tmp_path / "out" / file)
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_loss_that_is_no_number_ends_the_fit() -> None:
    part = FittedNorm(torch.ones(4))
    pairs = [(torch.randn(2, 3, 4), torch.randn(2, 3, 4)) for _ in range(3)]

    def run(hidden: Tensor, values: dict[str, Tensor]) -> Tensor:
        return hidden * values["norm.weight"]

    fitting: dict[str, Any] = {"epochs": 4, "seed": 0}
    parts = {"norm.weight": part}
    result = fit_block(run, parts, pairs[:2], pairs[2:], rates={"norms": 1e30}, **fitting)
    assert result.diverged
    assert (result.epoch, result.num_epochs, result.after) == (0, 1, result.before)
    assert torch.equal(part.value(), torch.ones(4))
    better = fit_block(run, parts, pairs[:2], pairs[:2], rates={"norms": 0.1}, **fitting)
    assert better.after < better.before
    assert not better.diverged


@pytest.mark.parametrize(
    "damage", ["none", *(pytest.param(part, marks=pytest.mark.slow) for part in ("hidden states", "weights"))]
)
def test_a_run_that_was_killed_goes_on_with_the_same_bits(
    tiny_model_dir: Maker, compressed: Callable[[str], Path], tmp_path: Path, damage: str
) -> None:
    dense = tiny_model_dir("llama")
    settings: dict[str, Any] = {"source": compressed("int4"), "epochs": 1}
    reports = reconstruct(dense, tmp_path / "whole", **settings)
    cut_after_the_first_block(reconstruct, dense, tmp_path / "cut", **settings)
    if damage == "hidden states":
        flip(tmp_path / "cut" / "resume.safetensors", -5)
    if damage == "weights":
        path = tmp_path / "cut" / "model.safetensors"
        path.write_bytes(bytes(path.stat().st_size))
    again = reconstruct(dense, tmp_path / "cut", **settings)
    assert same_files(tmp_path / "whole", tmp_path / "cut")
    assert [r.to_json() | {"seconds": 0} for r in again] == [r.to_json() | {"seconds": 0} for r in reports]
    reconstruct(dense, tmp_path / "spilled", spill=True, **settings)
    assert same_files(tmp_path / "whole", tmp_path / "spilled")


def test_norms_that_multiply_with_one_more_and_fused_linears(tiny_model_dir: Maker, tmp_path: Path) -> None:
    for arch in ("gemma2", "phi3"):
        dense, source = tiny_model_dir(arch), tmp_path / arch
        sparsify(dense, source, method="magnitude")
        reports = reconstruct(dense, tmp_path / f"{arch}-out", source)
        assert all(report.loss_after < report.loss_before for report in reports), arch
        assert output_error(tmp_path / f"{arch}-out", dense) < output_error(source, dense), arch


def damaged(directory: Path, out: Path, value: float) -> Path:
    """A copy with one weight of the second block replaced."""
    shutil.copytree(directory, out)
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_what_cannot_be_reconstructed_is_refused(
    tiny_model_dir: Maker,
    compressed: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense, source = tiny_model_dir("llama"), compressed("sparse")

    def refused(match: str, directory: Path = dense, base: Path = source, **settings: Any) -> None:
        with pytest.raises(CompressionError, match=match):
            reconstruct(directory, tmp_path / "out", base, **({"epochs": 1} | settings))

    refused("needs 8 or more, not 7; raise calibration", calibration=tokens(7))
    refused("is neither sparse nor quantized", base=dense)
    refused("is not made from .*; give the dense model", directory=tiny_model_dir("llama", hidden_size=32))
    refused(
        "is not made from .*; give the dense model", directory=compressed("int4"), base=compressed("int4")
    )
    refused("is not quantized and has no scales; fit weights or norms", train_scales=True)
    refused("no scales; fit weights or norms", train_weights=False, train_norms=False)
    for kind, paths in {"dense": (dense, source), "sparse": (source, source)}.items():
        bad = damaged(paths[0], tmp_path / kind, float("nan"))
        given = {"directory": bad} if kind == "dense" else {"base": bad}
        refused("model.layers.1 puts out NaN or infinity on the calibration", **given)
    monkeypatch.setattr("sqft.compression.reconstruct.is_alone", lambda: False)
    refused("reconstruct runs in one process; start it without torchrun")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"train_weights": False, "train_scales": False, "train_norms": False}, "nothing would be fitted"),
        ({"train_norms": False, "norm_learning_rate": 1e-3}, "norms are not fitted"),
        ({"learning_rate": 0}, "greater than 0"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ReconstructSection(**settings)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_fitted_weight_is_the_stored_one_and_zeros_stay(bits: int) -> None:
    base, mask = torch.randn(6, 64), torch.rand(6, 64) < 0.5
    qparams = compute_qparams(base, GridSpec(bits, 32, symmetric=True))
    base = torch.where(mask, base, 0.0)
    codes = round_to_grid(base, qparams)
    latent = encode_latent(base, codes, mask, qparams)
    part = FittedLinear(QuantizedWeight(codes, qparams), mask, latent, torch.bfloat16, {"weights", "scales"})

    def stored() -> tuple[QuantizedWeight, Tensor]:
        weight, found = part.stored()
        assert isinstance(weight, QuantizedWeight)
        assert found is not None
        return weight, found

    assert torch.equal(part.value().detach(), QuantizedWeight(codes, qparams).dequantize())
    assert torch.equal(stored()[1], latent)
    part.value().square().sum().backward()
    weights, scales = part.changes["weights"], part.changes["scales"]
    assert weights.grad is not None
    assert scales.grad is not None
    assert not weights.grad[~mask].any()
    assert weights.grad[mask].any()
    assert scales.grad.all()
    for change in (weights, scales):
        change.data.normal_(std=0.2)
    changed, again = stored()
    assert torch.equal(part.value().detach(), changed.dequantize())
    assert torch.equal(latent_codes(again), changed.codes)
    assert not changed.dequantize()[~mask].any()
    assert not torch.equal(changed.codes, codes)
    scales.data.fill_(-5.0)
    assert (stored()[0].qparams.scale > 0).all()
