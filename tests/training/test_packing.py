"""Packing changes where tokens lie, never what is learned."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from sqft.adapters import SearchSpace, attach_adapters
from sqft.data import Example, collate
from sqft.data.batches import IGNORED, collate_packed
from sqft.errors import TrainingError
from sqft.models import load_model
from sqft.sections import AdapterSection, TrainSection
from sqft.training import train_adapters
from sqft.training.packing import check_packing

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
LENGTHS = [(9, 3), (2, 1), (4, 2), (1, 2), (7, 1), (3, 4)]


def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, 288, (length,), generator=generator).tolist())

    turns = [((2, 4),), *[()] * 5]  # an earlier turn of the assistant, which counts as well
    return [
        Example("", "", ids(prompt), ids(answer), earlier_answers=earlier)
        for (prompt, answer), earlier in zip(LENGTHS, turns, strict=True)
    ]


@pytest.fixture
def model(tiny_model_dir: Callable[..., Path]) -> nn.Module:
    return attach_adapters(
        load_model(tiny_model_dir("llama")), AdapterSection(method="lora", ranks=[4]), seed=0
    )


@pytest.mark.parametrize("loss_on", ["answer", "text"])
def test_every_token_is_there_once_with_its_place_and_its_label(loss_on: str) -> None:
    items = examples()
    packed = collate_packed(items, loss_on)  # type: ignore[arg-type]
    lengths = [len(item.token_ids) for item in items]
    assert packed["input_ids"].shape == (4, max(lengths))  # in place of six
    assert int(packed["row_tokens"].sum()) == sum(lengths)
    found = {}
    for ids, places, labels, tokens in zip(*packed.values(), strict=True):
        starts = [*(places == 0).nonzero().flatten().tolist(), len(ids)]
        for start, end in pairwise(starts):
            assert places[start:end].tolist() == list(range(end - start))
            if start < tokens:
                found[tuple(ids[start:end].tolist())] = labels[start:end].tolist()
            else:
                assert set(labels[start:end].tolist()) == {IGNORED}
    assert set(found) == {item.token_ids for item in items}
    for item in items:
        label = collate([item], loss_on)["labels"][0].tolist()  # type: ignore[arg-type]
        assert found[item.token_ids] == label


@pytest.mark.parametrize("loss_on", ["answer", "text"])
@pytest.mark.parametrize("method", ["exact loss", "chunks"])
def test_loss_and_gradients_are_those_without_packing(
    loss_on: str, method: str, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method == "chunks":
        monkeypatch.setattr("sqft.training.head.chunk_elements", lambda device: 1)
    space = SearchSpace.of(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    results = []
    for packing in (None, "bfd"):
        model.load_state_dict(start, strict=False)
        section = TrainSection(
            batch_size=6, gradient_accumulation=2, max_steps=3, learning_rate=1e-2, packing=packing,
            arguments={"optim": "sgd", "max_grad_norm": 0.0},
        )  # fmt: skip
        record = train_adapters(
            model,
            examples(),
            section,
            loss_on=loss_on,  # type: ignore[arg-type]
            output_dir=tmp_path / str(packing),
            space=space,
        )
        trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        losses, tokens = ([getattr(step, name) for step in record.steps] for name in ("loss", "tokens"))
        results.append((losses, tokens, trained))
    (losses, tokens, plain), (packed_losses, packed_tokens, packed) = results
    assert packed_losses == pytest.approx(losses, rel=1e-5)
    assert packed_tokens == tokens == [sum(map(sum, LENGTHS))] * 3
    moved = max(float((plain[name] - start[name]).abs().max()) for name in plain)
    assert moved > 1e-5
    for name, weight in plain.items():  # one step of SGD moves by the gradient
        torch.testing.assert_close(packed[name], weight, rtol=0, atol=1e-3 * moved)


def test_a_model_that_lets_items_mix_is_refused(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    check_packing(model, examples(), "train")
    forward = model.forward

    def without_positions(**inputs: torch.Tensor) -> object:
        return forward(**{name: value for name, value in inputs.items() if name != "position_ids"})

    monkeypatch.setattr(model, "forward", without_positions)
    with pytest.raises(TrainingError, match=r"see each other .* leave packing out"):
        check_packing(model, examples(), "train")


def test_a_model_without_positions_is_refused() -> None:
    class Alibi(nn.Linear):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:  # type: ignore[override]
            return input_ids

    with pytest.raises(TrainingError, match="takes no positions"):
        check_packing(Alibi(1, 1), examples(), "train")
