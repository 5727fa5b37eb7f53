"""N:M masks: chosen a few rows at a time, and found again."""

import pytest
import torch

from sqft.ops import mask, mask_pattern, mask_rows
from sqft.ops.mask import find_pattern


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "3:16"])
def test_patterns_do_not_depend_on_how_many_rows_are_worked_on(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = torch.randn(37, 64).round(decimals=1)  # some are equal
    whole = mask_pattern(scores, pattern)
    sorted_at_once: list[int] = []
    argsort = torch.argsort

    def note(values: torch.Tensor, **options: bool) -> torch.Tensor:
        sorted_at_once.append(values.numel())
        return argsort(values, **options)

    monkeypatch.setattr(mask, "AT_ONCE", 5 * 64)
    monkeypatch.setattr(torch, "argsort", note)
    assert torch.equal(mask_pattern(scores, pattern), whole)
    assert max(sorted_at_once) == 5 * 64
    kept, block = (int(part) for part in pattern.split(":"))
    assert (whole.unflatten(1, (-1, block)).sum(-1) == kept).all()


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "4:8", "1:4", "3:8", "8:16", "5:32"])
def test_a_pattern_is_found(pattern: str) -> None:
    scores = torch.randn(9, 64)
    found = mask_pattern(scores, pattern)
    assert find_pattern(found) == pattern
    found[3, 5] ^= True
    assert find_pattern(found) is None


def test_no_pattern_is_none() -> None:
    assert find_pattern(mask_rows(torch.randn(9, 64), 0.5)) is None
    assert find_pattern(torch.ones(4, 64, dtype=torch.bool)) is None
    assert find_pattern(torch.zeros(4, 64, dtype=torch.bool)) is None
    assert find_pattern(torch.ones(4, 7, dtype=torch.bool)) is None
