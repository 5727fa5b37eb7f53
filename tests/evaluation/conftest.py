"""A tiny model, its tokenizer and items."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sqft.data import Example
from sqft.models import load_model


@pytest.fixture(scope="session")
def model(tiny_model_dir: Callable[..., Path]) -> Any:
    return load_model(tiny_model_dir("llama"))


def items(tokenizer: Any, count: int = 9, *, choices: bool = False) -> list[Example]:
    made = []
    for n in range(count):
        prompt, texts = "what is " * (1 + n % 3) + f"{n}?", (" yes", " no never", " no")
        ids = [tuple(tokenizer(text)["input_ids"]) for text in texts]
        label = n % 3
        made.append(
            Example(
                prompt,
                texts[label],
                tuple(tokenizer(prompt)["input_ids"]),
                (*ids[label], tokenizer.eos_token_id),
                tuple(ids) if choices else None,
                label if choices else None,
            )
        )
    return made


@pytest.fixture
def make_items(tiny_tokenizer: Any) -> Callable[..., list[Example]]:
    return lambda count=9, choices=False: items(tiny_tokenizer, count, choices=choices)
