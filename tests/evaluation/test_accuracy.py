"""Accuracy by likelihood and by generation, against slow, obvious versions."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from sqft.errors import DataError
from sqft.evaluation import evaluate_accuracy, evaluate_items, evaluate_loss
from sqft.evaluation.accuracy import score_choices
from sqft.evaluation.generation import generate_answers, normalize


def test_choices_are_scored_as_if_alone(model: Any, make_items: Callable[..., Any]) -> None:
    items = make_items(choices=True)
    scores = score_choices(model, items, batch_size=4)
    for example, item in zip(items, scores, strict=True):
        for choice, score in zip(example.choices_ids, item, strict=True):
            ids = torch.tensor([[*example.prompt_ids, *choice]])
            with torch.no_grad():
                log_probs = model(input_ids=ids).logits[0].double().log_softmax(-1)
            start = len(example.prompt_ids)
            expected = sum(log_probs[start - 1 + i, token].item() for i, token in enumerate(choice))
            assert score == pytest.approx(expected, abs=1e-4)


def test_accuracy_by_likelihood(model: Any, make_items: Callable[..., Any], tiny_tokenizer: Any) -> None:
    items = make_items(choices=True)
    best = [max(range(3), key=item.__getitem__) for item in score_choices(model, items)]
    right = [replace(example, label=label) for example, label in zip(items, best, strict=True)]
    result = evaluate_accuracy(
        model, [*right[:6], replace(right[6], label=(best[6] + 1) % 3)], tiny_tokenizer
    )
    assert result.correct == [True] * 6 + [False]
    assert result.accuracy == pytest.approx(6 / 7)
    assert (result.low, result.high) == pytest.approx((0.4869, 0.9743), abs=1e-3)
    assert result.method == "likelihood"
    taken = [(example.choices_ids or ())[index] for example, index in zip(items, best, strict=True)][:7]
    assert result.answers == [tiny_tokenizer.decode(ids) for ids in taken]


def greedy(model: Any, tokenizer: Any, example: Any, length: int) -> str:
    ids = list(example.prompt_ids)
    answer: list[int] = []
    for _ in range(length):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        answer.append(token)
        ids.append(token)
    text: str = tokenizer.decode(answer, skip_special_tokens=True)
    return text


@pytest.mark.parametrize("batch_size", [1, 4])
def test_generation_equals_one_by_one(
    model: Any, make_items: Callable[..., Any], tiny_tokenizer: Any, batch_size: int
) -> None:
    plain = [greedy(model, tiny_tokenizer, example, 5) for example in make_items()]
    items = [replace(example, answer=text) for example, text in zip(make_items(), plain, strict=True)]
    answers = generate_answers(model, items, tiny_tokenizer, batch_size=batch_size, max_new_tokens=5)
    expected = [text if "\n" in text.strip() else text.rstrip("\n") for text in plain]
    assert [normalize(a) for a in answers] == [normalize(text) for text in expected]
    result = evaluate_accuracy(model, items, tiny_tokenizer, batch_size=batch_size, max_new_tokens=5)
    assert result.accuracy == 1.0
    assert result.method == "exact_match"


def test_an_answer_that_cannot_match_is_not_finished(
    model: Any, make_items: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    items = [replace(example, answer="\x01") for example in make_items(4)]
    lengths: list[int] = []
    original = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        lengths.append(kwargs["input_ids"].shape[1])
        return original(*args, **kwargs)

    model.forward = forward
    try:
        result = evaluate_accuracy(model, items, tiny_tokenizer, max_new_tokens=50)
    finally:
        model.forward = original
    assert result.accuracy == 0.0
    assert len(lengths) < 10


@pytest.mark.parametrize("choices", [True, False])
def test_loss_and_accuracy_together_equal_each_alone(
    model: Any, make_items: Callable[..., Any], tiny_tokenizer: Any, choices: bool
) -> None:
    items = make_items(choices=choices)
    loss, accuracy = evaluate_items(model, items, tiny_tokenizer, batch_size=4)
    assert loss.sums == pytest.approx(evaluate_loss(model, items).sums, abs=1e-4)
    assert accuracy == evaluate_accuracy(model, items, tiny_tokenizer)


def test_choices_of_one_token_cost_one_pass(
    model: Any, make_items: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    items = [
        replace(example, choices_ids=((5,), (6,), (example.answer_ids[0],)), label=2)
        for example in make_items(choices=True)
    ]
    rows = 0
    original = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal rows
        rows += len(kwargs["input_ids"])
        return original(*args, **kwargs)

    model.forward = forward
    try:
        evaluate_items(model, items, tiny_tokenizer)
    finally:
        model.forward = original
    assert rows == len(items)


def test_normalization() -> None:
    assert normalize("  The  Answer\t") == normalize("the answer")


def test_no_items_or_mixed_ones(model: Any, make_items: Callable[..., Any], tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no item"):
        evaluate_accuracy(model, [], tiny_tokenizer)
    with pytest.raises(DataError, match="2 of 4 items have choices"):
        evaluate_accuracy(model, make_items(2) + make_items(2, choices=True), tiny_tokenizer)
