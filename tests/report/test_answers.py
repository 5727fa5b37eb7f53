"""The report shows what was asked, expected and answered."""

from typing import Any

from sqft.report.answers import shown_answers
from sqft.report.page import render_page

from .invented import invent_report


def figures(count: int, *, right: bool, **changes: Any) -> dict[str, Any]:
    return {
        "ids": list(range(count)),
        "prompts": [f"<question {n}>" for n in range(count)],
        "expected": [str(n) for n in range(count)],
        "answers": [str(n) if right else "?" for n in range(count)],
        "correct": [right] * count,
        "loss_sums": [float(n % 7) * 2 for n in range(count)],
        "answer_tokens": [2] * count,
    } | changes


def test_the_first_and_the_last_model_stand_side_by_side() -> None:
    items = {"base": figures(30, right=False), "sparse": {}, "merged": figures(30, right=True)}
    shown = shown_answers(items, ["base", "sparse", "merged"])
    assert all([output.model for output in row.outputs] == ["base", "merged"] for row in shown["worst"])
    assert [row.outputs[1].loss for row in shown["worst"]] == [6.0] * 4 + [5.0] * 2
    places = [row.place for row in shown["sample"]]
    assert len(places) == 6
    assert places == sorted(places)
    assert not set(places) & {row.place for row in shown["worst"]}
    assert (shown["sample"][0].expected, shown["sample"][0].outputs[0].text) == ("0", "?")


def test_other_items_are_not_compared_and_nothing_is_shown_of_nothing() -> None:
    items = {"base": figures(3, right=False, ids=[7, 8, 9]), "merged": figures(3, right=True)}
    shown = shown_answers(items, ["base", "merged"])
    assert [len(row.outputs) for row in shown["sample"]] == [1, 1, 1]
    assert "worst" not in shown
    assert shown_answers({}, ["base"]) == {}
    assert shown_answers({"base": {"ids": [1], "loss_sums": [1.0], "answer_tokens": [1]}}, ["base"]) == {}


def test_the_page_escapes_them_and_cuts_long_ones() -> None:
    items = {"merged": figures(9, right=True, loss_sums=[None, *[1.0] * 8], answers=["x" * 5000] * 9)}
    page = render_page(invent_report(), items)
    assert "&lt;question 0&gt;" in page
    assert "<question" not in page
    assert " [...] " in page
    assert "x" * 601 not in page
