"""A training can be watched: figures beside the bar, a file to follow, logs that stay."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from sqft.adapters import SearchSpace, attach_adapters
from sqft.models import load_model
from sqft.progress import Advance
from sqft.sections import AdapterSection, TrainSection
from sqft.training import cores, train_adapters
from tests.training.test_train import Killed, examples, kill_at

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SECTION = TrainSection(batch_size=4, learning_rate=1e-2, max_steps=7, checkpoint_steps=3)


class Watch:
    def __init__(self) -> None:
        self.notes: list[str] = []

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        yield lambda done, note="": self.notes.append(note)


def train(directory: Path, model_dir: Path, section: TrainSection = SECTION, **options: Any) -> Any:
    model = attach_adapters(load_model(model_dir), AdapterSection(method="lora", ranks=[8, 4]), seed=0)
    return train_adapters(
        model,
        examples(),
        section,
        output_dir=directory / "checkpoints",
        space=SearchSpace.of(model),
        watch_dir=directory,
        **options,
    )


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_bar_and_the_file_show_how_it_goes(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    watch = Watch()
    record = train(tmp_path, tiny_model_dir("llama"), progress=watch)
    assert [note for note in watch.notes if note][-1].startswith("loss ")
    assert "tokens/s" in watch.notes[-1]
    found = lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in found] == list(range(1, 8))
    assert [line["loss"] for line in found] == record.losses
    assert found[0]["learning_rate"] > found[-1]["learning_rate"] >= 0


def test_a_resumed_training_repeats_no_line(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_at(5, monkeypatch, when="on_step_begin")
    with pytest.raises(Killed):
        train(tmp_path, tiny_model_dir("llama"))
    assert len(lines(tmp_path / "metrics.jsonl")) == 5
    monkeypatch.undo()
    record = train(tmp_path, tiny_model_dir("llama"))
    found = lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in found] == list(range(1, 8))
    assert [line["loss"] for line in found] == record.losses


def test_tensorboard_leaves_its_file(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    section = SECTION.model_copy(update={"arguments": {"report_to": "tensorboard"}})
    train(tmp_path, tiny_model_dir("llama"), section)
    (events,) = (tmp_path / "tensorboard").rglob("events.out.tfevents.*")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars = EventAccumulator(str(events.parent)).Reload()
    assert len(scalars.Scalars("train/loss")) == 7


@pytest.mark.parametrize(("idle", "warned"), [(0.2, True), (1.9, False), (None, False)])
def test_threads_beyond_the_idle_cores_are_told(
    idle: float | None, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cores, "idle_cores", lambda: idle)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with caplog.at_level(logging.WARNING, "sqft"):
        cores.warn_of_busy_cores(torch.device("cpu"))
        cores.warn_of_busy_cores(torch.device("cuda"))
    assert [("runtime.threads: 1" in r.getMessage()) for r in caplog.records] == [True] * warned


def test_idle_cores_are_counted() -> None:
    found = cores.idle_cores(0.05)
    assert found is None or 0 <= found <= 1024
