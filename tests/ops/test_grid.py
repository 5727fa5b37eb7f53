"""The integer grid against its formula, number by number, and its gradients against what they should be."""

import pytest
import torch
from torch import Tensor

from sqft.errors import CompressionError
from sqft.ops import GridSpec, QParams, compute_qparams, dequantize, fake_quantize, quantize
from sqft.ops.grid import SMALLEST_SCALE, round_scale

GRIDS = [(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]


def slow_codes(weight: Tensor, grid: QParams) -> list[list[int]]:
    """clamp(round(w / s) + z, 0, 2^bits - 1), in Python's own numbers, half to even."""
    size = weight.shape[1] // grid.scale.shape[1]
    return [
        [
            min(
                max(
                    round(float(weight[i, j] / grid.scale[i, j // size]))
                    + int(grid.zero_point[i, j // size]),
                    0,
                ),
                2**grid.bits - 1,
            )
            for j in range(weight.shape[1])
        ]
        for i in range(weight.shape[0])
    ]


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
@pytest.mark.parametrize("group_size", [8, -1])
def test_codes_and_values_are_those_of_the_formula(bits: int, symmetric: bool, group_size: int) -> None:
    weight = torch.randn(5, 24) * torch.tensor([1.0, 1e-3, 30.0, 0.2, 1.0])[:, None]
    grid = compute_qparams(weight, GridSpec(bits, group_size, symmetric))
    codes = quantize(weight, grid)
    assert codes.tolist() == slow_codes(weight, grid)
    size = 24 if group_size == -1 else group_size
    values = dequantize(codes, grid)
    for i, j in ((0, 0), (2, 7), (4, 23)):
        step = int(codes[i, j]) - int(grid.zero_point[i, j // size])
        assert float(values[i, j]) == step * float(grid.scale[i, j // size])
    assert torch.equal(quantize(values, grid), codes)  # a grid point is its own nearest


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_zero_is_on_every_grid_and_every_weight_is_within_half_a_step(bits: int, symmetric: bool) -> None:
    weight = torch.randn(6, 32) + (0.0 if symmetric else 5.0)  # all above 0: the range is extended to hold it
    weight[:, ::3] = 0
    grid = compute_qparams(weight, GridSpec(bits, 16, symmetric))
    error = (dequantize(quantize(weight, grid), grid) - weight).abs()
    assert not error[weight == 0].any()
    scale = grid.scale.repeat_interleave(16, dim=1)
    # Rounding the scale to 8 bits may cut the largest weight by 2^(bits - 1) * 2^-8 of a step; a zero point
    # that is rounded to an integer may cut the end of a range by half a step.
    limit = 0.5 + 2.0 ** (bits - 9) + (0.0 if symmetric else 0.5)
    assert (error <= limit * scale).all()


@pytest.mark.parametrize("scale_bits", [4, 7, 8, 11])
def test_a_scale_has_few_significant_bits_and_is_never_0(scale_bits: int) -> None:
    scale = round_scale(torch.cat([torch.rand(200) * 3, torch.zeros(1), torch.full((1,), 1e-30)]), scale_bits)
    mantissa, _ = torch.frexp(scale)
    assert torch.equal(mantissa * 2**scale_bits, (mantissa * 2**scale_bits).round())
    assert float(scale.min()) == SMALLEST_SCALE
    assert torch.equal(scale.half().float(), scale)


def test_the_gradient_passes_where_nothing_was_clamped() -> None:
    grid = QParams(torch.full((1, 1), 0.5), torch.full((1, 1), 2, dtype=torch.uint8), 2, True)
    weight = torch.tensor([[-1.6, -0.9, 0.2, 0.3, 0.9]], requires_grad=True)  # grid: -1, -0.5, 0, 0.5
    value = fake_quantize(weight, grid)
    assert value.tolist() == [[-1.0, -1.0, 0.0, 0.5, 0.5]]
    value.backward(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]))
    assert weight.grad is not None
    assert weight.grad.tolist() == [[0.0, 2.0, 3.0, 4.0, 0.0]]


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(CompressionError, match="group size 5 does not divide the width 24"):
        compute_qparams(torch.randn(2, 24), GridSpec(4, 5, True))
