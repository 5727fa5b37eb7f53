"""That shapes in annotations are checked in tests, where they are stated."""

import pytest
import torch
from jaxtyping import TypeCheckError

from sqft.ops import pack_mask
from sqft.runtimes.hf import run_model


def test_a_wrong_shape_or_dtype_is_noticed() -> None:
    with pytest.raises(TypeCheckError):
        pack_mask(torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeCheckError):
        pack_mask(torch.ones(3, 4))
    assert pack_mask(torch.ones(3, 4, dtype=torch.bool)).shape == (3, 1)


def test_what_states_no_shape_is_left_to_mypy() -> None:
    with pytest.raises(AttributeError):
        run_model("no model", [])  # type: ignore[arg-type]
