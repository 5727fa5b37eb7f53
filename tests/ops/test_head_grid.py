"""The grid of 8 bits for embedding and head: exact in float16, found again from the values alone."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize
from gguf.quants import quantize as gguf_quantize

from sqft.errors import CompressionError
from sqft.formats.gguf_blocks import pack_blocks
from sqft.ops import dequantize
from sqft.ops.head_grid import head_codes, head_weight, round_head


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 300.0])
def test_what_is_rounded_is_found_again(size: float) -> None:
    weight = torch.randn(70, 96) * size * torch.logspace(-2, 0, 70)[:, None]
    weight[3], weight[4, 5:] = 0, 0
    rounded = round_head(weight)
    found = head_codes(rounded)
    assert found is not None
    codes, qparams = found.codes, found.qparams
    assert torch.equal(dequantize(codes, qparams), rounded.float())  # in float16, with nothing lost
    assert torch.equal(head_weight(found), rounded)
    assert torch.equal(qparams.scale.half().float(), qparams.scale)
    assert int((codes.int() - 128).abs().max()) <= 127


def test_it_costs_little_beside_scales_of_sixteen_bits() -> None:
    weight = torch.randn(256, 576) * 0.1
    error = (round_head(weight).float() - weight).norm()
    q8_0 = gguf_dequantize(
        gguf_quantize(weight.numpy(), GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0
    )
    assert error < 1.1 * np.linalg.norm(q8_0 - weight.numpy())


def test_a_reader_of_gguf_finds_the_same_numbers() -> None:
    rounded = round_head(torch.randn(8, 64))
    found = head_codes(rounded)
    assert found is not None
    blocks = pack_blocks(found, GGMLQuantizationType.Q8_0)
    assert np.array_equal(gguf_dequantize(blocks, GGMLQuantizationType.Q8_0), rounded.float().numpy())


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(4, 64).half(),
        round_head(torch.randn(4, 64)).float(),  # another type may hold other numbers as well
        round_head(torch.randn(4, 64))[:, :48],
        torch.full((4, 64), float("nan")).half(),
        torch.zeros(64).half(),
        torch.tensor([[-0.0] + [1.0] * 31]).half(),  # a zero with a sign would come back without it
    ],
)
def test_other_weights_are_on_no_grid(weight: torch.Tensor) -> None:
    assert head_codes(weight) is None


def test_a_weight_beyond_float16_is_told() -> None:
    with pytest.raises(CompressionError, match="beyond float16"):
        round_head(torch.full((1, 32), 1e6))
