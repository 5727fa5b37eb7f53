"""Training adapters: what is trained, resuming bit for bit, and stopping at trouble."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sqft.adapters import SearchSpace, attach_adapters
from sqft.artifacts import seal, unseal
from sqft.data import Example
from sqft.errors import TrainingError
from sqft.models import load_model
from sqft.sections import AdapterSection, TrainSection
from sqft.training import TrainingRecord, train_adapters
from sqft.training import trainer as trainer_module
from sqft.training.record import Journal

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def examples(count: int = 20) -> list[Example]:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, 288, (length,), generator=generator).tolist())

    return [Example("", "", ids(3 + index % 5), (*ids(1 + index % 3), 1)) for index in range(count)]


SECTION = TrainSection(batch_size=4, learning_rate=1e-2, max_steps=7, checkpoint_steps=3, schedule="constant")


@pytest.fixture
def make_model(tiny_model_dir: Callable[..., Path]) -> Callable[..., nn.Module]:
    def make(ranks: tuple[int, ...] = (8, 4, 2), **settings: Any) -> nn.Module:
        model = load_model(tiny_model_dir("llama"))
        section = AdapterSection(method="lora", ranks=list(ranks), **settings)
        return attach_adapters(model, section, seed=0)

    return make


def train(
    model: nn.Module, directory: Path, section: TrainSection = SECTION, seed: int = 0, **changes: Any
) -> TrainingRecord:
    return train_adapters(
        model, examples(), section, seed=seed, output_dir=directory, space=SearchSpace.of(model), **changes
    )


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_loss_falls_and_every_step_is_recorded(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model()
    before = trained(model)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    record = train(model, tmp_path, SECTION.model_copy(update={"max_steps": 30}))
    space = SearchSpace.of(model)
    assert [step.step for step in record.steps] == list(range(1, 31))
    assert record.groups == list(space.groups)
    expected = [list(space.ranks_at(0, step).values()) for step in range(30)]
    assert [step.ranks for step in record.steps] == expected
    assert len({tuple(ranks) for ranks in expected}) > 1
    assert sum(record.losses[-5:]) < 0.7 * sum(record.losses[:5])
    assert record.summary()["num_steps"] == 30
    assert record.peak_bytes > 0
    assert json.loads(json.dumps(record.as_dict()))["steps"][0]["loss"] == record.losses[0]
    assert any(not torch.equal(before[name], after) for name, after in trained(model).items())
    assert all(torch.equal(frozen[n], p) for n, p in model.named_parameters() if not p.requires_grad)
    assert not model.training


@pytest.mark.parametrize("method", ["lora", "sparse_peft"])
def test_training_in_bfloat16_stays_near_float32(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, method: Any
) -> None:
    losses = []
    for bf16 in (False, True):
        section = AdapterSection(method=method, ranks=[8])
        model = attach_adapters(load_model(tiny_model_dir("llama")), section, seed=0)
        changed = SECTION.model_copy(update={"arguments": {"bf16": bf16}, "learning_rate": 1e-3})
        record = train_adapters(model, examples(), changed, seed=0, output_dir=tmp_path / str(bf16))
        losses.append(torch.tensor(record.losses))
        assert all(parameter.dtype == torch.float32 for parameter in trained(model).values())
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=0.0)
    assert not torch.equal(losses[1], losses[0])


class Killed(BaseException):
    """Stands for a kill: nothing in the library catches it."""


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch, *, when: str) -> None:
    original = getattr(trainer_module.StepCallback, when)

    def hook(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            raise Killed
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(trainer_module.StepCallback, when, hook)


@pytest.mark.parametrize(
    ("step", "when", "accumulation"),
    [(5, "on_step_begin", 1), (6, "on_save", 2), (2, "on_step_end", 2), (7, "on_save", 1)],
)
def test_a_killed_training_resumes_to_the_same_bits(
    make_model: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    when: str,
    accumulation: int,
) -> None:
    section = SECTION.model_copy(
        update={
            "gradient_accumulation": accumulation,
            "arguments": {"train_sampling_strategy": "group_by_length"} if accumulation == 2 else {},
        }
    )
    straight = make_model(dropout=0.1)
    whole = train(straight, tmp_path / "straight", section)

    with monkeypatch.context() as patch:
        kill_at(step, patch, when=when)
        with pytest.raises(Killed):
            train(make_model(dropout=0.1), tmp_path / "killed", section)
    torch.manual_seed(99)
    resumed = make_model(dropout=0.1)
    record = train(resumed, tmp_path / "killed", section)
    assert_equal(trained(straight), trained(resumed))
    assert record.losses == whole.losses
    assert [s.ranks for s in record.steps] == [s.ranks for s in whole.steps]
    expected: list[Any] = [] if step < 3 else [{"step": 3 if step < 7 else 6, "differences": {}}]
    assert record.resumed == expected


def test_a_finished_training_is_not_repeated(make_model: Callable[..., Any], tmp_path: Path) -> None:
    first = make_model()
    record = train(first, tmp_path)
    second = make_model()
    again = train(second, tmp_path)
    assert_equal(trained(first), trained(second))
    assert again.losses == record.losses


def test_another_training_does_not_resume_here(make_model: Callable[..., Any], tmp_path: Path) -> None:
    train(make_model(), tmp_path)
    with pytest.raises(TrainingError, match="checkpoints of another training"):
        train(make_model(), tmp_path, seed=1)
    with pytest.raises(TrainingError, match="checkpoints of another training"):
        train(make_model(alpha=64), tmp_path)


def test_a_changed_environment_is_told(
    make_model: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(make_model(), tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-7")
    marker = tmp_path / "checkpoint-6" / "complete.json"
    facts = unseal(json.loads(marker.read_text()))
    facts["environment"]["threads"] = "64"
    marker.write_text(json.dumps(seal(facts)))
    record = train(make_model(), tmp_path)
    assert record.resumed == [{"step": 6, "differences": {"threads": ["64", "1"]}}]
    assert "another threads" in caplog.text


def test_damaged_checkpoints_are_passed_over(
    make_model: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    straight = make_model()
    whole = train(straight, tmp_path / "straight")
    with monkeypatch.context() as patch:
        kill_at(7, patch, when="on_step_begin")
        kill_at(7, patch, when="on_step_end")
        with pytest.raises(Killed):
            train(make_model(), tmp_path / "killed")
    last = tmp_path / "killed" / "checkpoint-6"
    files = sorted(path.relative_to(last) for path in last.rglob("*") if path.is_file())
    assert {"complete.json", "optimizer.pt", "trainer_state.json"} <= {str(name) for name in files}
    damages = [(f"checkpoint-6/{name}", kind) for name in files for kind in ("flip", "cut", "deleted")]
    for number, (name, kind) in enumerate([*damages, ("steps.jsonl", "flip"), ("steps.jsonl", "cut")]):
        directory = tmp_path / str(number)
        shutil.copytree(tmp_path / "killed", directory)
        content = bytearray((directory / name).read_bytes())
        content[len(content) // 2] ^= 1
        (directory / name).write_bytes(content if kind == "flip" else content[: len(content) // 2])
        if kind == "deleted":
            (directory / name).unlink()
        caplog.clear()
        checkpoints = Journal(directory).checkpoints()
        assert checkpoints[6][1] is None
        told = [r.getMessage() for r in caplog.records if "not as it was written" in r.getMessage()]
        assert told or (name, kind) == ("checkpoint-6/complete.json", "deleted")
        if name in ("checkpoint-6/optimizer.pt", "steps.jsonl") and kind == "flip":
            resumed = make_model()
            record = train(resumed, directory)
            assert_equal(trained(straight), trained(resumed))
            assert record.losses == whole.losses
            assert record.resumed == ([{"step": 3, "differences": {}}] if checkpoints[3][1] else [])


def test_gradient_checkpointing_trains_the_same_sub_adapters(
    make_model: Callable[..., Any], tmp_path: Path
) -> None:
    plain, checkpointed = make_model(), make_model()
    first = train(plain, tmp_path / "plain")
    section = SECTION.model_copy(update={"gradient_checkpointing": True})
    second = train(checkpointed, tmp_path / "checkpointed", section)
    assert first.losses == pytest.approx(second.losses, abs=1e-5)
    for name, weight in trained(plain).items():
        torch.testing.assert_close(weight, trained(checkpointed)[name], atol=1e-4, rtol=1e-3)


def test_accumulated_steps_equal_whole_ones(make_model: Callable[..., Any], tmp_path: Path) -> None:
    """Micro-batches add the same numbers in another order, so the two agree as far as float32 sums do."""
    gradients: list[list[Tensor]] = []  # of every optimizer step

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
        tensors = [p for group in optimizer.param_groups for p in group["params"]]
        gradients.append([p.grad.clone() for p in tensors if p.grad is not None])

    handle = register_optimizer_step_pre_hook(note)
    try:
        whole = train(make_model(), tmp_path / "one")
        section = SECTION.model_copy(update={"gradient_accumulation": 4})
        cut = train(make_model(), tmp_path / "four", section)
    finally:
        handle.remove()
    assert len(gradients) == 14
    for one, four in zip(gradients[0], gradients[7], strict=True):
        assert (one - four).norm() <= 1e-5 * one.norm()  # float32 rounds at 6e-8; sums are over hundreds
    assert whole.losses[0] == pytest.approx(cut.losses[0], rel=1e-6)
    # Adam divides a gradient by its own size, so rounding of those near zero grows from step to step.
    assert whole.losses == pytest.approx(cut.losses, rel=1e-3)


@pytest.mark.parametrize("loss_on", ["answer", "text"])
def test_the_loss_is_the_mean_over_counted_tokens(
    make_model: Callable[..., Any], tmp_path: Path, loss_on: str
) -> None:
    items = examples(4)
    model = make_model()
    total, count = 0.0, 0
    with torch.no_grad():
        for item in items:
            ids = torch.tensor([[*item.prompt_ids, *item.answer_ids]])
            log_probs = model(input_ids=ids).logits[0].float().log_softmax(-1)
            start = len(item.prompt_ids) if loss_on == "answer" else 1
            for position in range(start, ids.shape[1]):
                total -= log_probs[position - 1, ids[0, position]].item()
                count += 1
    record = train_adapters(
        model,
        items,
        SECTION.model_copy(update={"max_steps": 1}),
        loss_on=loss_on,  # type: ignore[arg-type]
        output_dir=tmp_path,
    )
    assert record.losses == pytest.approx([total / count], abs=1e-5)


def test_a_loss_that_is_no_number_ends_it(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model()
    original = model.forward
    calls = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        outputs = original(*args, **kwargs)
        calls.append(1)
        if len(calls) == 2:
            outputs.logits = outputs.logits * float("nan")
        return outputs

    model.forward = forward
    with pytest.raises(TrainingError, match="loss of step 2 is nan"):
        train(model, tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_gradient_that_is_no_number_ends_it(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model()
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingError, match="gradient of step 1 is not finite"):
        train(model, tmp_path)


def test_no_items(make_model: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no item to train on"):
        train_adapters(make_model(), [], SECTION, output_dir=tmp_path)


def test_a_loss_in_chunks_trains_alike(
    make_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, chunked = make_model(), make_model()
    first = train(plain, tmp_path / "plain", loss_on="text")
    monkeypatch.setattr("sqft.training.head.chunk_elements", lambda device: 1)
    second = train(chunked, tmp_path / "chunked", loss_on="text")
    assert second.losses == pytest.approx(first.losses, rel=1e-4)
    for name, weight in trained(plain).items():
        torch.testing.assert_close(trained(chunked)[name], weight, atol=1e-3, rtol=1e-2)


def test_a_stock_peft_adapter_trains_too(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(load_model(tiny_model_dir("llama")), config)
    record = train_adapters(model, examples(), SECTION, output_dir=tmp_path)
    assert len(record.steps) == SECTION.max_steps
    assert record.losses[-1] < record.losses[0]
