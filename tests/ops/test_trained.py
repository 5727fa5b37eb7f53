import pytest
import torch

from sqft.ops.grid import round_scale
from sqft.ops.trained import significant_bits, trained_norm, trained_scale


def test_no_change_is_the_base() -> None:
    base = torch.tensor([[3e-6, 0.0173, 1.0]])  # of others: below the smallest scale, and of 24 bits
    assert torch.equal(trained_scale(base, torch.zeros(1, 3), 8), base)
    norm = torch.randn(9).bfloat16()
    assert torch.equal(trained_norm(norm, torch.zeros(9), torch.bfloat16), norm.float())


@pytest.mark.parametrize("bits", [7, 8, 11])
def test_a_trained_scale_is_of_the_bits_that_are_stored(bits: int) -> None:
    base = round_scale(torch.rand(40, 5) * 0.1 + 1e-3, bits)
    change = torch.randn(40, 5) * 0.05
    scale = trained_scale(base, change, bits)
    assert torch.equal(scale, round_scale(base * (1 + change), bits))
    again = trained_scale(base, scale / base - 1, bits)  # how a stored scale is read
    assert torch.equal(again, scale)
    assert significant_bits(scale) <= bits
    stored = torch.float16 if bits > 8 else torch.bfloat16
    assert torch.equal(scale.to(stored).float(), scale)


def test_a_scale_does_not_fall_below_what_16_bits_hold() -> None:
    base = torch.tensor([[2.0**-13, 2.0**-20]])
    found = trained_scale(base, torch.tensor([[-0.9, -0.9]]), 8)
    assert torch.equal(found, torch.tensor([[2.0**-14, 2.0**-20]]))


def test_gradients_pass_straight_through_the_rounding() -> None:
    base, change = torch.rand(4, 3) + 0.5, (torch.randn(4, 3) * 0.1).requires_grad_()
    weight = torch.randn(4, 3)
    (trained_scale(base, change, 8) * weight).sum().backward()
    assert torch.equal(change.grad, weight * base)  # type: ignore[arg-type]
    norm = torch.randn(6, requires_grad=True)
    (trained_norm(torch.ones(6), norm, torch.float16) * 3).sum().backward()
    assert torch.equal(norm.grad, torch.full((6,), 3.0))  # type: ignore[arg-type]


def test_significant_bits() -> None:
    assert significant_bits(torch.tensor([1.0, 0.5, 4.0])) == 1
    assert significant_bits(torch.tensor([1.0, 0.75])) == 2
    assert significant_bits(torch.tensor([255.0])) == 8
    assert significant_bits(torch.tensor([1.0 + 2.0**-23])) == 24
    for bits in (7, 8, 11):
        assert significant_bits(round_scale(torch.rand(500), bits)) == bits
