"""Masks in a pattern: chosen a few rows at a time, found again, and kept by the swaps that are allowed."""

import itertools

import pytest
import torch
from torch import Tensor

from sqft.errors import CompressionError
from sqft.ops import mask_pattern, mask_rows, pattern
from sqft.ops.pattern import allowed_swaps, find_pattern, fits_pattern, parse_pattern
from sqft.patterns import Pattern

WINDOWS_OF_32 = ["16:32 window 2", "16:32 window 3", "12:32 window 3-3-2"]
WINDOWED = ["2:6 window 1", "3:8 window 1", "3:8 window 2", "4:8 window 1-2", "2:8 window 3", "6:8 window 1"]


def masks_of(form: Pattern) -> Tensor:
    """Every mask of a block in a pattern, (masks, M): all choices of N columns, tried one by one."""
    found = []
    for columns in itertools.combinations(range(form.block), form.kept):
        places = zip(columns, form.starts, form.widths, strict=True)
        if all(start <= column < start + width for column, start, width in places):
            found.append([column in columns for column in range(form.block)])
    return torch.tensor(found)


@pytest.mark.parametrize("name", ["2:4", "4:8", "1:4", "3:16"])
def test_patterns_do_not_depend_on_how_many_rows_are_worked_on(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = torch.randn(37, 64).round(decimals=1)  # some are equal
    whole = mask_pattern(scores, name)
    sorted_at_once: list[int] = []
    argsort = torch.argsort

    def note(values: torch.Tensor, **options: bool) -> torch.Tensor:
        sorted_at_once.append(values.numel())
        return argsort(values, **options)

    monkeypatch.setattr(pattern, "AT_ONCE", 5 * 64)
    monkeypatch.setattr(torch, "argsort", note)
    assert torch.equal(mask_pattern(scores, name), whole)
    assert max(sorted_at_once) == 5 * 64
    kept, block = (int(part) for part in name.split(":"))
    assert (whole.unflatten(1, (-1, block)).sum(-1) == kept).all()


@pytest.mark.parametrize(
    "name",
    ["1:2", "2:4", "4:8", "1:4", "3:8", "8:16", "5:32", "16:32", "12:32", *WINDOWS_OF_32],
)
def test_a_pattern_is_found(name: str) -> None:
    scores = torch.randn(9, 64)
    found = mask_pattern(scores, name)
    assert find_pattern(found) == name
    assert fits_pattern(found, name)
    found[3, 5] ^= True
    assert find_pattern(found) is None


def test_no_pattern_is_none() -> None:
    assert find_pattern(mask_rows(torch.randn(9, 64), 0.5)) is None
    assert find_pattern(torch.ones(4, 64, dtype=torch.bool)) is None
    assert find_pattern(torch.zeros(4, 64, dtype=torch.bool)) is None
    assert find_pattern(torch.ones(4, 7, dtype=torch.bool)) is None


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_keep_the_most_energy_that_any_mask_of_the_pattern_keeps(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pattern, "AT_ONCE", 100)
    form = Pattern.parse(name)
    every = masks_of(form).double()
    scores = torch.randn(40, 3 * form.block)
    scores[20:] = scores[20:].round()  # many ties, many zeros
    mask = mask_pattern(scores, name)
    assert fits_pattern(mask, name)
    energy = scores.double().square().unflatten(1, (-1, form.block))
    kept = (energy * mask.unflatten(1, (-1, form.block))).sum(-1)
    assert torch.equal(kept, (energy[..., None, :] * every).sum(-1).amax(-1)) or torch.allclose(
        kept, (energy[..., None, :] * every).sum(-1).amax(-1), rtol=1e-14, atol=0
    )


@pytest.mark.parametrize("name", WINDOWED)
def test_fitting_a_pattern_is_being_one_of_its_masks(name: str) -> None:
    form = Pattern.parse(name)
    ours = {tuple(row) for row in masks_of(form).tolist()}
    for row in itertools.product([False, True], repeat=form.block):
        assert fits_pattern(torch.tensor([row]), name) == (row in ours)


@pytest.mark.parametrize("name", WINDOWED)
def test_allowed_swaps_are_those_that_stay_in_the_pattern(name: str) -> None:
    form = Pattern.parse(name)
    masks = masks_of(form)
    allowed = allowed_swaps(masks, form)
    assert allowed is not None
    for row, take, drop in itertools.product(range(len(masks)), range(form.block), range(form.block)):
        if masks[row, take] or not masks[row, drop]:
            continue
        swapped = masks[row].clone()
        swapped[take], swapped[drop] = True, False
        assert bool(allowed[row, 0, take, drop]) == fits_pattern(swapped[None], name)
    assert allowed_swaps(masks, Pattern(form.kept, form.block)) is None


def test_narrow_blocks_lie_in_windows() -> None:
    """What runtimes for 2:4 and 4:8 have pruned can be decoded by windows."""
    scores = torch.randn(300, 64)
    assert fits_pattern(mask_pattern(scores, "2:4"), "16:32 window 2")
    assert fits_pattern(mask_pattern(scores, "4:8"), "16:32 window 3")
    assert not fits_pattern(mask_pattern(scores, "8:16"), "16:32 window 3")


def test_a_width_that_blocks_do_not_fill_is_refused() -> None:
    with pytest.raises(
        CompressionError, match="16:32 window 2 does not fit a width of 48: 32 does not divide"
    ):
        mask_pattern(torch.randn(2, 48), "16:32 window 2")
    assert not fits_pattern(torch.ones(2, 48, dtype=torch.bool), "16:32 window 2")
    with pytest.raises(CompressionError, match="pattern '16:32 windows': write N:M"):
        parse_pattern("16:32 windows")
