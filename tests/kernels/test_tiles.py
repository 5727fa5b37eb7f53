"""The kernels against their torch operations: on a GPU, and in Triton's interpreter where there is none."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from sqft.errors import AdapterError
from sqft.kernels.choices import Choice, Tiling
from sqft.ops import (
    GridSpec,
    QParams,
    adapted_weight,
    compute_qparams,
    decode_latent,
    dequantize,
    encode_latent,
    keep_nonzero,
    kernel_use,
    latent_codes,
    quantize,
    weight_blocks,
)
from sqft.ops.adapted_linear import adapted_linear

pytest.importorskip("triton")
tiles = pytest.importorskip("sqft.kernels.tiles")

# (out, in, rank, tokens): whole tiles, odd sides, more ranks than a step of the loop over them.
SHAPES = [(64, 64, 16, 32), (70, 96, 3, 9), (33, 160, 40, 65)]
WEIGHT_TILINGS = [tiles.WEIGHT_TILING, Tiling(16, 32), Tiling(32, 64, precision="tf32x3")]
GRADIENT_TILINGS = [tiles.GRADIENT_TILING, Tiling(32, 64, depth=32), Tiling(16, 64, depth=64, strip=3)]
SIXTEEN = [torch.bfloat16, torch.float16]


@pytest.fixture(params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def shape(request: pytest.FixtureRequest) -> tuple[int, ...]:
    found: tuple[int, ...] = request.param
    return found


class Case:
    """A pruned weight, factors and tokens on a device."""

    def __init__(self, shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32) -> None:
        out, columns, rank, tokens = shape
        generator = torch.Generator().manual_seed(out)

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(device)

        weight, self.mask = randn(out, columns), randn(out, columns) > 0
        self.base = keep_nonzero(weight, self.mask)
        self.A, self.B = randn(rank, columns) * 0.3, randn(out, rank) * 0.3
        self.x, self.dy = randn(tokens, columns).to(dtype), randn(tokens, out).to(dtype)

    def grid(self, symmetric: bool = True, group_size: int = 32) -> tuple[Tensor, QParams]:
        """The latent and its grid."""
        grid = compute_qparams(self.base, GridSpec(4, group_size, symmetric))
        return encode_latent(self.base, quantize(self.base, grid), self.mask, grid), grid

    def layer(
        self, base: Tensor, qparams: QParams | None, kernels: Any, dtype: torch.dtype, **settings: Any
    ) -> list[Tensor]:
        """The layer's output and the gradients of x, A and B."""
        x = self.x.to(dtype).requires_grad_()
        A, B = (tensor.clone().requires_grad_() for tensor in (self.A, self.B))
        y = adapted_linear(x, base, A, B, scaling=0.5, qparams=qparams, kernels=kernels, **settings)
        return [y, *torch.autograd.grad(y, (x, A, B), self.dy.to(dtype))]


def settings_of(grid: QParams) -> dict[str, Any]:
    return {
        "scale": grid.scale,
        "zero_point": grid.zero_point,
        "max_code": grid.max_code,
        "symmetric": grid.symmetric,
    }


