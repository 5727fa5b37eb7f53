"""How long a plan says that stages take: what it hangs on, and that it never stands in a plan's way."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sqft.cli import run_command_line
from sqft.pipeline import machine, parse_recipe, plan_recipe
from sqft.pipeline import plan as plan_module
from sqft.pipeline.machine import MachineSpeed, machine_speed
from tests.end_to_end.conftest import values_maker, write_task

SPEED = MachineSpeed(flops=1e6, stream=1e6, call=1e-2)  # so slow that a stage's start hardly counts


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def values(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> dict[str, Any]:
    made = values_maker(write_task(tmp_path), tmp_path / "runs")("qa_sparse_peft", tiny_model_dir("llama"))
    return made | {
        "evaluate": {"models": ["base", "merged"], "general_text": None},
        "train": made["train"] | {"eval_steps": 0},
        "reconstruct": {"epochs": 2},
    }


def seconds(values: dict[str, Any]) -> dict[str, float | None]:
    return {stage.name: stage.seconds for stage in plan_recipe(parse_recipe(values)).stages}


def test_times_follow_what_is_computed(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "machine_speed", lambda threads: SPEED)
    before = seconds(values)
    assert all(time is not None and time > 0 for time in before.values())

    def changed(name: str, **changes: Any) -> float:
        again = values | {key: values[key] | change for key, change in changes.items()}
        found, old = seconds(again)[name], before[name]
        assert found is not None
        assert old is not None
        return found / old

    assert 1.8 < changed("train", train={"max_steps": 12}) < 2.1
    assert changed("train", train={"batch_size": 8}) > 1.2
    assert changed("sparsify", calibration={"num_samples": 16}) > 1.2
    assert 1.7 < changed("reconstruct", reconstruct={"epochs": 4}) < 2
    assert changed("search", search={"num_trials": 8}) > 1.5
    assert changed("quantize", quantize={"method": "rtn"}) < 1
    monkeypatch.setattr(plan_module, "machine_speed", lambda threads: MachineSpeed(5e5, 5e5, 2e-2))
    assert 1.9 < changed("train") < 2.1


def test_what_nothing_is_known_of_has_no_time(
    values: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(plan_module, "machine_speed", lambda threads: SPEED)
    known = seconds(values | {"export": {"formats": ["safetensors"]}})
    assert known["export-safetensors"] is None
    assert known["merge"] is not None
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(values))
    assert run_command_line(["plan", str(path), "export.formats=[safetensors]"]) == 0
    shown = capsys.readouterr().out
    assert ", export-safetensors not counted, on this machine" in shown
    assert " 8, 6, 4 " in shown  # elastic ranks, each of them
    monkeypatch.setattr(plan_module, "machine_speed", lambda threads: None)
    assert set(seconds(values).values()) == {None}
    assert run_command_line(["plan", str(path), "--json"]) == 0
    assert {stage["seconds"] for stage in json.loads(capsys.readouterr().out)["stages"]} == {None}
    assert run_command_line(["plan", str(path)]) == 0
    assert "Time is not known" in capsys.readouterr().out


def test_the_machine_is_measured_once_for_each_number_of_threads(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds: Iterator[MachineSpeed] = (MachineSpeed(float(n), 1.0, 1.0) for n in range(1, 9))
    monkeypatch.setattr(machine, "_measure", lambda threads: next(speeds))
    found = [machine_speed(threads) for threads in (1, 1, 2, None, 2)]
    assert [speed.flops for speed in found if speed] == [1, 1, 2, 3, 2]
    monkeypatch.setattr(machine, "_processor", lambda: "another")
    again = machine_speed(1)
    assert again is not None
    assert again.flops == 4


def test_a_machine_that_cannot_be_measured_has_no_speed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_measure", lambda threads: 1 / 0)
    assert machine_speed(1) is None
    monkeypatch.setattr(machine, "_measure", lambda threads: MachineSpeed(0.0, 1.0, 1.0))
    assert machine_speed(1) is None


def test_this_machine_can_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    before = torch.get_num_threads()
    monkeypatch.setattr(machine, "SECONDS", 0.02)
    speed = machine._measure(1)
    assert speed.flops > 1e7
    assert speed.stream > 1e7
    assert 0 < speed.call < 1e-2
    assert torch.get_num_threads() == before
