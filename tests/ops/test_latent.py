"""The latent keeps the code exactly and the weight to a sixteenth of a step; a zero stays the only zero."""

import pytest
import torch

from sqft.ops import (
    GridSpec,
    compute_qparams,
    decode_latent,
    dequantize,
    encode_latent,
    latent_codes,
    quantize,
)

GRIDS = [(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
@pytest.mark.parametrize("masked", [True, False])
def test_code_fraction_and_mask_come_back(bits: int, symmetric: bool, masked: bool) -> None:
    weight = torch.randn(7, 32)
    mask = torch.rand(7, 32) < 0.6 if masked else None
    pruned = weight if mask is None else weight * mask
    grid = compute_qparams(pruned, GridSpec(bits, 8, symmetric))
    codes = quantize(pruned, grid)
    latent = encode_latent(pruned, codes, mask, grid)
    assert latent.dtype == (torch.uint8 if bits <= 4 else torch.int16)
    assert torch.equal(latent_codes(latent), codes)
    decoded = decode_latent(latent, grid)
    assert torch.equal(quantize(decoded, grid), codes)  # training starts from the very model
    kept = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    assert torch.equal(decoded != 0, kept)
    scale = grid.scale.repeat_interleave(8, dim=1)
    value = dequantize(codes, grid)
    inside = (pruned - value).abs() <= scale * 7 / 16
    # Half of a sixteenth, and one more where a kept weight would be 0 and is nudged.
    limit = torch.where(value == 0, 3 / 32, 1 / 32) + 1e-5
    assert ((decoded - pruned).abs() <= limit * scale)[inside & kept].all()


def test_a_distance_of_more_than_seven_sixteenths_is_cut() -> None:
    weight = torch.tensor([[0.0, 3.0, 3.49, 2.51, 9.0, 0.0, 0.0, 7.0]])
    grid = compute_qparams(torch.full((1, 8), 7.0), GridSpec(4, 8, True))
    assert grid.scale.item() == 1.0
    codes = quantize(weight, grid)
    decoded = decode_latent(encode_latent(weight, codes, None, grid), grid)
    # kept zeros get a fraction of 1/16; 9 is cut to the last code, 7, and 7/16 above it.
    assert decoded.tolist() == [[1 / 16, 3.0, 3 + 7 / 16, 3 - 7 / 16, 7 + 7 / 16, 1 / 16, 1 / 16, 7.0]]


def test_a_pruned_weight_has_the_code_of_zero_whatever_it_was() -> None:
    weight = torch.randn(4, 16) + 3
    grid = compute_qparams(weight, GridSpec(4, 16, False))
    mask = torch.zeros(4, 16, dtype=torch.bool)
    latent = encode_latent(weight, quantize(weight, grid), mask, grid)
    assert torch.equal(latent_codes(latent), grid.zero_point.expand(4, 16))
    assert not decode_latent(latent, grid).any()


def test_a_base_that_is_kept_decoded_is_taken_as_it_is() -> None:
    base = torch.randn(3, 8)
    grid = compute_qparams(base, GridSpec(4, 8, True))
    assert torch.equal(decode_latent(base, grid), base)
