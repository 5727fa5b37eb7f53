"""SparseGPT, joint pruning and rounding, mask and weight refinement, budgets, resuming, spilling."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.compression.tiny_runs import hessian_of, inputs, quantize, sparsify, tokens
from tests.memory import Watch
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from sqft.compression import sparsify_model
from sqft.compression.budget import arithmetic_offsets, outlier_offsets, share_out
from sqft.compression.descent import descend, fit_scales
from sqft.compression.gptq import gptq
from sqft.compression.refine import fit_kept_weights, swap_mask
from sqft.compression.ria import ria_scores
from sqft.compression.scale_search import search_qparams
from sqft.compression.sparsegpt import prune_and_round, sparsegpt
from sqft.compression.statistics import DenseTargetHessian
from sqft.compression.walk import BlockWalk
from sqft.errors import CompressionError
from sqft.models import CheckpointWriter, load_model, open_checkpoint, read_masks, read_quantized
from sqft.ops import GridSpec, compute_qparams, dequantize, fake_quantize, mask_pattern, mask_rows
from sqft.ops import quantize as quantize_codes
from sqft.ops.grid import round_scale
from sqft.ops.pattern import fits_pattern
from sqft.sections import SparsifySection

Maker = Callable[..., Path]


def loss(weight: Tensor, dense: Tensor, x: Tensor) -> float:
    return float(((weight - dense) @ x.T).square().sum())


def slow_sparsegpt(weight: Tensor, matrix: Tensor, damping: float, mask: Tensor) -> Tensor:
    """The inverse of the remaining Hessian taken anew for every column, for a mask that is given."""
    damped = matrix.double() + damping * matrix.diagonal().mean() * torch.eye(len(matrix))
    work = weight.double().clone()
    for j in range(weight.shape[1]):
        inverse = torch.linalg.inv(damped[j:, j:])
        error = torch.where(mask[:, j], 0.0, work[:, j]) / inverse[0, 0]
        work[:, j:] -= error[:, None] * inverse[0][None, :]
    return work.float()


@pytest.mark.parametrize("pattern", [None, "2:4", "4:8", "16:32 window 2"])
def test_sparsegpt_against_a_slow_one(pattern: str | None) -> None:
    columns = 160
    x, weight = inputs(500, columns), torch.randn(6, columns)
    hessian = hessian_of(x)
    result = sparsegpt(weight, hessian, sparsity=0.5, pattern=pattern, damping=0.01)
    assert result.damping == 0.01
    expected = slow_sparsegpt(weight, hessian.matrix(), 0.01, result.mask)
    # One pass in float32 against one in float64: rounding errors of a matrix of condition about 100.
    torch.testing.assert_close(result.weight, expected, rtol=1e-3, atol=1e-4)
    assert int((~result.mask).sum()) == 6 * columns // 2
    if pattern is not None:
        assert fits_pattern(result.mask, pattern)
    wanda = weight.abs() * hessian.norm
    mask = mask_rows(wanda, 0.5) if pattern is None else mask_pattern(wanda, pattern)
    assert loss(result.weight, weight, x) < 0.8 * loss(weight * mask, weight, x)


@pytest.mark.parametrize("pattern", [None, "2:4", "16:32 window 3"])
def test_joint_is_better_than_one_after_the_other(pattern: str | None) -> None:
    x, weight = inputs(500, 192), torch.randn(16, 192)
    hessian, options = hessian_of(x), GridSpec(3, 32, True)
    joint = prune_and_round(weight, hessian, options, sparsity=0.5, pattern=pattern, damping=0.01)
    assert joint.mask is not None
    assert pattern is None or fits_pattern(joint.mask, pattern)
    value = dequantize(joint.codes, joint.qparams)
    assert (value[~joint.mask] == 0).all()
    pruned = sparsegpt(weight, hessian, sparsity=0.5, pattern=pattern, damping=0.01)
    qparams = compute_qparams(pruned.weight, GridSpec(3, 32, True))
    assert loss(value, weight, x) < loss(fake_quantize(pruned.weight, qparams), weight, x)


@pytest.mark.parametrize("masked", [True, False])
def test_descent_ends_where_no_single_code_can_improve(masked: bool) -> None:
    x, weight = inputs(500, 192), torch.randn(6, 192)
    mask = mask_rows(weight.abs(), 0.5) if masked else None
    hessian = hessian_of(x)
    rounded = gptq(weight, mask, hessian, GridSpec(3, 32, True), damping=0.01)
    matrix = hessian.damped(0.01)
    better = descend(weight, rounded, matrix, sweeps=30)

    def cost(value: Tensor) -> Tensor:
        return (((value - weight) @ matrix) * (value - weight)).sum(1)

    value = dequantize(better.codes, better.qparams)
    assert (cost(value) <= cost(dequantize(rounded.codes, rounded.qparams)) + 1e-3).all()
    assert cost(value).sum() < 0.99 * cost(dequantize(rounded.codes, rounded.qparams)).sum()
    if mask is not None:
        assert (value[~mask] == 0).all()
    assert torch.equal(better.codes, quantize_codes(better.before_rounding, better.qparams))
    for j in range(0, 192, 17):
        for step in (-1, 1):
            other = value.clone()
            other[:, j] += step * better.qparams.scale[:, j // 32]
            inside = quantize_codes(other, better.qparams)[:, j] == better.codes[:, j] + step
            allowed = inside if mask is None else inside & mask[:, j]
            assert (cost(other)[allowed] >= cost(value)[allowed] - 1e-2).all()


def test_fitted_scales_are_the_least_squares_solution() -> None:
    x, weight = inputs(500, 192), torch.randn(6, 192)
    hessian = hessian_of(x)
    rounded = gptq(weight, mask_rows(weight.abs(), 0.5), hessian, GridSpec(3, 32, True), damping=0.01)
    matrix = hessian.damped(0.01)
    fitted = fit_scales(weight, rounded.codes, rounded.qparams, matrix, scale_bits=24)

    def cost(scale: Tensor) -> Tensor:
        steps = dequantize(rounded.codes, replace(rounded.qparams, scale=torch.ones_like(scale)))
        error = steps.unflatten(1, (6, -1)).mul(scale[..., None]).flatten(1) - weight
        return ((error @ matrix) * error).sum(1)

    assert (cost(fitted.scale) < cost(rounded.qparams.scale)).all()
    for factor in (0.99, 1.01):
        for group in range(6):
            moved = fitted.scale.clone()
            moved[:, group] *= factor
            assert (cost(moved) > cost(fitted.scale)).all()
    coarse = fit_scales(weight, rounded.codes, rounded.qparams, matrix, scale_bits=8)
    assert torch.equal(round_scale(coarse.scale, 8), coarse.scale)
    assert (cost(coarse.scale) <= cost(rounded.qparams.scale)).all()


def test_fit_is_the_least_squares_solution() -> None:
    x, weight = inputs(200, 20), torch.randn(4, 20)
    mask = torch.rand(4, 20) > 0.5
    matrix = hessian_of(x).damped(0.01)
    fitted = fit_kept_weights(weight, mask, matrix, iterations=60)
    for row in range(4):
        kept = mask[row].nonzero().flatten()
        expected = torch.linalg.solve(matrix[kept][:, kept], matrix[kept] @ weight[row])
        assert torch.allclose(fitted[row, kept], expected, rtol=1e-2, atol=1e-2)
        assert (fitted[row, ~mask[row]] == 0).all()


def test_swaps_reach_what_no_swap_improves() -> None:
    x, weight = inputs(200, 12), torch.randn(5, 12)
    matrix = hessian_of(x).matrix()
    start = mask_rows(weight.abs(), 0.5)
    mask = swap_mask(weight, start, matrix, max_swaps=100)
    assert torch.equal(mask.sum(1), start.sum(1))

    def cost(row: int, kept: Tensor) -> float:
        error = torch.where(kept, 0.0, weight[row])
        return float(error @ matrix @ error)

    for row in range(5):
        best = cost(row, mask[row])
        assert best <= cost(row, start[row]) + 1e-6
        pruned, kept = (~mask[row]).nonzero().flatten(), mask[row].nonzero().flatten()
        for p, q in itertools.product(pruned.tolist(), kept.tolist()):
            other = mask[row].clone()
            other[p], other[q] = True, False
            assert cost(row, other) > best * (1 - 1e-4)


def test_swaps_keep_a_pattern() -> None:
    x, weight = inputs(200, 16), torch.randn(5, 16)
    matrix = hessian_of(x).matrix()
    start = mask_pattern(weight.abs(), "2:4")
    mask = swap_mask(weight, start, matrix, max_swaps=50, pattern="2:4")
    assert (mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    assert not torch.equal(mask, start)
    assert loss(weight * mask, weight, x) < loss(weight * start, weight, x)


def test_ria_literally() -> None:
    weight, norm = torch.randn(3, 5), torch.rand(5)
    scores = ria_scores(weight, norm)
    for i, j in itertools.product(range(3), range(5)):
        size = abs(weight[i, j])
        expected = (size / weight[:, j].abs().sum() + size / weight[i].abs().sum()) * norm[j] ** 0.5
        assert torch.isclose(scores[i, j], expected)


def test_scale_search_lowers_the_error() -> None:
    weight = torch.randn(8, 64) ** 3
    for symmetric in (True, False):
        plain = GridSpec(3, 32, symmetric)
        searched = search_qparams(weight, plain)
        errors = [
            (fake_quantize(weight, q) - weight).square().sum()
            for q in (searched, search_qparams(weight, plain, search=False))
        ]
        assert errors[0] < errors[1]
        assert (searched.zero_point <= searched.max_code).all()


def test_dense_target_is_the_ridge_solution() -> None:
    x, dense, weight = inputs(300, 12), inputs(300, 12, seed=1), torch.randn(4, 12)
    dense = x + 0.1 * dense
    statistic = DenseTargetHessian(12, x.device)
    for a, b in zip(x.split(70), dense.split(70), strict=True):
        statistic.update(a, b)
    ridge = 0.01 * statistic.matrix().diagonal().mean()
    left = x.T @ x / 300 + ridge * torch.eye(12)
    right = (dense @ weight.T - x @ weight.T).T @ x / 300
    assert torch.allclose(
        statistic.target(weight, 0.01), weight + torch.linalg.solve(left, right.T).T, atol=1e-2
    )


def test_budgets() -> None:
    assert arithmetic_offsets(3, 0.1) == pytest.approx([-0.1, 0.0, 0.1])
    assert arithmetic_offsets(1, 0.1) == [0.0]
    assert outlier_offsets([0.1, 0.3, 0.2], 0.05) == pytest.approx([0.05, -0.05, 0.0])
    assert outlier_offsets([0.1, 0.1], 0.05) == [0.0, 0.0]
    sizes = {"a": 100, "b": 300}
    shares = share_out(0.9, {"a": 0.3, "b": -0.1}, sizes)
    assert sum(shares[n] * sizes[n] for n in sizes) == pytest.approx(0.9 * 400)
    assert all(0 <= share <= 1 for share in shares.values())


def divergence(directory: Path, other: Path) -> float:
    ids = tokens(4, seed=7)
    expected = load_model(directory)(ids).logits.log_softmax(-1)
    got = load_model(other)(ids).logits.log_softmax(-1)
    return float((expected.exp() * (expected - got)).sum(-1).mean())


@pytest.mark.parametrize("budget", ["uniform", "arithmetic", "owl"])
@pytest.mark.parametrize("sparsity", [0.5, 0.63])
def test_overall_sparsity_is_exact(
    tiny_model_dir: Maker, tmp_path: Path, budget: str, sparsity: float
) -> None:
    sparsify(tiny_model_dir("llama"), tmp_path / "o", budget=budget, sparsity=sparsity)
    masks = read_masks(tmp_path / "o")
    pruned = {n: int((~m).sum()) for n, m in masks.items()}
    assert abs(sum(pruned.values()) / sum(m.numel() for m in masks.values()) - sparsity) < 0.001
    first, last = (sum(v for n, v in pruned.items() if n.startswith(f"model.layers.{i}")) for i in (0, 1))
    assert (first == last) == (budget == "uniform")


def test_each_refinement_lowers_the_layer_errors(tiny_model_dir: Maker, tmp_path: Path) -> None:
    directory = tiny_model_dir("llama")
    refinements: dict[str, dict[str, Any]] = {
        "plain": {},
        "swaps": {"swaps": 20},
        "refit": {"refit": 20},
        "both": {"swaps": 20, "refit": 20},
    }
    errors = {}
    for name, settings in refinements.items():
        reports = sparsify(directory, tmp_path / name, method="wanda", **settings)
        errors[name] = sum(r.error or 0.0 for r in reports[:7])
    assert errors["swaps"] < errors["plain"]
    assert errors["refit"] < errors["plain"]
    assert errors["both"] < errors["swaps"]


@pytest.mark.parametrize("arch", ["llama", "phi3", "gemma2"])
@pytest.mark.parametrize("settings", [{"dense_targets": True}, {"sequential": True}])
def test_walk_options_on_every_kind_of_block(
    tiny_model_dir: Maker, tmp_path: Path, arch: str, settings: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    sparsify(tiny_model_dir(arch), out, method="sparsegpt", pattern="2:4", swaps=3, refit=3, **settings)
    for mask in read_masks(out).values():
        assert (mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    if arch == "llama":
        masks = read_masks(out)
        quantize(
            tiny_model_dir(arch),
            tmp_path / "q",
            masks,
            refit=3,
            descent=2,
            scale_search=True,
            sequential=True,
        )
        quantize(tiny_model_dir(arch), tmp_path / "r", masks, method="gptaq")
        plain, aimed = read_quantized(tmp_path / "q"), read_quantized(tmp_path / "r")
        for name, mask in masks.items():
            assert not plain[name].dequantize()[~mask].any()
            assert not aimed[name].dequantize()[~mask].any()
        assert any(not torch.equal(plain[name].codes, aimed[name].codes) for name in masks)


def test_joint_writes_its_own_mask(tiny_model_dir: Maker, tmp_path: Path) -> None:
    directory = tiny_model_dir("llama")
    reports = quantize(directory, tmp_path / "joint", method="joint", sparsity=0.6)
    masks = read_masks(tmp_path / "joint")
    assert len(masks) == 14
    assert all(r.sparsity == pytest.approx(0.6, abs=0.001) for r in reports)
    for name, weight in read_quantized(tmp_path / "joint").items():
        assert (dequantize(weight.codes, weight.qparams)[~masks[name]] == 0).all()
    with pytest.raises(CompressionError, match="joint chooses its own mask"):
        quantize(directory, tmp_path / "no", masks, method="joint")
    with pytest.raises(CompressionError, match="pattern 2:48 does not fit a width of 64"):
        quantize(directory, tmp_path / "no", method="joint", pattern="2:48")


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("step", ["sparsify", "quantize", "joint"])
def test_an_interrupted_walk_goes_on_to_the_same_bytes(
    tiny_model_dir: Maker, tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_model_dir("mistral")

    def go(out: Path) -> list[Any]:
        if step == "sparsify":
            return sparsify(directory, out, method="sparsegpt", dense_targets=True)
        return quantize(directory, out, method={"joint": "joint"}.get(step, "gptaq"))

    whole = go(tmp_path / "whole")
    load = BlockWalk.load

    def fail_on_second(walk: BlockWalk, name: str) -> Any:
        if name.endswith("1"):
            raise Interrupted
        return load(walk, name)

    with monkeypatch.context() as patch:
        patch.setattr(BlockWalk, "load", fail_on_second)
        with pytest.raises(Interrupted):
            go(tmp_path / "cut")
    assert not (tmp_path / "cut" / "config.json").exists()
    loaded: list[str] = []
    monkeypatch.setattr(BlockWalk, "load", lambda walk, name: (loaded.append(name), load(walk, name))[1])
    again = go(tmp_path / "cut")
    assert loaded == ["model.layers.1"]
    assert [r.name for r in again] == [r.name for r in whole]
    assert [r.error for r in again] == [r.error for r in whole]
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes(), path.name
    assert not (tmp_path / "cut" / "resume.safetensors").exists()


def test_other_settings_start_over(
    tiny_model_dir: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_model_dir("llama")
    load = BlockWalk.load

    def fail_on_second(walk: BlockWalk, name: str) -> Any:
        if name.endswith("1"):
            raise Interrupted
        return load(walk, name)

    with monkeypatch.context() as patch:
        patch.setattr(BlockWalk, "load", fail_on_second)
        with pytest.raises(Interrupted):
            sparsify(directory, tmp_path / "a", sparsity=0.4)
    sparsify(directory, tmp_path / "a", sparsity=0.5)
    sparsify(directory, tmp_path / "b", sparsity=0.5)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_spilled_activations_change_nothing(tiny_model_dir: Maker, tmp_path: Path) -> None:
    directory = tiny_model_dir("llama")
    section = SparsifySection(method="sparsegpt", dense_targets=True)
    for name, spill in (("a", False), ("b", True)):
        writer = CheckpointWriter(tmp_path / name, open_checkpoint(directory))
        sparsify_model(writer.source, section, tokens(), writer, spill=spill)
        writer.close({})
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert not (tmp_path / "b" / "activations").exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_does_not_grow_with_the_number_of_blocks(tiny_model_dir: Maker, tmp_path: Path) -> None:
    directory = tiny_model_dir("llama", num_hidden_layers=12, hidden_size=256, intermediate_size=1024)
    writer = CheckpointWriter(tmp_path / "out", open_checkpoint(directory))
    watch = Watch()
    sparsify_model(writer.source, SparsifySection(), tokens(), writer, progress=watch)
    block_bytes = 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 1024)
    assert len(watch.seen) == 12
    assert watch.seen[-1] - watch.seen[2] < 4 * block_bytes  # of the nine blocks in between


def _one_of_two(rank: int, directory: Path, out: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{out / 'meeting'}", rank=rank, world_size=2
    )
    writer = CheckpointWriter(out / str(rank), open_checkpoint(directory))
    sparsify_model(writer.source, SparsifySection(method="sparsegpt"), tokens(rows=12), writer)
    writer.close({})
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_the_calibration(tiny_model_dir: Maker, tmp_path: Path) -> None:
    directory = tiny_model_dir("llama")
    start_processes(_one_of_two, (directory, tmp_path), nprocs=2, start_method="spawn")
    first, second = (read_masks(tmp_path / rank) for rank in "01")
    assert (tmp_path / "0/model.safetensors").read_bytes() == (tmp_path / "1/model.safetensors").read_bytes()
    assert all(torch.equal(mask, second[name]) for name, mask in first.items())
    writer = CheckpointWriter(tmp_path / "alone", open_checkpoint(directory))
    sparsify_model(writer.source, SparsifySection(method="sparsegpt"), tokens(rows=12), writer)
    writer.close({})
    alone = read_masks(tmp_path / "alone")
    agreement = sum(int((mask == alone[name]).sum()) for name, mask in first.items())
    assert agreement > 0.95 * sum(mask.numel() for mask in first.values())
