"""What models answered, side by side: some items of the test, and those that the last model finds hardest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["AnswerRow", "Output", "shown_answers"]

COUNT = 6  # of each kind
LONGEST = 1200  # characters of a text


@dataclass(frozen=True)
class Output:
    """What one model answered. loss: nats a token of the right answer, of multiple choice nats an item."""

    model: str
    text: str
    correct: bool
    loss: float | None


@dataclass(frozen=True)
class AnswerRow:
    """One item, and the outputs of the first and the last model."""

    place: int
    question: str
    expected: str
    outputs: list[Output]


def shown_answers(
    items: Mapping[str, Mapping[str, Any]], models: Sequence[str]
) -> dict[str, list[AnswerRow]]:
    """Items under "sample", spread evenly over the test, and "worst", by the loss of the last model.

    items: the figures of every item that `measure_model` gave, by model. models: in the order of the report;
    the first and the last one that answered the same items are shown. Empty where nobody answered.
    """
    answered = [name for name in models if "answers" in items.get(name, {}) and "prompts" in items[name]]
    if not answered:
        return {}
    first, last = answered[0], answered[-1]
    names = [first, last] if last != first and items[first]["ids"] == items[last]["ids"] else [last]
    count = len(items[last]["answers"])
    losses = [_loss(items[last], place) for place in range(count)]
    by_loss = sorted(range(count), key=lambda place: (losses[place] is None, -(losses[place] or 0.0), place))
    worst = by_loss[:COUNT] if count > COUNT else []
    left = [place for place in range(count) if place not in worst]
    sample = left[:: max(1, -(-len(left) // COUNT))]
    rows = {"sample": sample, "worst": worst}
    return {kind: [_row(items, names, place) for place in places] for kind, places in rows.items() if places}


def _row(items: Mapping[str, Mapping[str, Any]], names: Sequence[str], place: int) -> AnswerRow:
    last = items[names[-1]]
    outputs = [
        Output(
            name,
            _shortened(items[name]["answers"][place]),
            bool(items[name]["correct"][place]),
            _loss(items[name], place),
        )
        for name in names
    ]
    return AnswerRow(
        place + 1, _shortened(last["prompts"][place]), _shortened(last["expected"][place]), outputs
    )


def _loss(figures: Mapping[str, Any], place: int) -> float | None:
    """A loss that is not finite became null on its way through JSON."""
    total, tokens = figures["loss_sums"][place], figures["answer_tokens"][place]
    return None if total is None else total / max(tokens, 1)


def _shortened(text: Any) -> str:
    text = str(text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} [...] {text[-LONGEST // 2 :]}"
