"""One weight packed and unpacked, and read as docs/format.md says a stranger would."""

import math

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from sqft.errors import ModelError
from sqft.models.sparse_packing import pack_codes, sparse_specs, sparse_takes_less, unpack_codes
from sqft.ops import mask_pattern, mask_rows


def draw(mask: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes, some of them the zero point's though they are kept, and the zero points of four groups a row."""
    zero = torch.randint(0, 1 << bits, (len(mask), 4)).to(torch.uint8)
    codes = torch.randint(0, 1 << bits, mask.shape).to(torch.uint8)
    return torch.where(mask, codes, zero.repeat_interleave(mask.shape[1] // 4, 1)), zero


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(7, 96), (1, 4), (5, 20)])
def test_a_round_trip(shape: tuple[int, int], bits: int) -> None:
    for sparsity in (0.0, 0.33, 0.5, 1.0):
        mask = mask_rows(torch.rand(shape), sparsity)
        codes, zero = draw(mask, bits)
        packed = pack_codes("x", codes, mask, bits)
        specs = sparse_specs("x", shape, bits, int(mask.sum()))
        assert {key: (t.dtype, tuple(t.shape)) for key, t in packed.items()} == specs
        found = unpack_codes("x", packed.__getitem__, shape[1], bits, zero)
        assert torch.equal(found[0], codes)
        assert torch.equal(found[1], mask)


@pytest.mark.parametrize("bits", [3, 4])
def test_read_as_a_stranger_would(bits: int) -> None:
    """Bit by bit, by the words of the specification."""
    mask = mask_rows(torch.rand(3, 60), 0.45)
    codes, _ = draw(mask, bits)
    packed = pack_codes("x", codes, mask, bits)
    columns, kept = packed["x.weight_mask"].tolist(), packed["x.weight_kept"].tolist()
    found: dict[tuple[int, int], int] = {}
    for row in range(3):
        for column in range(60):
            if columns[row][column // 8] >> column % 8 & 1:
                places = range(bits * len(found), bits * len(found) + bits)
                bit = [kept[place // 8] >> place % 8 & 1 for place in places]
                found[row, column] = sum(one << i for i, one in enumerate(bit))
    assert list(found) == [tuple(place) for place in mask.nonzero().tolist()]
    assert all(int(codes[place]) == code for place, code in found.items())


def test_size() -> None:
    """At 4 bits, 3 bits a weight at 50 % and 2 at 75 %; of hardly sparse weights a mask would be a waste."""
    for pattern, bits in [("16:32 window 2", 3), ("4:16", 2)]:
        kept = int(mask_pattern(torch.rand(64, 1024), pattern).sum())
        size = sum(math.prod(shape) for _, shape in sparse_specs("x", (64, 1024), 4, kept).values())
        assert size * 8 / (64 * 1024) == bits
        assert sparse_takes_less((64, 1024), 4, kept)
    assert not sparse_takes_less((64, 1024), 4, 64 * 1024 * 3 // 4)
    assert sparse_takes_less((64, 1024), 4, 64 * 1024 * 3 // 4 - 32)


def test_what_does_not_fit_is_told() -> None:
    mask = mask_rows(torch.rand(4, 20), 0.5)
    codes, zero = draw(mask, 4)
    packed = pack_codes("x", codes, mask, 4)
    for key in packed:
        for change in (lambda t: t.flatten()[:-1], lambda t: torch.cat([t, t])):
            wrong = packed | {key: change(packed[key])}
            with pytest.raises((ModelError, RuntimeError, TypeCheckError)):  # the last by the tests' own hook
                unpack_codes("x", wrong.__getitem__, 20, 4, zero)
    packed["x.weight_mask"][:, 2] |= 0x10  # behind the last column
    with pytest.raises(ModelError, match="do not fit each other"):
        unpack_codes("x", packed.__getitem__, 20, 4, zero)
