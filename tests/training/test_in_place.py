"""Training scales and norms: rates of their own, resuming bit for bit, stopping at impossible scales."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sqft.adapters import attach_adapters, codes_digest
from sqft.adapters.identity import base_weight
from sqft.adapters.targets import find_targets
from sqft.adapters.unrounded import trained_in_place
from sqft.errors import TrainingError
from sqft.models import QuantizedLinear, load_model
from sqft.ops import GridSpec, compute_qparams, encode_latent, quantize
from sqft.sections import AdapterSection, TrainSection
from tests.training.test_train import assert_equal, train, trained

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

RATES: dict[str, Any] = {"learning_rate": 1e-3, "scale_learning_rate": 1e-2, "norm_learning_rate": 5e-3}
SECTION = TrainSection(batch_size=4, max_steps=6, checkpoint_steps=2, schedule="constant", **RATES)
KINDS: dict[str, dict[str, Any]] = {
    "scales": {"method": "scales"},
    "both": {"method": "qa_sparse_peft", "train_scales": True, "train_norms": True, "ranks": [4, 2]},
}


@pytest.fixture
def make_model(tiny_model_dir: Callable[..., Path]) -> Callable[[str], nn.Module]:
    def make(kind: str) -> nn.Module:
        model = load_model(tiny_model_dir("llama"))
        for name, linear in find_targets(model, None).items():
            weight = base_weight(linear)
            grid = compute_qparams(weight, GridSpec(4, 32, True))
            parent, _, end = name.rpartition(".")
            coded = QuantizedLinear(encode_latent(weight, quantize(weight, grid), None, grid), grid)
            setattr(model.get_submodule(parent), end, coded)
        return attach_adapters(model, AdapterSection(**KINDS[kind]))

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls(kind: str, make_model: Any, tmp_path: Path) -> None:
    record = train(make_model(kind), tmp_path, SECTION.model_copy(update={"max_steps": 30}))
    assert sum(record.losses[-5:]) < 0.85 * sum(record.losses[:5])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_rate(kind: str, make_model: Any, tmp_path: Path) -> None:
    seen: list[dict[float, int]] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        seen.append({group["lr"]: len(group["params"]) for group in optimizer.param_groups})

    model = make_model(kind)
    scales, norms = (len(trained_in_place(model, part)) for part in ("sqft_scale", "sqft_norm"))
    handle = register_optimizer_step_pre_hook(look)
    try:
        train(model, tmp_path, SECTION.model_copy(update={"max_steps": 1}))
    finally:
        handle.remove()
    expected = {1e-2: scales, 5e-3: norms} | (
        {1e-3: len(trained(model)) - scales - norms} if kind == "both" else {}
    )
    assert seen == [expected]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("killed_after", [3, 6])
def test_a_resumed_training_ends_with_the_same_bits(
    killed_after: int, kind: str, make_model: Any, tmp_path: Path
) -> None:
    whole = make_model(kind)
    train(whole, tmp_path / "whole", SECTION)
    steps = 0

    def kill(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps > killed_after:
            raise KeyboardInterrupt

    interrupted = make_model(kind)
    if killed_after < 6:
        handle = register_optimizer_step_pre_hook(kill)
        try:
            with pytest.raises(KeyboardInterrupt):
                train(interrupted, tmp_path / "parts", SECTION)
        finally:
            handle.remove()
    else:
        train(interrupted, tmp_path / "parts", SECTION)  # finished, but not told: the final checkpoint stands
    resumed = make_model(kind)
    record = train(resumed, tmp_path / "parts", SECTION)
    assert record.resumed
    assert_equal(trained(resumed), trained(whole))
    assert codes_digest(resumed) == codes_digest(whole)


@pytest.mark.parametrize("setting", ["scale_learning_rate", "norm_learning_rate"])
def test_a_rate_that_breaks_the_model_ends_the_training(
    setting: str, make_model: Any, tmp_path: Path
) -> None:
    rate = 3.0 if setting == "scale_learning_rate" else 1e39
    with pytest.raises(TrainingError, match=f"train.{setting}") as caught:
        train(make_model("scales"), tmp_path, SECTION.model_copy(update={setting: rate}))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("checkpoint-*/complete.json"))
