"""The compiled CPU kernels against what they should compute, whatever instructions the machine has."""

import mmap
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sqft.kernels.packed_matrix import (
    INSTRUCTIONS,
    LAYOUTS,
    HugePages,
    Layout,
    PackedMatrix,
    instruction_set,
    kernel_library,
    kernel_scales,
    use_instruction_set,
)
from sqft.kernels.reference import multiply_reference, quantize_activations
from sqft.ops import mask_pattern

pytestmark = pytest.mark.skipif(kernel_library() is None, reason="there is no C compiler here")

# rows, columns: less than 8 rows, rows that end inside a stripe, one block, many blocks, ends of half a group
SHAPES = [(1, 32), (7, 64), (8, 96), (19, 576), (64, 160), (33, 1536)]
ODD_SHAPES = [(3, 1), (9, 31), (5, 33), (17, 100), (8, 250)]
PATTERNED = [layout for layout, holds in LAYOUTS.items() if ":" in holds]
FREE: list[Layout] = ["dense", "mask", "bytes"]


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set up to the machine's own."""
    best = instruction_set()
    if use_instruction_set(request.param) != request.param:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    assert best is not None
    use_instruction_set(best)


def draw_steps(layout: Layout, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Steps that a layout holds, all values among them, zeros where they may be."""
    largest = 127 if layout == "bytes" else 7
    lowest = -127 if layout == "bytes" else -8
    steps = torch.randint(lowest, largest + 1, (rows, columns), generator=generator, dtype=torch.int8)
    steps[0, : largest - lowest + 1] = torch.arange(lowest, largest + 1, dtype=torch.int8)[:columns]
    scores = torch.rand(rows, columns, generator=generator)
    if layout == "mask":
        return steps * (scores > torch.rand(rows, 1, generator=generator))
    return steps if layout in FREE else steps * mask_pattern(scores, LAYOUTS[layout])


def draw_scale(rows: int, groups: int, generator: torch.Generator) -> Tensor:
    return (torch.rand(rows, groups, generator=generator) + 0.01).half().float()


def close(found: Tensor, expected: Tensor) -> bool:
    """Blocks are added up in float32, in any order."""
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("group_size", [32, 64])
def test_products(layout: Layout, group_size: int, instructions: str) -> None:
    generator = torch.Generator().manual_seed(group_size)
    for rows, columns in [*SHAPES, *(ODD_SHAPES if layout in FREE else [])]:
        if columns % group_size and group_size < columns:
            continue
        groups = -(-columns // group_size)
        steps = draw_steps(layout, rows, columns, generator)
        scale = draw_scale(rows, groups, generator)
        packed = PackedMatrix.pack(steps, scale, layout)
        found_steps, found_scale = packed.unpack()
        assert torch.equal(found_steps, steps)
        kernel_scale, kernel_size = kernel_scales(scale, columns)
        assert torch.equal(found_scale, kernel_scale.float())
        for batch in (1, 2, 3, 7, 8, 13):
            x = torch.randn(batch, columns, generator=generator)
            expected = multiply_reference(steps, found_scale, kernel_size, x)
            for threads in (1, 2, 5):
                assert close(packed.multiply(x, threads=threads), expected), (rows, columns, batch, threads)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_instructions_give_nearly_the_same_and_each_always_the_same(layout: Layout) -> None:
    best = instruction_set()
    assert best is not None
    generator = torch.Generator().manual_seed(1)
    steps, scale = draw_steps(layout, 40, 768, generator), draw_scale(40, 24, generator)
    packed, x = PackedMatrix.pack(steps, scale, layout), torch.randn(5, 768, generator=generator)
    results = []
    for name in INSTRUCTIONS:
        use_instruction_set(name)
        results.append(packed.multiply(x))
        for threads in (1, 2, 3, 16):
            assert torch.equal(packed.multiply(x, threads=threads), results[-1])
        for row in range(5):  # a vector alone gives what it gives among others
            assert close(packed.multiply(x[row : row + 1]), results[-1][row : row + 1])
    use_instruction_set(best)
    assert all(close(result, results[0]) for result in results)


def test_extreme_steps_do_not_overflow(instructions: str) -> None:
    """The largest sums of products: all steps -8 (or 7), all activations at an end of their grid."""
    for layout in LAYOUTS:
        for step in (-127, 127) if layout == "bytes" else (-8, 7):
            mask = torch.ones(8, 64) if layout in FREE else mask_pattern(torch.rand(8, 64), LAYOUTS[layout])
            steps = (mask * step).to(torch.int8)
            packed = PackedMatrix.pack(steps, torch.ones(8, 2), layout)
            for value in (-3.0, 3.0):
                x = torch.full((1, 64), value)
                assert close(packed.multiply(x), value * steps.float().sum(1)[None]), layout


def test_activations_of_every_kind(instructions: str) -> None:
    """Zeros, tiny and huge numbers, halves that round to even; what is no number shows in the result."""
    generator = torch.Generator().manual_seed(0)
    steps, scale = draw_steps("dense", 16, 96, generator), draw_scale(16, 3, generator)
    packed = PackedMatrix.pack(steps, scale)
    x = torch.randn(6, 96, generator=generator)
    x[0] = 0
    x[1, 32:64] = 0
    x[2] *= 1e-40
    x[3] *= 1e30
    x[4] = torch.arange(96) % 32 + 0.5
    x[4, ::32] = 127
    expected = multiply_reference(steps, scale, 32, x)
    found = packed.multiply(x)
    assert torch.equal(found[0], torch.zeros(16))
    for row in (1, 3, 4, 5):
        assert close(found[row], expected[row])
    assert bool(found[2].abs().max() <= 1e-36)
    for value in (torch.nan, torch.inf, -torch.inf):
        x[5, 40] = value
        assert not bool(packed.multiply(x)[5].isfinite().any())
        assert torch.equal(packed.multiply(x)[:5], found[:5])


def test_activation_grid() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5] + [0.0] * 29])
    q, d = quantize_activations(x)
    assert q.shape == (1, 2, 32)
    assert q[0, 0, :4].tolist() == [127, 0, 2, -2]
    assert d.tolist() == [[1.0, 0.0]]


def test_the_fastest_layout_that_fits_is_taken() -> None:
    generator = torch.Generator().manual_seed(3)
    scale = torch.ones(24, 3)
    for pattern, layout in [
        ("4:16", "index4"), ("12:32 window 3-3-2", "window332"), ("16:32 window 2", "window2"),
        ("2:4", "window2"), ("4:8", "window3"), ("16:32 window 3", "window3"), ("8:16", "mask8"),
        ("16:32", "dense"),
    ]:  # fmt: skip
        scores = torch.rand(24, 96, generator=generator)
        steps = (mask_pattern(scores, pattern) * 5).to(torch.int8)
        assert PackedMatrix.pack(steps, scale).layout == layout, pattern


def test_what_does_not_fit_is_refused() -> None:
    steps, scale = torch.ones(9, 64, dtype=torch.int8), torch.ones(9, 2)
    for layout in PATTERNED:
        with pytest.raises(ValueError, match=f"row 0 does not fit the layout {layout}"):
            PackedMatrix.pack(steps, scale, layout)
    steps[7, 3] = 8
    with pytest.raises(ValueError, match="row 7 does not fit the layout dense"):
        PackedMatrix.pack(steps, scale)
    with pytest.raises(ValueError, match="not exact in float16"):
        PackedMatrix.pack(steps, scale / 3)
    with pytest.raises(ValueError, match="groups of 16 columns"):
        PackedMatrix.pack(steps, torch.ones(9, 4))
    with pytest.raises(ValueError, match="cannot be packed"):
        PackedMatrix.pack(torch.ones(0, 64, dtype=torch.int8), torch.ones(0, 2))


def test_groups_of_every_width() -> None:
    steps = torch.randint(-8, 8, (5, 256), dtype=torch.int8)
    for groups, kernel_size in [(8, 32), (4, 64), (2, 64), (1, 64)]:
        scale = draw_scale(5, groups, torch.Generator().manual_seed(groups))
        packed = PackedMatrix.pack(steps, scale)
        assert packed.group_size == kernel_size
        x = torch.randn(2, 256)
        exact = x @ (steps * scale.repeat_interleave(256 // groups, 1)).T
        assert (packed.multiply(x) - exact).abs().max() < 0.02 * exact.abs().max()


def test_nothing_is_read_that_was_not_written(instructions: str) -> None:
    """Memory in and around a weight that holds anything does not change the result."""
    generator = torch.Generator().manual_seed(5)
    for layout in LAYOUTS:
        steps, scale = draw_steps(layout, 11, 96, generator), draw_scale(11, 3, generator)
        packed, x = PackedMatrix.pack(steps, scale, layout), torch.randn(3, 96, generator=generator)
        results = []
        for byte in (0, 255, 0x7F):
            packed.data[packed.num_bytes :] = byte
            memory = HugePages()
            memory.keep(torch.full((4096,), byte, dtype=torch.uint8))
            again = PackedMatrix.pack(steps, scale, layout, memory)
            assert torch.equal(again.data[: again.num_bytes], packed.data[: packed.num_bytes])
            results += [packed.multiply(x), again.multiply(x)]
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.skipif(
    not Path("/proc/self/smaps").is_file(), reason="the system does not tell how memory is mapped"
)
def test_weights_lie_in_huge_pages_where_there_are_some() -> None:
    """Memory is private, as shared memory comes in small pages, and the system is asked for huge ones."""
    kept = HugePages().keep(torch.ones(4096, dtype=torch.uint8))
    maps = Path("/proc/self/smaps").read_text()
    pattern = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S+) .*?^VmFlags: ([^\n]*)", re.M | re.S)
    found = [
        (kind, flags.split())
        for first, end, kind, flags in pattern.findall(maps)
        if int(first, 16) <= kept.data_ptr() < int(end, 16)
    ]
    assert len(found) == 1
    assert found[0][0].endswith("p")
    assert "hg" in found[0][1] or not hasattr(mmap, "MADV_HUGEPAGE")


def test_sizes_are_those_that_are_stated() -> None:
    """Bytes for 32 weights, with scales for 32 columns."""
    generator = torch.Generator().manual_seed(2)
    sizes: dict[Layout, int] = {
        "dense": 18, "window2": 14, "window3": 16, "window332": 12, "index4": 10, "mask8": 14, "bytes": 34,
    }  # fmt: skip
    for layout, expected in sizes.items():
        steps = draw_steps(layout, 64, 1024, generator)
        packed = PackedMatrix.pack(steps, torch.ones(64, 32), layout)
        assert packed.num_bytes / (64 * 1024 / 32) == expected, layout
