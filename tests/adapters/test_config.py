"""Settings that no adapter can obey are refused where they are made."""

from typing import Any

import pytest
import torch

from sqft.adapters import SqftConfig
from sqft.errors import AdapterError
from sqft.ops.adapted import exact_float32
from sqft.ops.adapted_linear import adapted_linear


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient": "lowrnk"}, "choose from exact, lowrank, hybrid"),
        ({"dropout_kind": "tokens"}, "choose from column, token"),
        ({"kernels": "cuda"}, "choose from auto, torch, triton"),
        ({"storage_dtype": "bf16"}, "choose from float32, bfloat16, float16"),
        ({"dropout": 1.5}, "dropout 1.5 must be from 0 to below 1"),
        ({"hybrid_steps": 0}, "hybrid_steps 0 must be at least 1"),
        ({"alpha": 0}, "alpha 0 must be above 0"),
        ({"ranks": [4.5]}, "must be whole numbers"),
        ({"method": "lora", "kernels": "triton"}, "no meaning for lora"),
        ({"dropout": 0.1, "dropout_kind": "token", "gradient": "lowrank"}, "dropout_kind: column"),
        ({"dropout": 0.1, "dropout_kind": "token", "kernels": "triton"}, "dropout_kind: column"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        SqftConfig(**settings)


@pytest.mark.parametrize("settings", [{"gradient": "Exact"}, {"kernels": "cuda"}])
def test_the_operation_takes_no_unknown_choice(settings: dict[str, Any]) -> None:
    x = torch.randn(2, 8)
    with pytest.raises(AdapterError, match="choose from"):
        adapted_linear(x, torch.randn(4, 8), torch.randn(2, 8), torch.randn(4, 2), scaling=1.0, **settings)


@pytest.mark.parametrize("wanted", ["tf32", "ieee"])
def test_tf32_that_was_switched_on_is_off_inside_and_back_after(wanted: str) -> None:
    matmul = torch.backends.cuda.matmul
    backends: Any = torch.backends  # torch declares no type for the precision of everything at once
    everywhere, before = backends.fp32_precision, matmul.fp32_precision
    try:
        backends.fp32_precision = wanted  # as transformers does for tf32: true
        matmul.fp32_precision = wanted
        with exact_float32(torch.device("cuda")):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == wanted
    finally:
        backends.fp32_precision, matmul.fp32_precision = everywhere, before
