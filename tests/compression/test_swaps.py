"""Swaps after every method, also one whose kept weights make up for what it pruned."""

import pytest
import torch
from tests.compression.tiny_runs import hessian_of, inputs

from sqft.compression.sparsify import METHODS, prune
from sqft.ops.pattern import fits_pattern
from sqft.sections import SparsifySection


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("pattern", [None, "2:4", "16:32 window 2"])
def test_no_row_is_worse_for_swaps(method: str, pattern: str | None) -> None:
    weight, hessian = torch.randn(16, 160), hessian_of(inputs(600, 160))
    matrix = hessian.damped(0.01)
    errors, masks = {}, {}
    for name, settings in {"plain": {}, "swaps": {"swaps": 20}, "refit": {"swaps": 20, "refit": 10}}.items():
        section = SparsifySection(method=method, pattern=pattern, **settings)
        pruned = prune(weight, hessian, section, 0.5)
        assert pruned.damping in (0.0, 0.01)
        difference = torch.where(pruned.mask, pruned.weight, 0.0) - weight
        errors[name] = (difference @ matrix * difference).sum(1)
        masks[name] = pruned.mask
    assert (errors["swaps"] <= errors["plain"] * 1.0001).all()
    assert errors["swaps"].sum() < 0.98 * errors["plain"].sum()
    assert errors["refit"].sum() < errors["swaps"].sum()
    assert torch.equal(masks["swaps"].sum(1), masks["plain"].sum(1))
    if pattern is not None:
        assert all(fits_pattern(mask, pattern) for mask in masks.values())
        assert not torch.equal(masks["swaps"], masks["plain"])
