import shutil
from dataclasses import replace
from typing import Any

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sqft.errors import AdapterError
from sqft.ops import (
    GridSpec,
    QParams,
    adapted_codes,
    adapted_weight,
    compute_qparams,
    decode_latent,
    dequantize,
    encode_latent,
    keep_nonzero,
    quantize,
)
from sqft.ops import weight_blocks as module
from sqft.ops.adapted_linear import adapted_linear
from sqft.ops.weight_blocks import WeightBlocks

SHAPES = [(24, 32, 3), (17, 96, 1), (75, 64, 8)]
GRIDS = [(4, True), (4, False), (2, True), (3, False), (8, True), (8, False)]


class Case:
    """Random tensors for one layer."""

    def __init__(self, out: int, columns: int, rank: int, *, group: int = 32, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.weight = self.randn(out, columns)
        self.mask = self.randn(out, columns) > 0
        self.x, self.bias = self.randn(2, 5, columns), self.randn(out)
        self.A, self.B = self.randn(rank, columns) * 0.3, self.randn(out, rank) * 0.3
        self.dy, self.group = self.randn(2, 5, out), group

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def grid(self, bits: int, symmetric: bool) -> tuple[Tensor, QParams]:
        weight = self.weight * self.mask
        qparams = compute_qparams(weight, GridSpec(bits, self.group, symmetric))
        return encode_latent(weight, quantize(weight, qparams), self.mask, qparams), qparams


def gradients(y: Tensor, dy: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, leaves, dy))


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in tensors]


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many blocks":
        monkeypatch.setattr(module, "CACHE_ELEMENTS", {"cpu": 1})
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", {"cpu": 1})
        monkeypatch.setattr(module, "MIN_ROWS", 16)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scaling", [2.0, 0.7])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sparse_equals_the_plain_formula(
    base_dtype: torch.dtype, scaling: float, shape: tuple[int, int, int]
) -> None:
    case = Case(*shape)
    base = keep_nonzero(case.weight.to(base_dtype), case.mask)
    storage = None if base_dtype == torch.float32 else base_dtype
    x, A, B, bias = leaves(case.x, case.A, case.B, case.bias)
    W = adapted_weight(base, A, B, scaling=scaling, mask=case.mask, storage_dtype=storage)
    expected = F.linear(x, W, bias)
    y = adapted_linear(x, base, A, B, bias, scaling=scaling, storage_dtype=storage)
    built = WeightBlocks(base, A.detach(), B.detach(), scaling, None, storage)
    assert torch.equal(built.build(slice(0, shape[0]), torch.float32), W)
    assert torch.equal(y, expected)
    for found, wanted in zip(
        gradients(y, case.dy, x, A, B, bias), gradients(expected, case.dy, x, A, B, bias), strict=True
    ):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
