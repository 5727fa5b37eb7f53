"""The kernels against their torch operations, in Triton's interpreter where there is no GPU."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from sqft.ops import (
    QParams,
    adapted_weight,
    compute_qparams,
    decode_latent,
    encode_latent,
    keep_nonzero,
    quantize,
    weight_blocks,
)
from sqft.ops import adapted_linear as op
from sqft.ops.adapted_linear import adapted_linear

pytest.importorskip("triton")
tiles = pytest.importorskip("sqft.kernels.tiles")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(64, 64, 16, 32), (70, 96, 3, 9), (33, 160, 20, 65)]


def make(out: int, columns: int, rank: int, tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(out)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    weight, mask = randn(out, columns), randn(out, columns) > 0
    return {
        "base": keep_nonzero(weight, mask),
        "mask": mask,
        "A": randn(rank, columns) * 0.3,
        "B": randn(out, rank) * 0.3,
        "x": randn(tokens, columns),
        "dy": randn(tokens, out),
    }


def grid_of(case: dict[str, Tensor], symmetric: bool) -> tuple[Tensor, QParams, dict[str, Any]]:
    grid = compute_qparams(case["base"], bits=4, group_size=32, symmetric=symmetric)
    latent = encode_latent(case["base"], quantize(case["base"], grid), case["mask"], grid)
    return latent, grid, {"scale": grid.scale, "zero_point": grid.zero_point, "max_code": grid.max_code}


def gradients(case: dict[str, Tensor], base: Tensor, qparams: QParams | None) -> tuple[Tensor, ...]:
    A, B = (case[name].clone().requires_grad_() for name in ("A", "B"))
    y = adapted_linear(case["x"], base, A, B, scaling=0.7, qparams=qparams)
    return torch.autograd.grad(y, (A, B), case["dy"])


@pytest.fixture(autouse=True)
def poisoned_empties(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, so that an element that is never written shows."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(tiles.torch, "empty", poisoned)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_weight(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    case = make(*shape)
    base, storage = case["base"].to(dtype), None if dtype == torch.float32 else dtype
    wanted = adapted_weight(base, case["A"], case["B"], scaling=0.7, mask=case["mask"], storage_dtype=storage)
    found = tiles.build_weight(
        base, case["A"], case["B"], scaling=0.7, dtype=torch.float32, storage_dtype=storage
    )
    torch.testing.assert_close(found, wanted, atol=1e-5 if storage is None else 2e-2, rtol=1e-5)
    assert torch.equal(found != 0, wanted != 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("latents", [True, False])
def test_quantized_weight(latents: bool, symmetric: bool, shape: tuple[int, ...]) -> None:
    case = make(*shape)
    latent, grid, settings = grid_of(case, symmetric)
    decoded = decode_latent(latent, grid)
    wanted = adapted_weight(decoded, case["A"], case["B"], scaling=0.7, mask=case["mask"], qparams=grid)
    base = latent if latents else decoded
    found = tiles.build_weight(base, case["A"], case["B"], scaling=0.7, dtype=torch.float32, **settings)
    assert (found != wanted).float().mean() < 1e-3  # codes on the edge of two
    assert not found[~case["mask"]].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_sparse_gradient(shape: tuple[int, ...]) -> None:
    case = make(*shape)
    found = tiles.contract_gradient(case["dy"], case["x"], case["base"], case["A"], case["B"], scaling=0.7)
    for f, w in zip(found, gradients(case, case["base"], None), strict=True):
        torch.testing.assert_close(f, w, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantized_gradient(symmetric: bool, shape: tuple[int, ...]) -> None:
    case = make(*shape)
    case["A"] = case["A"] * 4  # some codes are clamped
    latent, grid, settings = grid_of(case, symmetric)
    found = tiles.contract_gradient(
        case["dy"], case["x"], latent, case["A"], case["B"], scaling=0.7, **settings
    )
    for f, w in zip(found, gradients(case, latent, grid), strict=True):
        torch.testing.assert_close(f, w, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_layer_with_kernels(
    shape: tuple[int, ...], quantized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_blocks, "BLOCK_ELEMENTS", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(weight_blocks, "MIN_ROWS", 32)  # more than one block of rows
    case = make(*shape)
    latent, grid, _ = grid_of(case, True)
    results = []
    for kernels in ("torch", "triton"):
        x, A, B = (case[name].clone().requires_grad_() for name in ("x", "A", "B"))
        base, qparams = (latent, grid) if quantized else (case["base"], None)
        y = adapted_linear(x, base, A, B, scaling=0.5, qparams=qparams, kernels=kernels)
        results.append([y, *torch.autograd.grad(y, (x, A, B), case["dy"])])
    for found, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_layer_with_kernels_in_16_bits(dtype: torch.dtype, quantized: bool) -> None:
    case = make(70, 96, 8, 33)
    latent, grid, _ = grid_of(case, True)
    base, qparams = (latent, grid) if quantized else (case["base"].to(dtype), None)
    results = []
    for kernels, compute in (("torch", torch.float32), ("triton", dtype)):
        # The same numbers: those of the 16-bit type are float32 ones as well.
        x = case["x"].to(dtype).to(compute).requires_grad_()
        A, B = (case[name].clone().requires_grad_() for name in ("A", "B"))
        y = adapted_linear(x, base, A, B, scaling=0.5, qparams=qparams, kernels=kernels)
        results.append([y, *torch.autograd.grad(y, (x, A, B), case["dy"].to(dtype).to(compute))])
    for found, wanted in zip(results[1], results[0], strict=True):
        error = (found.float() - wanted.float()).norm() / wanted.float().norm()
        assert error < (2e-2 if dtype == torch.bfloat16 else 3e-3)


def test_where_kernels_cannot_run_torch_does_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    op._no_triton.cache_clear()
    case = {name: tensor.cpu() for name, tensor in make(16, 32, 2, 4).items()}
    arguments = case["x"], case["base"], case["A"], case["B"]
    with caplog.at_level(logging.WARNING):
        results = [adapted_linear(*arguments, scaling=1.0, kernels=k) for k in ("triton", "triton", "torch")]
    op._no_triton.cache_clear()
    assert torch.equal(results[0], results[2])
    assert sum("NVIDIA GPU" in record.getMessage() for record in caplog.records) == 1
