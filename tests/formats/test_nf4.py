"""NF4 against numbers that bitsandbytes 0.50.2 gave."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sqft.formats.nf4 import NF4, expand_nf4, round_to_nf4, unpack_nf4

RECORDED = load_file(Path(__file__).parent / "nf4_reference.safetensors")


def slow_nf4(weight: Tensor) -> Tensor:
    """Block by block, value by value, the nearest of the 16 numbers."""
    values = weight.float().flatten()
    result = torch.empty_like(values)
    for start in range(0, len(values), 64):
        block = values[start : start + 64]
        largest = block.abs().max()
        for place, value in enumerate(block):
            nearest = min(NF4, key=lambda number: abs(number * largest - value))
            result[start + place] = nearest * largest
    return result.view(weight.shape).to(weight.dtype)


def test_the_table_is_that_of_bitsandbytes() -> None:
    assert torch.equal(torch.tensor(NF4), RECORDED["plain.weight.quant_map"])


@pytest.mark.parametrize("case", ["plain", "half"])
def test_rounding_gives_the_codes_of_bitsandbytes(case: str) -> None:
    dense = RECORDED[f"{case}.dense"]
    codes = unpack_nf4(RECORDED[f"{case}.weight"])
    expected = expand_nf4(codes, RECORDED[f"{case}.weight.absmax"]).view(dense.shape).to(dense.dtype)
    assert torch.equal(round_to_nf4(dense), expected)
    torch.testing.assert_close(round_to_nf4(dense), slow_nf4(dense))


def test_the_rounded_weight_is_what_bitsandbytes_multiplies_with() -> None:
    assert torch.equal(round_to_nf4(RECORDED["plain.dense"]), RECORDED["plain.dequantized"])


def test_zeros_stay_zeros_and_do_not_become_nan() -> None:
    assert not round_to_nf4(torch.zeros(3, 50)).any()
    assert not RECORDED["plain.dense"].flatten()[64:128].any()  # the recorded weight has such a block too