@pytest.mark.parametrize("latents", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_quantized_equals_the_plain_formula(
    trained: bool, latents: bool, bits: int, symmetric: bool, shape: tuple[int, int, int]
) -> None:
    case = Case(*shape)
    latent, grid = case.grid(bits, symmetric)
    decoded = decode_latent(latent, grid)
    change = torch.rand(grid.scale.shape, generator=case.generator) * 0.4 - 0.2
    x, A, B, scale = leaves(case.x, case.A, case.B, grid.scale * (1 + change * trained))
    settings: dict[str, Any] = {"scaling": 1.3, "qparams": grid, "scale": scale if trained else None}
    W = adapted_weight(decoded, A, B, mask=case.mask, **settings)
    expected = F.linear(x, W)
    y = adapted_linear(x, latent if latents else decoded, A, B, **settings)
    assert torch.equal(y, expected)
    codes = adapted_codes(decoded, A, B, scaling=1.3, mask=case.mask, qparams=grid)
    assert torch.equal(W.detach(), dequantize(codes, replace(grid, scale=scale.detach())))
    assert bits == 8 or (codes != quantize(decoded, grid)).any()
    wrt = [x, A, B, *([scale] if trained else [])]
    for found, wanted in zip(gradients(y, case.dy, *wrt), gradients(expected, case.dy, *wrt), strict=True):
        torch.testing.assert_close(found, wanted, atol=5e-5, rtol=2e-5)


@pytest.mark.parametrize("shape", [(192, 576), (576, 576), (1536, 576), (576, 1536)])
@pytest.mark.parametrize(("rank", "scaling"), [(32, 2.0), (24, 64 / 28), (16, 1.7)])
def test_values_at_the_shapes_of_a_real_model(rank: int, scaling: float, shape: tuple[int, int]) -> None:
    case = Case(*shape, rank, group=64)
    A, B = case.A * 0.1, case.B * 0.1
    latent, grid = case.grid(4, True)
    decoded, rows = decode_latent(latent, grid), slice(0, shape[0])
    wanted = adapted_weight(decoded, A, B, scaling=scaling, mask=case.mask, qparams=grid)
    built = WeightBlocks(latent, A, B, scaling, grid, None).build(rows, torch.float32)
    assert torch.equal(built, wanted)
    base = keep_nonzero(case.weight.bfloat16(), case.mask)
    wanted = adapted_weight(base, A, B, scaling=scaling, mask=case.mask, storage_dtype=torch.bfloat16)
    built = WeightBlocks(base, A, B, scaling, None, torch.bfloat16).build(rows, torch.float32)
    assert torch.equal(built, wanted)


def test_the_clamp_is_respected() -> None:
    case = Case(16, 32, 2)
    latent, grid = case.grid(4, True)
    A, B = leaves(case.A * 50, case.B)
    y = adapted_linear(case.x, latent, A, B, scaling=1.0, qparams=grid)
    W = adapted_weight(decode_latent(latent, grid), A, B, scaling=1.0, mask=case.mask, qparams=grid)
    wanted = gradients(F.linear(case.x, W), case.dy, A, B)
    assert ((W - decode_latent(latent, grid)).abs() > 0).any()
    for found, want in zip(gradients(y, case.dy, A, B), wanted, strict=True):
        torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-5)


def test_lowrank_gradient_leaves_the_mask_out() -> None:
    case = Case(20, 32, 4)
    base = keep_nonzero(case.weight, case.mask)
    x, A, B = leaves(case.x, case.A, case.B)
    y = adapted_linear(x, base, A, B, scaling=2.0, gradient="lowrank")
    assert torch.equal(y, adapted_linear(x, base, A, B, scaling=2.0))
    unmasked = F.linear(x, base + 2.0 * B @ A)
    dx, dA, dB = gradients(y, case.dy, x, A, B)
    _, wanted_A, wanted_B = gradients(unmasked, case.dy, x, A, B)
    torch.testing.assert_close(dA, wanted_A, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dB, wanted_B, atol=1e-5, rtol=1e-5)
    exact = adapted_linear(x, base, A, B, scaling=2.0)
    torch.testing.assert_close(dx, gradients(exact, case.dy, x)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [{"gradient": "lowrank"}, {"kernels": "triton"}])
def test_trained_scales_need_the_exact_gradient_by_torch(settings: Any) -> None:
    case = Case(16, 32, 2)
    latent, grid = case.grid(4, True)
    scale = grid.scale.clone().requires_grad_()
    with pytest.raises(AdapterError, match="trained scales need the"):
        adapted_linear(case.x, latent, case.A, case.B, scaling=1.0, qparams=grid, scale=scale, **settings)


