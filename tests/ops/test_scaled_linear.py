from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sqft.ops import GridSpec, QParams, compute_qparams, dequantize, encode_latent, quantize
from sqft.ops import weight_blocks as blocks_module
from sqft.ops.packed import code_steps, pack_codes, unpack_codes
from sqft.ops.scaled_linear import scaled_linear, scaled_weight

SHAPES = [(24, 32), (17, 96), (75, 64)]
GRIDS = [(4, True), (4, False), (2, True), (3, False), (8, True), (8, False)]


def coded(shape: tuple[int, int], bits: int, symmetric: bool, group: int = 32) -> tuple[Tensor, QParams]:
    weight = torch.randn(*shape)
    grid = compute_qparams(weight, GridSpec(bits, group, symmetric))
    return quantize(weight, grid), grid


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many blocks":
        monkeypatch.setattr(blocks_module, "CACHE_ELEMENTS", {"cpu": 1})
        monkeypatch.setattr(blocks_module, "BLOCK_ELEMENTS", {"cpu": 1})
        monkeypatch.setattr(blocks_module, "MIN_ROWS", 16)


@pytest.mark.parametrize("columns", [1, 2, 5, 31, 32, 33, 96])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_come_back_from_their_bytes(bits: int, columns: int) -> None:
    codes = torch.randint(0, 1 << bits, (7, columns), dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    a_byte = {2: 4, 3: 2, 4: 2, 8: 1}[bits]
    assert packed.shape == (7, -(-columns // a_byte))
    assert torch.equal(unpack_codes(packed, bits, columns), codes)


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_steps_times_scale_is_the_weight(bits: int, symmetric: bool) -> None:
    codes, grid = coded((17, 96), bits, symmetric)
    steps = code_steps(pack_codes(codes, bits), grid, torch.full((17, 96), torch.nan))
    scale = grid.scale.repeat_interleave(32, 1)
    assert torch.equal(steps * scale, dequantize(codes, grid))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
@pytest.mark.parametrize("latent", [True, False])
def test_output_and_gradients_are_those_of_the_definition_in_float64(
    latent: bool, bits: int, symmetric: bool, shape: tuple[int, int]
) -> None:
    codes, grid = coded(shape, bits, symmetric)
    x, bias, dy = torch.randn(2, 5, shape[1]), torch.randn(shape[0]), torch.randn(2, 5, shape[0])
    leaves = [t.clone().requires_grad_() for t in (x, grid.scale, bias)]
    stored = encode_latent(dequantize(codes, grid), codes, None, grid) if latent else pack_codes(codes, bits)
    y = scaled_linear(leaves[0], stored, replace(grid, scale=leaves[1]), leaves[2], latent=latent)
    found = torch.autograd.grad(y, leaves, dy)

    exact = [t.double().requires_grad_() for t in (x, grid.scale, bias)]
    groups = (grid.scale.shape[1], -1)
    steps = codes.double().unflatten(1, groups) - grid.zero_point[..., None].double()
    expected = F.linear(exact[0], (steps * exact[1][..., None]).flatten(1), exact[2])
    wanted = torch.autograd.grad(expected, exact, dy.double())
    assert torch.equal(y, F.linear(x, dequantize(codes, grid), bias))
    assert torch.equal(scaled_weight(stored, grid, shape[1], latent=latent), dequantize(codes, grid))
    for gradient, want in zip(found, wanted, strict=True):
        # float32 sums of at most 96 * 10 products against float64 ones
        bound = 1e-5 * float(want.abs().max())
        torch.testing.assert_close(gradient.double(), want, atol=bound, rtol=1e-5)


def test_only_what_is_asked_for_has_a_gradient() -> None:
    codes, grid = coded((17, 96), 4, True)
    packed, x = pack_codes(codes, 4), torch.randn(3, 96)
    scale = grid.scale.clone().requires_grad_()
    scaled_linear(x, packed, replace(grid, scale=scale)).sum().backward()
    assert scale.grad is not None
    x.requires_grad_()
    scaled_linear(x, packed, grid).sum().backward()
    assert torch.allclose(x.grad, dequantize(codes, grid).sum(0).expand(3, -1), atol=1e-5)  # type: ignore[arg-type]


def test_nothing_the_size_of_a_weight_is_kept_for_backward() -> None:
    codes, grid = coded((64, 96), 4, True)
    packed, x = pack_codes(codes, 4), torch.randn(3, 96, requires_grad=True)
    scale = grid.scale.clone().requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        scaled_linear(x, packed, replace(grid, scale=scale))
    resident = {t.data_ptr() for t in (x, packed, scale, grid.zero_point)}
    assert {t.data_ptr() for t in saved} <= resident


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_weight_is_computed_in_float32(dtype: torch.dtype) -> None:
    codes, grid = coded((24, 32), 4, True)
    x, scale = torch.randn(6, 32), grid.scale.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = scaled_linear(x, pack_codes(codes, 4), replace(grid, scale=scale))
    assert torch.equal(y, F.linear(x.to(dtype), dequantize(codes, grid).to(dtype)))
    y.sum().backward()
    assert scale.grad is not None
    assert scale.grad.dtype == torch.float32
