"""Marks numeric answers: the last number in a text counts, and may differ by 0.001.

The task files of this package name these functions; they read `question` and `answer` of a record, where the
answer is a number, or a worked solution that ends in one.
"""

import math
import re
from typing import Any

__all__ = ["last_number", "mark_number", "numbers_agree"]

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
TOLERANCE = 1e-3


def last_number(text: str) -> float | None:
    """The last number in a text, thousands separators aside; None if there is none.

    Source: how the paper's math tasks are marked (its evaluation script, arXiv 2410.03750).
    """
    found = NUMBER.findall(re.sub(r"(?<=\d),(?=\d)", "", text))
    value = float(found[-1]) if found else math.nan
    return value if math.isfinite(value) else None


def numbers_agree(answer: str, expected: Any) -> bool:
    """Whether the last number of an answer is that of the expected one, to 0.001."""
    given, right = last_number(answer), last_number(str(expected))
    return given is not None and right is not None and abs(given - right) <= TOLERANCE


def mark_number(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """What lm-evaluation-harness calls for each item: the metric `acc`."""
    return {"acc": float(numbers_agree(results[0], doc["answer"]))}
