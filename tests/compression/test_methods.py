"""Each method against a slow, obvious version of itself."""

from dataclasses import replace

import pytest
import torch
from tests.compression.tiny_runs import hessian_of, inputs
from torch import Tensor

from sqft.compression.gptq import gptq
from sqft.compression.rtn import rtn
from sqft.compression.statistics import TILE, Hessian, InputNorm, factor_inverse
from sqft.compression.wanda import wanda_scores
from sqft.errors import CompressionError
from sqft.ops import GridSpec, compute_qparams, dequantize, mask_rows, quantize


def test_statistics() -> None:
    x = inputs(columns=TILE + 40)
    hessian, norm = Hessian(x.shape[1], x.device), InputNorm(x.shape[1], x.device)
    for batch in x.split(7):
        hessian.update(batch)
        norm.update(batch)
    assert torch.allclose(hessian.matrix(), x.T @ x / len(x), rtol=1e-4, atol=1e-2)
    assert torch.equal(hessian.matrix(), hessian.matrix().T)
    assert torch.allclose(norm.norm, x.square().sum(0).sqrt())
    assert torch.allclose(hessian.norm, norm.norm)
    assert norm.num_tokens == hessian.num_tokens == len(x)


def test_factor_of_the_inverse() -> None:
    matrix = hessian_of(inputs()).matrix()
    factor, damping = factor_inverse(matrix, 0.01)
    damped = matrix + 0.01 * matrix.diagonal().mean() * torch.eye(24)
    assert damping == 0.01
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.T @ factor, torch.linalg.inv(damped), rtol=1e-3, atol=1e-6)


def test_singular_hessian_takes_more_damping() -> None:
    x = inputs(tokens=4) * 1e3
    factor, damping = factor_inverse(hessian_of(x).matrix(), 1e-12)
    assert 1e-12 < damping <= 1
    assert torch.isfinite(factor).all()
    with pytest.raises(CompressionError, match="cannot be factorised"):
        factor_inverse(torch.full((3, 3), torch.nan), 0.01)


def test_wanda_literally() -> None:
    weight, x = torch.randn(6, 24), inputs()
    norm = InputNorm(24, x.device)
    norm.update(x)
    scores = wanda_scores(weight, norm.norm)
    for row in range(6):
        for column in range(24):
            expected = abs(weight[row, column]) * x[:, column].norm()
            assert torch.isclose(scores[row, column], expected, rtol=1e-4)


def slow_gptq(
    weight: Tensor, mask: Tensor, x: Tensor, order: list[int], grid: GridSpec, static: bool
) -> tuple[Tensor, Tensor]:
    """Optimal brain quantization column by column, the inverse of what is left taken anew each time."""
    columns = weight.shape[1]
    size = grid.group_size
    hessian = (x.T @ x / len(x)).double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(columns)
    work, before = weight.double().clone(), torch.empty_like(weight).double()
    first = compute_qparams(torch.where(mask, weight, 0), grid)
    scale, zero = first.scale.clone(), first.zero_point.clone()
    for step, j in enumerate(order):
        if not static and j % size == 0:
            part = slice(j, j + size)
            fresh = compute_qparams(torch.where(mask[:, part], work[:, part], 0).float(), grid)
            scale[:, j // size], zero[:, j // size] = fresh.scale[:, 0], fresh.zero_point[:, 0]
        s, z = scale[:, j // size].double(), zero[:, j // size].double()
        before[:, j] = work[:, j]
        codes = (torch.round(work[:, j] / s) + z).clamp(0, 2**grid.bits - 1)
        value = torch.where(mask[:, j], (codes - z) * s, 0)
        rest = order[step:]
        inverse = torch.linalg.inv(hessian[rest][:, rest])
        error = (work[:, j] - value) / inverse[0, 0]
        work[:, rest] -= error[:, None] * inverse[0][None, :]
        work[:, j] = value
    return work.float(), before.float()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("group_size", "activation_order"), [(8, False), (96, False), (-1, False), (8, True)]
)
def test_gptq_against_obq(symmetric: bool, bits: int, group_size: int, activation_order: bool) -> None:
    columns = 288  # more than two blocks, which groups of 96 cross
    generator = torch.Generator().manual_seed(3)
    x, weight = inputs(600, columns, seed=1), torch.randn(5, columns, generator=generator)
    mask = torch.rand(weight.shape, generator=generator) > 0.5
    grid = GridSpec(bits, columns if group_size == -1 else group_size, symmetric)
    hessian = hessian_of(x)
    got = gptq(
        weight,
        mask,
        hessian,
        replace(grid, group_size=group_size),
        damping=0.01,
        activation_order=activation_order,
    )
    order = (
        torch.argsort(hessian.norm, descending=True).tolist() if activation_order else list(range(columns))
    )
    expected, before = slow_gptq(weight, mask, x, order, grid, activation_order)
    value = dequantize(got.codes, got.qparams)
    assert (value[~mask] == 0).all()
    assert (got.before_rounding[~mask] == 0).all()
    # float32 and float64 fall to other sides of a rounding now and then; errors must be as small
    agree = torch.isclose(value, expected, rtol=1e-4, atol=1e-4).float().mean()
    assert agree > 0.9, agree

    def loss(w: Tensor) -> float:
        return float(((w - weight) @ x.T).square().sum())

    assert loss(value) < 1.03 * loss(expected)
    assert torch.allclose(got.before_rounding[mask][:50], before[mask][:50], rtol=1e-2, atol=1e-2)
    assert torch.equal(got.codes, quantize(got.before_rounding, got.qparams))


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_beats_rounding(bits: int) -> None:
    x, weight = inputs(400, 64), torch.randn(16, 64)
    options = GridSpec(bits, 32, True)
    nearest = rtn(weight, None, options)
    best = gptq(weight, None, hessian_of(x), options, damping=0.01)
    losses = [
        ((dequantize(r.codes, r.qparams) - weight) @ x.T).square().sum().item() for r in (best, nearest)
    ]
    assert losses[0] < 0.8 * losses[1]


def test_rtn_keeps_the_mask() -> None:
    weight = torch.randn(8, 64)
    mask = mask_rows(weight.abs(), 0.5)
    rounded = rtn(weight, mask, GridSpec(4, 32, False))
    assert (dequantize(rounded.codes, rounded.qparams)[~mask] == 0).all()


def test_width_that_no_group_divides() -> None:
    for method in (rtn, lambda w, m, o: gptq(w, m, hessian_of(inputs()), o, damping=0.01)):
        with pytest.raises(CompressionError, match="group size 16 does not divide the width 24"):
            method(torch.randn(2, 24), None, GridSpec(4, 16, True))


def test_dead_inputs_do_no_harm() -> None:
    x = inputs()
    x[:, 3] = 0
    hessian, weight = hessian_of(x), torch.randn(4, 24)
    assert hessian.num_dead == 1
    rounded = gptq(weight, None, hessian, GridSpec(4, 8, True), damping=0.01)
    assert torch.isfinite(rounded.before_rounding).all()
    assert rounded.before_rounding[0, 3] == weight[0, 3]
