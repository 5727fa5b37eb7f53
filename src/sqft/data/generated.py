"""The demo's task, written to disk without a network: which letter does a word begin, or end, with?

The words come from reasoning-gym's `spell_backward` task (extra: demo). Every item is a multiple choice of
four letters, so that chance is 25 % and each choice is one token.
"""

import json
import random
from pathlib import Path
from typing import Any

from sqft.directories import new_directory
from sqft.errors import DataError, require

__all__ = ["write_demo_data"]

COMMON = "aeinorst"
WORD_LENGTHS = (4, 8)
ENDS = ("begins", 0), ("ends", -1)


def write_demo_data(
    directory: Path, *, seed: int = 0, train_items: int = 1600, search_items: int = 64, test_items: int = 300
) -> dict[str, Any]:
    """Write train.jsonl, search.jsonl and test.jsonl; no word occurs in two of them, or twice in one.

    A record is {"question", "choices", "label", "word"}; half of the questions ask for the first letter, half
    for the last. The files are a function of the seed and the counts.

    Returns the fields of the DataSection that reads them.

    Raises: MissingExtraError without reasoning-gym; DataError for more items than there are words;
    WorkspaceError if the directory holds anything else, or what was written there is changed.
    """
    counts = {"train": train_items, "search": search_items, "test": test_items}
    draws = random.Random(f"demo:{seed}")
    words = _words(sum(counts.values()), seed)
    section: dict[str, Any] = {}
    with new_directory(directory) as partial:
        for name, count in counts.items():
            records = [_record(words.pop(), *ENDS[index % 2], draws) for index in range(count)]
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (partial / f"{name}.jsonl").write_text(lines, encoding="utf-8")
            section[name] = str(directory / f"{name}.jsonl")
    return section | {
        "prompt": "{question}",
        "answer": " {answer}",
        "choices": "choices",
        "label": "label",
        "sequence_length": 64,
    }


def _words(count: int, seed: int) -> list[str]:
    gym = require("reasoning_gym", "demo")
    shortest, longest = WORD_LENGTHS
    size = 4 * count + 1000
    items = gym.create_dataset(
        "spell_backward", seed=seed, size=size, min_word_len=shortest, max_word_len=longest
    )
    drawn = (items[index]["metadata"]["word"].lower() for index in range(size))
    words = list(dict.fromkeys(word for word in drawn if word.isascii() and word.isalpha()))
    if len(words) < count:
        raise DataError(
            f"the demo's task has {len(words)} words, {count} items were asked for; ask for fewer"
        )
    return words[:count]


def _record(word: str, verb: str, position: int, draws: random.Random) -> dict[str, Any]:
    right = word[position]
    others = sorted((set(word) | set(COMMON)) - {right})
    choices = [right, *draws.sample(others, 3)]
    draws.shuffle(choices)
    question = f'The word "{word}" {verb} with the letter'
    return {"question": question, "choices": choices, "label": choices.index(right), "word": word}