@pytest.fixture(autouse=True)
def poisoned_empties(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, so that an element that is never written shows."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize("tiling", WEIGHT_TILINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN])
def test_sparse_weight(dtype: torch.dtype, tiling: Tiling, shape: tuple[int, ...], device: str) -> None:
    case = Case(shape, device)
    base, storage = case.base.to(dtype), None if dtype == torch.float32 else dtype
    wanted = adapted_weight(base, case.A, case.B, scaling=0.7, mask=case.mask, storage_dtype=storage)
    for out in {torch.float32, dtype}:
        found = tiles.build_weight(
            base, case.A, case.B, scaling=0.7, dtype=out, storage_dtype=storage, tiling=tiling
        )
        # One step of the storage dtype where the sums differ in their last bit.
        torch.testing.assert_close(found.float(), wanted, atol=1e-5, rtol=torch.finfo(dtype).eps + 1e-5)
        assert torch.equal(found != 0, wanted != 0)


@pytest.mark.parametrize("tiling", WEIGHT_TILINGS, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("latents", [True, False])
def test_quantized_weight(
    latents: bool, symmetric: bool, tiling: Tiling, shape: tuple[int, ...], device: str
) -> None:
    case = Case(shape, device)
    case.A = case.A * 4  # some codes are clamped
    latent, grid = case.grid(symmetric)
    decoded = decode_latent(latent, grid)
    wanted = adapted_weight(decoded, case.A, case.B, scaling=0.7, mask=case.mask, qparams=grid)
    before = decoded + torch.where(case.mask, (case.B @ case.A) * 0.7, 0.0)
    codes = (before / _columns(grid.scale)).round() + _columns(grid.zero_point)
    unclamped = case.mask & (codes >= 0) & (codes <= grid.max_code)
    assert (case.mask & ~unclamped).any()
    keep = torch.empty(latent.shape, dtype=torch.uint8, device=device)
    found = tiles.build_weight(
        latent if latents else decoded,
        case.A,
        case.B,
        scaling=0.7,
        dtype=torch.float32,
        keep=keep,
        tiling=tiling,
        **settings_of(grid),
    )
    assert (found != wanted).float().mean() < 1e-3  # codes on the edge of two
    assert not found[~case.mask].any()
    assert (keep != unclamped).float().mean() < 1e-3


def _columns(groups: Tensor) -> Tensor:
    return groups.float().repeat_interleave(32, 1)


@pytest.mark.parametrize("group_size", [12, 48, 96])
def test_groups_that_fit_no_tile(group_size: int, device: str) -> None:
    case = Case((70, 96, 8, 4), device)
    latent, grid = case.grid(False, group_size)
    base = decode_latent(latent, grid)
    wanted = adapted_weight(base, case.A, case.B, scaling=0.7, mask=case.mask, qparams=grid)
    found = tiles.build_weight(latent, case.A, case.B, scaling=0.7, dtype=torch.float32, **settings_of(grid))
    assert (found != wanted).float().mean() < 1e-3


def test_a_latent_without_an_adapter_gives_its_codes(device: str) -> None:
    case = Case((70, 96, 8, 4), device)
    latent, grid = case.grid()
    nothing = case.A[:0], case.B[:, :0]
    found = tiles.build_weight(latent, *nothing, scaling=1.0, dtype=torch.float32, **settings_of(grid))
    assert torch.equal(found, dequantize(latent_codes(latent), grid))


@pytest.mark.parametrize("tiling", GRADIENT_TILINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN])
@pytest.mark.parametrize("product", [False, True])
def test_contraction(
    product: bool, dtype: torch.dtype, tiling: Tiling, shape: tuple[int, ...], device: str
) -> None:
    case = Case(shape, device, dtype)
    gradient = torch.where(case.mask, case.dy.double().t() @ case.x.double(), 0.0)
    wanted = 0.7 * case.B.double().t() @ gradient, 0.7 * gradient @ case.A.double().t()
    factors = case.A, case.B
    if product:
        whole = (case.dy.double().t() @ case.x.double()).to(dtype)
        found = tiles.contract_product(whole, case.mask, *factors, scaling=0.7, tiling=tiling)
    else:
        found = tiles.contract_gradient(case.dy, case.x, case.base, *factors, scaling=0.7, tiling=tiling)
    for f, w in zip(found, wanted, strict=True):
        error = (f.double() - w).norm() / w.norm()
        assert error < {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]


def test_slices_give_the_same_bits(device: str) -> None:
    case = Case((70, 96, 24, 9), device)
    wide = torch.cat([case.dy, case.dy], 1)
    ranks = case.A[:10], case.B[:, :10]
    found = tiles.contract_gradient(wide[:, 70:], case.x, case.base, *ranks, scaling=0.7)
    wanted = tiles.contract_gradient(
        case.dy, case.x, case.base, *(t.contiguous() for t in ranks), scaling=0.7
    )
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


CHOICES = {
    "build only": Choice(Tiling(32, 64)),
    "fused": Choice(Tiling(32, 64), Tiling(32, 32, depth=32, strip=2)),
    "product": Choice(Tiling(32, 64), Tiling(32, 32, strip=2), product=True),
}


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("gradient", ["exact", "lowrank"])
@pytest.mark.parametrize("quantized", [False, True])
def test_the_layer(
    quantized: bool,
    gradient: Any,
    name: str,
    shape: tuple[int, ...],
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weight_blocks, "BLOCK_ELEMENTS", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(weight_blocks, "MIN_ROWS", 32)  # more than one block of rows
    monkeypatch.setattr(kernel_use, "choose_kernels", lambda *_, **__: CHOICES[name])
    case = Case(shape, device)
    base, grid = case.grid() if quantized else (case.base, None)
    results = [case.layer(base, grid, k, torch.float32, gradient=gradient) for k in ("triton", "torch")]
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_the_layer_in_16_bits(
    dtype: torch.dtype, quantized: bool, name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_use, "choose_kernels", lambda *_, **__: CHOICES[name])
    case = Case((70, 96, 8, 33), device, dtype)
    base, grid = case.grid() if quantized else (case.base.to(dtype), None)
    found, wanted = (case.layer(base, grid, *how) for how in (("triton", dtype), ("torch", torch.float32)))
    for f, w in zip(found, wanted, strict=True):
        error = (f.float() - w.float()).norm() / w.float().norm()
        assert error < (2e-2 if dtype == torch.bfloat16 else 3e-3)


@pytest.mark.parametrize("quantized", [False, True])
def test_many_tiles_of_the_default_cut(quantized: bool, device: str) -> None:
    case = Case((520, 1088, 32, 300) if device == "cuda" else (136, 160, 17, 70), device, torch.bfloat16)
    base, grid = case.grid() if quantized else (case.base.bfloat16(), None)
    found, wanted = (
        case.layer(base, grid, *how) for how in (("triton", torch.bfloat16), ("torch", torch.float32))
    )
    for f, w in zip(found, wanted, strict=True):
        assert (f.float() - w.float()).norm() / w.float().norm() < 2e-2


def test_where_kernels_cannot_run_torch_does_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernel_use._warn.cache_clear()
    case = Case((16, 32, 2, 4), "cpu")
    arguments = case.x, case.base, case.A, case.B
    with caplog.at_level(logging.WARNING):
        results = [adapted_linear(*arguments, scaling=1.0, kernels=k) for k in ("triton", "triton", "torch")]
        adapted_linear(*arguments, scaling=1.0)  # auto falls back in silence
    kernel_use._warn.cache_clear()
    assert torch.equal(results[0], results[2])
    assert sum("NVIDIA GPU" in record.getMessage() for record in caplog.records) == 1


def test_trained_scales_leave_the_kernels_alone(device: str) -> None:
    case = Case((16, 32, 2, 4), device)
    latent, grid = case.grid()
    scale = grid.scale.clone().requires_grad_()
    factors = case.A, case.B
    with pytest.raises(AdapterError, match="torch"):
        adapted_linear(case.x, latent, *factors, scaling=1.0, qparams=grid, scale=scale, kernels="triton")
    adapted_linear(case.x, latent, *factors, scaling=1.0, qparams=grid, scale=scale).sum().backward()
    assert scale.grad is not None
