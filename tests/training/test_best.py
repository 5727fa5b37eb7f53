"""Measuring while training: the best step is kept, no better one ends it, and a kill changes nothing."""

import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from sqft.adapters import SearchSpace, attach_adapters
from sqft.errors import TrainingError
from sqft.evaluation import evaluate_loss
from sqft.models import load_model
from sqft.sections import AdapterSection, TrainSection
from sqft.training import TrainingRecord, train_adapters
from tests.training.test_train import Killed, assert_equal, examples, kill_at, trained
from tests.training.test_watching import lines

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SECTION = TrainSection(batch_size=4, learning_rate=1e-1, max_steps=12, checkpoint_steps=4, eval_steps=2)


@pytest.fixture
def make_model(tiny_model_dir: Callable[..., Path]) -> Callable[[], Any]:
    def make() -> Any:
        section = AdapterSection(method="lora", ranks=[8, 4, 2], dropout=0.1)
        return attach_adapters(load_model(tiny_model_dir("llama")), section, seed=0)

    return make


def train(model: Any, directory: Path, section: TrainSection, measure: Any = None) -> TrainingRecord:
    return train_adapters(
        model,
        examples(),
        section,
        output_dir=directory / "checkpoints",
        space=SearchSpace.of(model),
        watch_dir=directory,
        measure=measure,
    )


def held_out(model: Any) -> Callable[[], float]:
    """The loss on items that nothing can be learnt of: it falls for some steps, then it rises."""
    return lambda: evaluate_loss(model, examples(28)[20:]).loss


def away_from_start(model: Any) -> Callable[[], float]:
    """How far the mean size of the weights B is from what it reaches after some 8 steps.

    They start at zero and grow evenly with the steps, on any machine; a loss at this rate is chaos.
    """

    def measure() -> float:
        sizes = [float(weight.abs().mean()) for name, weight in trained(model).items() if "_B." in name]
        return abs(sum(sizes) / len(sizes) - 0.29)

    return measure


def scripted(model: Any, losses: list[float]) -> tuple[Callable[[], float], list[Any]]:
    """A measurement that gives these losses in turn, and what it saw: weights, ranks, whether training."""
    left: Iterator[float] = iter(losses)
    seen: list[Any] = []

    def measure() -> float:
        seen.append((trained(model), model.training))
        return next(left)

    return measure, seen


def test_measuring_shows_and_changes_nothing(make_model: Callable[[], Any], tmp_path: Path) -> None:
    plain, watched = make_model(), make_model()
    train(plain, tmp_path / "plain", SECTION)
    record = train(watched, tmp_path / "watched", SECTION, held_out(watched))
    assert_equal(trained(plain), trained(watched))
    found = [line["step"] for line in lines(tmp_path / "watched" / "metrics.jsonl") if "eval_loss" in line]
    assert found == [2, 4, 6, 8, 10, 12]
    assert [step for step, _ in record.summary()["eval_curve"]] == found
    assert (record.kept_step, record.stopped_early) == (12, False)


def test_the_best_step_is_kept(make_model: Callable[[], Any], tmp_path: Path) -> None:
    model = make_model()
    measure, seen = scripted(model, [3.0, 1.0, 2.0, 1.0, 4.0])
    section = SECTION.model_copy(update={"eval_steps": 3, "keep": "best", "max_steps": 13})
    record = train(model, tmp_path, section, measure)
    assert record.kept_step == 6  # of two that are equal, the first
    assert_equal(trained(model), seen[1][0])
    assert not any(training for _, training in seen)
    again = make_model()
    assert train(again, tmp_path, section, measure).kept_step == 6  # from its last checkpoint
    assert_equal(trained(again), trained(model))


def test_a_killed_training_stops_and_keeps_as_one_that_was_not(
    make_model: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = SECTION.model_copy(update={"early_stopping": 2, "max_steps": 40})
    straight = make_model()
    whole = train(straight, tmp_path / "straight", section, away_from_start(straight))
    assert whole.stopped_early
    assert whole.kept_step is not None
    assert len(whole.steps) == whole.kept_step + 4 < 40
    for step, when in ((whole.kept_step + 1, "on_step_begin"), (len(whole.steps), "on_save")):
        with monkeypatch.context() as patch:
            kill_at(step, patch, when=when)
            first = make_model()
            with pytest.raises(Killed):
                train(first, tmp_path / when, section, away_from_start(first))
        resumed = make_model()
        record = train(resumed, tmp_path / when, section, away_from_start(resumed))
        assert_equal(trained(straight), trained(resumed))
        assert (record.losses, record.kept_step) == (whole.losses, whole.kept_step)
        assert record.summary()["eval_curve"] == whole.summary()["eval_curve"]
        assert record.stopped_early


def report_to(name: str, make_model: Callable[[], Any], directory: Path) -> list[float]:
    """Train with a tracker, and return what was measured."""
    model = make_model()
    section = SECTION.model_copy(
        update={"arguments": {"report_to": name, "run_name": "tried"}, "max_steps": 4, "learning_rate": 1e-3}
    )
    train(model, directory, section, held_out(model))
    return [line["eval_loss"] for line in lines(directory / "metrics.jsonl") if "eval_loss" in line]


def test_tensorboard_has_both_losses(make_model: Callable[[], Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = report_to("tensorboard", make_model, tmp_path)
    (events,) = (tmp_path / "tensorboard").rglob("events.out.tfevents.*")
    scalars = EventAccumulator(str(events.parent)).Reload()
    assert [event.value for event in scalars.Scalars("eval/loss")] == pytest.approx(found)
    assert [event.step for event in scalars.Scalars("train/loss")] == [1, 2, 3, 4]


def test_trackio_has_both_losses(
    make_model: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which it reads when it is imported
    pytest.importorskip("trackio")
    found = report_to("trackio", make_model, tmp_path)
    (path,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(path) as database:
        rows = [json.loads(row[0]) for row in database.execute("select metrics from metrics order by step")]
    assert [row["eval/loss"] for row in rows if "eval/loss" in row] == pytest.approx(found)
    assert len([row for row in rows if "train/loss" in row]) == 4


def test_wandb_writes_an_offline_run(
    make_model: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    report_to("wandb", make_model, tmp_path)
    (run,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    for _ in range(1200):  # another process writes it
        if b"eval/loss" in run.read_bytes():
            return
        time.sleep(0.05)
    pytest.fail("the run holds no eval/loss")


def test_what_cannot_be_measured_is_refused(make_model: Callable[[], Any], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="nothing measures"):
        train(make_model(), tmp_path, SECTION.model_copy(update={"keep": "best"}))
    with pytest.raises(ValidationError, match="set eval_steps above 0"):
        TrainSection(early_stopping=2, eval_steps=0)
    assert not (tmp_path / "checkpoints").exists()
