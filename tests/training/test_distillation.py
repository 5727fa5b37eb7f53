"""Learning from a teacher: its predictions on disk, and a training that keeps to them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sqft.adapters import attach_adapters
from sqft.errors import ModelError, TrainingError
from sqft.models import load_model, load_tokenizer
from sqft.sections import AdapterSection, DistillationSection, TrainSection
from sqft.training import train_adapters
from sqft.training import trainer as trainer_module
from sqft.training.distillation import Distillation
from sqft.training.teacher import Teacher, check_same_tokens, predict_items, predict_texts
from tests.training.test_train import Killed, examples, trained

TEXTS = torch.randint(4, 288, (12, 16), generator=torch.Generator().manual_seed(1))
OPTIONS: dict[str, Any] = {"top_k": 16, "vocab_size": 288}
SECTION = DistillationSection(text="some.txt", item_weight=0.5, batch_size=3)
TRAINING = TrainSection(batch_size=4, learning_rate=2e-2, max_steps=6, checkpoint_steps=3, eval_steps=0)


@pytest.fixture(scope="module")
def teacher(tiny_model_dir: Callable[..., Path]) -> Teacher:
    model = load_model(tiny_model_dir("llama"))
    items, digest = predict_items(model, examples(), **OPTIONS)
    return Teacher("dense", items, digest, predict_texts(model, TEXTS, **OPTIONS), TEXTS)


@pytest.fixture
def make_model(tiny_model_dir: Callable[..., Path]) -> Callable[[], nn.Module]:
    section = AdapterSection(method="lora", ranks=[8])
    return lambda: attach_adapters(load_model(tiny_model_dir("llama")), section, seed=0)


def train(model: nn.Module, directory: Path, distillation: Distillation | None, **changes: Any) -> Any:
    section = TRAINING.model_copy(update=changes)
    return train_adapters(model, examples(), section, output_dir=directory, distillation=distillation)


def test_predictions_are_those_of_the_model_and_survive_the_disk(
    teacher: Teacher, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    teacher.save(tmp_path / "teacher.safetensors")
    found = Teacher.load(tmp_path / "teacher.safetensors", name="dense")
    assert found.digest == teacher.digest
    model = load_model(tiny_model_dir("llama"))
    for index in (0, 7, 19):
        example = examples()[index]
        places = example.counted()
        logits = model(torch.tensor([example.token_ids])).logits[0, [place - 1 for place in places]]
        assert found.items is not None
        ids, log_probs = found.items.of([index])
        wanted = logits.log_softmax(-1).gather(-1, ids.long())
        torch.testing.assert_close(log_probs[:, :-1].float(), wanted, atol=6e-3, rtol=1e-3)
        torch.testing.assert_close(
            log_probs.float().exp().sum(-1), torch.ones(len(places)), atol=3e-3, rtol=0
        )
    assert found.texts is not None
    assert torch.equal(found.texts.starts, 15 * torch.arange(13))
    assert torch.equal(found.text_tokens, TEXTS)  # type: ignore[arg-type]


@pytest.mark.parametrize("chunk", [1 << 22, 288])
def test_a_model_that_is_the_teacher_learns_nothing_from_it(
    make_model: Any, teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr("sqft.ops.cross_entropy.CHUNK_ELEMENTS", {"cpu": chunk})
    record = train(make_model(), tmp_path, Distillation(teacher, SECTION, 0), max_steps=3)
    learnt = [step.distillation_loss for step in record.steps]
    assert abs(learnt[0]) < 1e-3  # an adapter starts as nothing
    assert learnt[2] > 1e-2
    assert record.steps[0].tokens > 3 * 16
    assert record.losses[0] == pytest.approx(train(make_model(), tmp_path / "b", None).losses[0], rel=1e-5)


def test_texts_are_forgotten_less_with_a_teacher(make_model: Any, teacher: Teacher, tmp_path: Path) -> None:
    def forgotten(weight: float | None) -> float:
        model = make_model()
        section = SECTION.model_copy(update={"text_weight": weight, "item_weight": 0.0})
        learning = None if weight is None else Distillation(teacher, section, 0)
        train(model, tmp_path / str(weight), learning, max_steps=12)
        with torch.no_grad():
            loss = Distillation(teacher, SECTION.model_copy(update={"batch_size": 12}), 0)
            found = loss.text_loss(model, model, 0)
        assert found is not None
        return float(found)

    alone, taught = forgotten(None), forgotten(4.0)
    assert taught < 0.5 * alone


def test_a_killed_training_goes_on_with_the_same_texts(
    make_model: Any, teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learning = Distillation(teacher, SECTION, 0)
    whole = make_model()
    record = train(whole, tmp_path / "whole", learning, gradient_accumulation=2)
    original = trainer_module.StepCallback.on_step_begin

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            raise Killed
        original(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.StepCallback, "on_step_begin", stop)
        with pytest.raises(Killed):
            train(make_model(), tmp_path / "killed", learning, gradient_accumulation=2)
    resumed = make_model()
    again = train(resumed, tmp_path / "killed", learning, gradient_accumulation=2)
    assert again.resumed
    assert [s.distillation_loss for s in again.steps] == [s.distillation_loss for s in record.steps]
    assert all(torch.equal(p, trained(resumed)[name]) for name, p in trained(whole).items())
    other = Distillation(teacher, SECTION.model_copy(update={"text_weight": 2.0}), 0)
    with pytest.raises(TrainingError, match="another training"):
        train(make_model(), tmp_path / "killed", other, gradient_accumulation=2)


def test_predictions_of_another_teacher_or_for_other_items_are_refused(
    make_model: Any, teacher: Teacher, tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    path = tmp_path / "teacher.safetensors"
    teacher.save(path)
    with pytest.raises(TrainingError, match="another teacher"):
        Teacher.load(path, name="tuned")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TrainingError, match="cannot be read"):
        Teacher.load(path, name="dense")
    with pytest.raises(TrainingError, match="other items"):
        train_adapters(
            make_model(),
            examples(19),
            TRAINING,
            output_dir=tmp_path,
            distillation=Distillation(teacher, SECTION, 0),
        )
    with pytest.raises(TrainingError, match="top_k: 288 of a vocabulary of 288"):
        predict_texts(load_model(tiny_model_dir("llama")), TEXTS, top_k=288, vocab_size=288)


def test_a_teacher_with_another_tokenizer_is_refused(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(tiny_model_dir("llama"))
    check_same_tokens(tokenizer, tokenizer, "itself")
    other = load_tokenizer(tiny_model_dir("llama"))
    other.add_tokens(["more"])
    check_same_tokens(tokenizer, other, "one that knows more")
    with pytest.raises(ModelError, match="the other has another tokenizer"):
        check_same_tokens(other, tokenizer, "the other")