def test_a_trained_scale_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The straight-through formula by autograd: codes as constants plus the update that moves them."""
    case = Case(24, 64, 3)
    latent, grid = case.grid(4, True)
    base, scale = decode_latent(latent, grid), grid.scale * 1.1
    leaves32 = leaves(case.A, case.B, scale)
    y = adapted_linear(case.x, latent, *leaves32[:2], scaling=1.3, qparams=grid, scale=leaves32[2])
    found = gradients(y, case.dy, *leaves32)

    A, B, trained = (t.double().requires_grad_() for t in (case.A, case.B, scale))
    groups, step = (grid.scale.shape[1], -1), grid.scale.double()[..., None]
    steps = (base.double() + case.mask * (B @ A) * 1.3).unflatten(1, groups) / step
    codes = adapted_codes(base, case.A, case.B, scaling=1.3, mask=case.mask, qparams=grid)
    hard = codes.double().unflatten(1, groups) - 8
    inside = (steps.round() == hard).double()
    soft = steps * inside + (hard - steps * inside).detach()
    wanted = torch.autograd.grad(
        F.linear(case.x.double(), (soft * trained[..., None]).flatten(1)), (A, B, trained), case.dy.double()
    )
    for gradient, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient.double(), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("gradient", ["exact", "lowrank"])
def test_nothing_the_size_of_a_weight_is_saved(gradient: Any) -> None:
    case = Case(64, 96, 4)
    latent, grid = case.grid(4, True)
    x, A, B = leaves(case.x, case.A, case.B)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adapted_linear(x, latent, A, B, scaling=1.0, qparams=grid, gradient=gradient)
        adapted_linear(x, latent, A, B, scaling=1.0, qparams=grid, gradient=gradient)
    resident = {t.data_ptr() for t in (x, A, B, latent, grid.scale, grid.zero_point)}
    assert {t.data_ptr() for t in saved} == resident


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_the_weight_in_float32(dtype: torch.dtype) -> None:
    case = Case(32, 64, 4)
    base = keep_nonzero(case.weight, case.mask)
    x, A, B = leaves(case.x, case.A, case.B)
    with torch.autocast("cpu", dtype=dtype):
        y = adapted_linear(x, base, A, B, scaling=2.0)
    W = adapted_weight(base, A, B, scaling=2.0, mask=case.mask)
    assert y.dtype == dtype
    assert torch.equal(y, F.linear(x.to(dtype), W.to(dtype)))
    found = gradients(y, case.dy.to(dtype), x, A, B)
    wanted = gradients(F.linear(x, W), case.dy, x, A, B)
    for f, w in zip(found, wanted, strict=True):
        assert f.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(f.flatten(), w.flatten(), dim=0) > 0.999


def test_frozen_inputs_cost_nothing() -> None:
    case = Case(16, 32, 2)
    base = keep_nonzero(case.weight, case.mask)
    (A,) = leaves(case.A)
    y = adapted_linear(case.x, base, A, case.B, scaling=1.0)
    W = adapted_weight(base, A, case.B, scaling=1.0, mask=case.mask)
    wanted = gradients(F.linear(case.x, W), case.dy, A)
    torch.testing.assert_close(gradients(y, case.dy, A), wanted, atol=1e-5, rtol=1e-5)


def test_checkpointing_gives_the_same_gradients() -> None:
    case = Case(32, 32, 4)
    base = keep_nonzero(case.weight, case.mask)
    results = []
    for recompute in (False, True):
        x, A, B = leaves(case.x, case.A, case.B)

        def layer(x: Tensor, A: Tensor = A, B: Tensor = B) -> Tensor:
            return adapted_linear(x, base, A, B, scaling=2.0)

        y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        results.append(gradients(y, case.dy, x, A, B))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)], ids=["aot_eager", "inductor"]
)
@pytest.mark.parametrize("gradient", ["exact", "lowrank"])
@pytest.mark.parametrize("quantized", [False, True])
def test_compile_gives_the_same_result(
    quantized: bool, gradient: Any, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # torch.compile cannot trace its checks
    if backend == "inductor" and shutil.which("gcc") is None:
        pytest.skip("Inductor compiles with gcc")
    case = Case(32, 32, 4)
    base, grid = case.grid(4, True) if quantized else (keep_nonzero(case.weight, case.mask), None)

    def layer(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        y = adapted_linear(x, base, A, B, bias, scaling=4.0, qparams=grid, gradient=gradient)
        return torch.tanh(y)

    torch.compiler.reset()
    results = []
    for run in (layer, torch.compile(layer, backend=backend)):
        inputs = leaves(case.x, case.A, case.B, case.bias)
        y = run(*inputs)
        results.append([y, *gradients(y, case.dy, *inputs)])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-5)
