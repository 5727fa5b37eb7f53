"""The adapted weight against its formula in float64, entry by entry, in all four combinations."""

import pytest
import torch

from sqft.ops import GridSpec, adapted_codes, adapted_weight, compute_qparams, dequantize, quantize
from sqft.ops.adapted import low_rank_delta, round_storage

SCALING = 0.75


@pytest.fixture
def parts() -> dict[str, torch.Tensor]:
    base = torch.randn(6, 16)
    mask = torch.rand(6, 16) < 0.5
    return {
        "base": base * mask,
        "low": torch.randn(3, 16) * 0.2,
        "high": torch.randn(6, 3) * 0.2,
        "mask": mask,
    }


def by_hand(parts: dict[str, torch.Tensor], *, masked: bool) -> torch.Tensor:
    """base + mask * (B A) * scaling in float64, one entry at a time."""
    base, low, high = (parts[name].double() for name in ("base", "low", "high"))
    out = base.clone()
    for i in range(6):
        for j in range(16):
            if not masked or parts["mask"][i, j]:
                out[i, j] += sum(high[i, r] * low[r, j] for r in range(3)) * SCALING
    return out


@pytest.mark.parametrize("masked", [True, False])
def test_the_update_falls_where_the_mask_lets_it(parts: dict[str, torch.Tensor], masked: bool) -> None:
    mask = parts["mask"] if masked else None
    found = adapted_weight(parts["base"], parts["low"], parts["high"], scaling=SCALING, mask=mask)
    torch.testing.assert_close(found.double(), by_hand(parts, masked=masked), rtol=0, atol=1e-6)
    if masked:
        assert not found[~parts["mask"]].any()


def test_codes_and_the_weight_on_the_grid_are_one_and_the_same(parts: dict[str, torch.Tensor]) -> None:
    grid = compute_qparams(parts["base"], GridSpec(4, 8, True))
    arguments = (parts["base"], parts["low"], parts["high"])
    codes = adapted_codes(*arguments, scaling=SCALING, mask=parts["mask"], qparams=grid)
    value = adapted_weight(*arguments, scaling=SCALING, mask=parts["mask"], qparams=grid)
    assert torch.equal(dequantize(codes, grid), value)
    plain = adapted_weight(*arguments, scaling=SCALING, mask=parts["mask"])
    assert torch.equal(quantize(plain, grid), codes)
    assert (codes == 8)[~parts["mask"]].all()  # the code of 0


def test_a_lower_rank_is_a_slice_of_the_same_update(parts: dict[str, torch.Tensor]) -> None:
    low, high = parts["low"], parts["high"]
    one = low_rank_delta(low[:1], high[:, :1], SCALING)
    rest = low_rank_delta(low[1:], high[:, 1:], SCALING)
    torch.testing.assert_close(one + rest, low_rank_delta(low, high, SCALING), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_storage_is_rounded_and_the_gradient_passes(
    parts: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    weight = torch.randn(4, 8, requires_grad=True)
    rounded = round_storage(weight, dtype)
    assert torch.equal(rounded, weight.to(dtype).float())
    assert not torch.equal(rounded, weight)
    rounded.backward(torch.full((4, 8), 2.0))
    assert weight.grad is not None
    assert (weight.grad == 2.0).all()


def test_autocast_changes_no_bit(parts: dict[str, torch.Tensor]) -> None:
    arguments = (parts["base"], parts["low"], parts["high"])
    plain = adapted_weight(*arguments, scaling=SCALING, mask=parts["mask"])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adapted_weight(*arguments, scaling=SCALING, mask=parts["mask"]), plain)
