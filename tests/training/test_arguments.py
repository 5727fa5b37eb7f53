"""Every TrainingArguments field is reachable, and mistakes are named."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sqft.errors import TrainingError
from sqft.ops.kernel_use import computes_in_bfloat16
from sqft.sections import TrainSection
from sqft.training import check_arguments
from sqft.training.arguments import share_batch, training_arguments


def build(tmp_path: Path, **fields: Any) -> Any:
    return training_arguments(TrainSection(**fields), seed=3, output_dir=tmp_path, device=torch.device("cpu"))


def test_the_section_and_its_arguments(tmp_path: Path) -> None:
    arguments = build(
        tmp_path, batch_size=8, gradient_accumulation=4, arguments={"weight_decay": 0.1, "adam_beta2": 0.95}
    )
    assert arguments.per_device_train_batch_size == 2
    assert arguments.gradient_accumulation_steps == 4
    assert (arguments.weight_decay, arguments.adam_beta2, arguments.seed) == (0.1, 0.95, 3)
    assert arguments.report_to == []


def test_a_gpu_computes_in_bfloat16_where_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for able in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda able=able, **_: able)
        assert computes_in_bfloat16(torch.device("cuda")) is able
        assert not computes_in_bfloat16(torch.device("cpu"))
    assert build(tmp_path).bf16 is False


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arguments": {"wieght_decay": 0.1}}, "no field 'wieght_decay' .* near: weight_decay"),
        ({"arguments": {"learning_rate": 0.1}}, r"write train\.learning_rate in place"),
        ({"arguments": {"save_strategy": "no"}}, "'save_strategy' cannot be changed"),
        ({"arguments": {"push_to_hub": True}}, "uploads nothing; remove 'push_to_hub'"),
        ({"arguments": {"hub_model_id": "a/b"}}, "uploads nothing"),
        (
            {"arguments": {"report_to": ["tensorboad"]}},
            "report_to: 'tensorboad' is unknown; choose from .*tensorb",
        ),
        ({"batch_size": 8, "gradient_accumulation": 3}, "8 cannot be cut into .* 3 equal"),
    ],
)
def test_mistakes(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        check_arguments(TrainSection(**fields))


def test_a_tracker_that_is_not_there_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    place = "transformers.integrations.integration_utils.get_available_reporting_integrations"
    monkeypatch.setattr(place, lambda: ["trackio"])
    for there in ("trackio", "none", "all", ["trackio"], []):
        check_arguments(TrainSection(arguments={"report_to": there}))
    with pytest.raises(
        TrainingError, match=r"^train\.arguments\.report_to: wandb is not installed; pip install wandb"
    ):
        check_arguments(TrainSection(arguments={"report_to": ["trackio", "wandb"]}))


def test_a_refused_value(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"train\.arguments: .*nonsense"):
        build(tmp_path, arguments={"optim": "nonsense"})


@pytest.mark.parametrize(
    ("batch_size", "parts", "processes", "shared"),
    [
        (16, 4, 1, (4, 4)),
        (16, 4, 2, (4, 2)),  # micro-batches are shared first
        (16, 4, 4, (4, 1)),
        (16, 4, 8, (2, 1)),  # then their items
        (12, 3, 2, (2, 3)),
        (16, 1, 8, (2, 1)),
        (16, 4, 3, None),
        (16, 16, 32, None),
    ],
)
def test_processes_share_a_batch(
    batch_size: int, parts: int, processes: int, shared: tuple[int, int] | None
) -> None:
    section = TrainSection(batch_size=batch_size, gradient_accumulation=parts)
    if shared is None:
        with pytest.raises(TrainingError, match=f"cannot be shared by {processes} processes"):
            share_batch(section, processes)
    else:
        assert share_batch(section, processes) == shared
        assert shared[0] * shared[1] * processes == batch_size
