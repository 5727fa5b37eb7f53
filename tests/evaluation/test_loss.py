"""Losses against a slow, obvious version."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sqft.errors import DataError, ModelError
from sqft.evaluation import evaluate_loss, evaluate_perplexity
from sqft.models import load_model


def nats(model: Any, ids: list[int], start: int) -> float:
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(log_probs[position - 1, ids[position]].item() for position in range(start, len(ids)))


@pytest.mark.parametrize("loss_on", ["answer", "text"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_answer_loss(model: Any, make_items: Callable[..., Any], loss_on: Any, batch_size: int) -> None:
    items = make_items()
    result = evaluate_loss(model, items, loss_on=loss_on, batch_size=batch_size)
    starts = [len(e.prompt_ids) if loss_on == "answer" else 1 for e in items]
    expected = [
        nats(model, [*e.prompt_ids, *e.answer_ids], start) for e, start in zip(items, starts, strict=True)
    ]
    assert result.sums == pytest.approx(expected, abs=1e-4)
    assert result.counts == [
        len(e.prompt_ids) + len(e.answer_ids) - start for e, start in zip(items, starts, strict=True)
    ]
    assert result.loss == pytest.approx(sum(expected) / sum(result.counts), abs=1e-5)
    assert result.low < result.loss < result.high
    assert result.num_items == len(items)


def test_the_mode_is_put_back(model: Any, make_items: Callable[..., Any]) -> None:
    model.train()
    evaluate_loss(model, make_items())
    assert model.training
    model.eval()


def test_perplexity(model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 12)
    result = evaluate_perplexity(model, path, tiny_tokenizer, num_tokens=70, sequence_length=32)
    ids = tiny_tokenizer(path.read_text())["input_ids"]
    expected = [nats(model, ids[start : start + 32], 1) for start in (0, 32)]
    assert result.sums == pytest.approx(expected, abs=1e-4)
    assert result.num_tokens == 62
    assert result.log_perplexity == pytest.approx(sum(expected) / 62, abs=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.log_perplexity))
    assert result.standard_error > 0


def test_perplexity_of_too_little_text(model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    with pytest.raises(DataError, match="does not exist"):
        evaluate_perplexity(model, path, tiny_tokenizer)
    path.write_text("short")
    with pytest.raises(DataError, match="less than one window of 512"):
        evaluate_perplexity(model, path, tiny_tokenizer)


def test_no_items(model: Any) -> None:
    with pytest.raises(DataError, match="no item"):
        evaluate_loss(model, [])


def test_logits_that_are_no_numbers(tiny_model_dir: Any, make_items: Callable[..., Any]) -> None:
    broken = load_model(tiny_model_dir("llama"))
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        evaluate_loss(broken, make_items())
