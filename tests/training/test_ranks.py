"""`RankSampler` in trainers of others: what depends on the step follows it, and nothing else does."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoTokenizer, TrainingArguments

from sqft.adapters import SearchSpace, SqftConfig, extract_sub_adapter
from sqft.adapters.layer import AdapterLinear
from sqft.adapters.space import adapter_layers
from sqft.models import load_model
from sqft.training import RankSampler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
STEPS, ACCUMULATION, HYBRID = 5, 2, 3
PLAIN, TRL = ("transformers", "Trainer", "TrainingArguments"), ("trl", "SFTTrainer", "SFTConfig")
Seen = list[tuple[int, str, int, tuple[bool, ...]]]


def watch(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> Seen:
    """(step, gradient, rank, columns kept) of the first linear, at each of its forward passes in training."""
    first = next(iter(adapter_layers(model).values()))
    seen: Seen = []
    original = AdapterLinear._dropped_slice

    def noted(self: AdapterLinear, adapter: str) -> tuple[Tensor, Tensor]:
        lora_A, lora_B = original(self, adapter)
        if self is first and self.training and torch.is_grad_enabled():
            assert self.seed_and_step is not None
            seed, step = self.seed_and_step
            assert seed == 3
            kept = tuple((lora_A != 0).any(dim=0).tolist())
            seen.append((step, self._gradient(self.settings[adapter]), lora_A.shape[0], kept))
        return lora_A, lora_B

    monkeypatch.setattr(AdapterLinear, "_dropped_slice", noted)
    return seen


def train(model: PeftModel, folder: Path, trainer: tuple[str, str, str], *, resume: bool = False) -> None:
    module, kind, arguments = trainer
    library = importlib.import_module(module)
    generator = torch.Generator().manual_seed(0)
    rows = [
        torch.randint(4, 200, (6,), generator=generator).tolist() for _ in range(STEPS * ACCUMULATION * 2)
    ]
    options: TrainingArguments = getattr(library, arguments)(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=ACCUMULATION,
        gradient_checkpointing=True,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        learning_rate=1e-2,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    extra: dict[str, Any] = {}
    if module == "trl":
        dataset = importlib.import_module("datasets").Dataset.from_list([{"input_ids": row} for row in rows])
        extra["processing_class"] = AutoTokenizer.from_pretrained(model.config._name_or_path)
    else:
        dataset = [{"input_ids": row, "labels": row} for row in rows]
    made = getattr(library, kind)(
        model=model,
        args=options,
        train_dataset=dataset,
        eval_dataset=dataset,
        callbacks=[RankSampler(3)],
        **extra,
    )
    made.train(resume_from_checkpoint=resume)


@pytest.fixture
def make(tiny_model_dir: Callable[..., Path]) -> Callable[[], PeftModel]:
    def attach() -> PeftModel:
        config = SqftConfig(
            method="sparse_peft",
            ranks=[8, 4, 2],
            dropout=0.5,
            gradient="hybrid",
            hybrid_steps=HYBRID,
            task_type="CAUSAL_LM",
        )
        return get_peft_model(load_model(tiny_model_dir("llama")), config)

    return attach


@pytest.mark.parametrize("trainer", [PLAIN, pytest.param(TRL, marks=pytest.mark.slow)])
def test_ranks_columns_and_gradient_follow_the_optimizer_step(
    trainer: tuple[str, str, str],
    make: Callable[[], PeftModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make()
    space, group = SearchSpace.of(model), next(iter(SearchSpace.of(model).groups))
    seen = watch(model, monkeypatch)
    train(model, tmp_path, trainer)
    # Each micro-batch runs forwards twice, since activations are computed again.
    assert [step for step, *_ in seen] == [step for step in range(STEPS) for _ in range(2 * ACCUMULATION)]
    for step in range(STEPS):
        of_step = {entry[1:] for entry in seen if entry[0] == step}
        assert len(of_step) == 1, "micro-batches and what is computed again agree"
        ((gradient, rank, kept),) = of_step
        assert gradient == ("exact" if step % HYBRID == 0 else "lowrank")
        assert rank == space.ranks_at(3, step)[group]
        assert 0 < sum(kept) < len(kept)
    assert len({entry[3] for entry in seen}) == STEPS
    layers = adapter_layers(model).values()
    assert {layer.active_rank["default"] for layer in layers} == {8}


def test_a_resumed_training_goes_on_at_its_step(
    make: Callable[[], PeftModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make()
    train(first, tmp_path, PLAIN)
    expected = {name: p.detach().clone() for name, p in first.named_parameters() if p.requires_grad}
    last = tmp_path / f"checkpoint-{STEPS}"
    last.rename(tmp_path / "end")
    again = make()
    seen = watch(again, monkeypatch)
    train(again, tmp_path, PLAIN, resume=True)
    assert {step for step, *_ in seen} == {STEPS - 1}
    for name, parameter in again.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, expected[name]), name


def test_an_extracted_sub_adapter_trains_at_the_ranks_it_has(
    make: Callable[[], PeftModel], tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    whole = make()
    extract_sub_adapter(whole, SearchSpace.of(whole).median(), tmp_path / "sub")
    model = PeftModel.from_pretrained(
        load_model(tiny_model_dir("llama")), tmp_path / "sub", is_trainable=True
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    train(model, tmp_path / "run", PLAIN)
    after = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.shape[0] for name, p in after.items() if "sqft_A" in name} == {4}
    assert any(not torch.equal(before[name], parameter) for name, parameter in after.items())
