"""Which task should the demo teach? Candidates, untuned, on the dense model and with half its weights gone.

    python -m benchmarks.demo_task --json FILE [--items N] [--threads N]

Every candidate is a multiple choice by likelihood. Wanted: few tokens, dense clearly above chance and well
below its ceiling, and a drop from pruning (magnitude, 50 % of each row) that can be seen.
"""

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reasoning_gym
import torch
from benchmarks.common import (
    SMALL_MODEL,
    environment,
    make_parser,
    markdown_table,
    parse_options,
    write_result,
)

from sqft.data import Example
from sqft.data.prompts import PromptFormat
from sqft.data.records import Record
from sqft.evaluation import evaluate_accuracy
from sqft.models import load_model, load_tokenizer, resolve_model, target_linears
from sqft.ops import mask_rows
from sqft.sections import DataSection, ModelSection

DRAWS = random.Random("demo_task")


@dataclass(frozen=True)
class Candidate:
    """A task: how an item is drawn, and the share of right answers by chance."""

    draw: Callable[[], dict[str, Any]]
    chance: float


def choice(question: str, right: Any, wrong: list[Any]) -> dict[str, Any]:
    """One item, its choices in a drawn order."""
    choices = [str(right), *map(str, wrong)]
    DRAWS.shuffle(choices)
    return {"question": question, "choices": choices, "label": choices.index(str(right))}


def near(number: int) -> list[int]:
    """Three other numbers close by."""
    others = [number + step for step in (-10, -3, -2, -1, 1, 2, 3, 10) if number + step >= 0]
    return DRAWS.sample(others, 3)


def addition() -> dict[str, Any]:
    """Two terms of one or two digits."""
    a, b = DRAWS.randint(1, 60), DRAWS.randint(1, 39)
    return choice(f"{a} + {b} =", a + b, near(a + b))


def progression() -> dict[str, Any]:
    """The fifth number of an arithmetic progression."""
    start, step = DRAWS.randint(1, 30), DRAWS.randint(2, 15)
    shown = ", ".join(str(start + step * index) for index in range(4))
    return choice(f"{shown},", start + 4 * step, near(start + 4 * step))


def largest() -> dict[str, Any]:
    """The largest of three numbers of two digits."""
    numbers = DRAWS.sample(range(10, 100), 3)
    question = f"The largest of the numbers {numbers[0]}, {numbers[1]} and {numbers[2]} is"
    return choice(question, max(numbers), [number for number in numbers if number != max(numbers)])


def letter(*asked: tuple[str, int]) -> Callable[[], dict[str, Any]]:
    """A letter of a word, at one of the (question, position) pairs."""
    items = reasoning_gym.create_dataset("spell_backward", seed=0, size=2000, min_word_len=4, max_word_len=8)
    words = [items[index]["metadata"]["word"].lower() for index in range(2000)]
    words = [word for word in words if word.isascii() and word.isalpha()]

    def draw() -> dict[str, Any]:
        (question, position), word = DRAWS.choice(asked), DRAWS.choice(words)
        others = sorted((set(word) | set("aeinorst")) - {word[position]})
        return choice(question.format(word), word[position], DRAWS.sample(others, 3))

    return draw


FIRST, LAST = ('The word "{}" begins with the letter', 0), ('The word "{}" ends with the letter', -1)
CANDIDATES = {
    "addition": Candidate(addition, 1 / 4),
    "arithmetic progression": Candidate(progression, 1 / 4),
    "largest of three": Candidate(largest, 1 / 3),
    "first letter": Candidate(letter(FIRST), 1 / 4),
    "second letter": Candidate(letter(('The second letter of the word "{}" is', 1)), 1 / 4),
    "last letter": Candidate(letter(LAST), 1 / 4),
    "first or last letter": Candidate(letter(FIRST, LAST), 1 / 4),
}


def examples(candidate: Candidate, form: PromptFormat, count: int) -> list[Example]:
    """Items with different questions."""
    items: dict[str, dict[str, Any]] = {}
    while len(items) < count:
        item = candidate.draw()
        items.setdefault(item["question"], item)
    made = [form.example(Record(item, "drawn")) for item in items.values()]
    return [example for example in made if example is not None]


def prune(model: torch.nn.Module) -> None:
    """Remove the smaller half of each row."""
    with torch.no_grad():
        for linear in target_linears(model, None, []).values():
            weight = linear.get_parameter("weight")
            weight.mul_(mask_rows(weight.abs(), 0.5))


def main() -> None:
    """Measure every candidate, print the table and write the JSON."""
    parser = make_parser(__doc__, json_required=True)
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--cache", type=Path, default=Path("runs/models"))
    options, facts = parse_options(parser), environment()
    directory = resolve_model(ModelSection(source=SMALL_MODEL), options.cache)
    tokenizer = load_tokenizer(directory)
    dense, pruned = load_model(directory), load_model(directory)
    prune(pruned)
    form = PromptFormat(
        DataSection(train="drawn", choices="choices", answer=" {answer}"), tokenizer, "template"
    )
    rows: list[dict[str, Any]] = []
    for name, candidate in CANDIDATES.items():
        items = examples(candidate, form, options.items)
        tokens = sum(map(len, items)) / len(items)
        right = [evaluate_accuracy(model, items, tokenizer).accuracy for model in (dense, pruned)]
        rows.append({"task": name, "tokens": tokens, "chance": candidate.chance, "right": right})
        print(f"{name} done", file=sys.stderr)
    cells = [
        [row["task"], f"{row['tokens']:.0f}", *(f"{share:.0%}" for share in (row["chance"], *row["right"]))]
        for row in rows
    ]
    print(markdown_table(["task", "tokens", "chance", "dense", "50 % magnitude"], cells))
    result = {"environment": facts, "num_items": options.items, "rows": rows, "checks": []}
    write_result(options.json, result)


if __name__ == "__main__":
    main()
