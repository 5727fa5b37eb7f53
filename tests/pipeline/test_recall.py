from collections.abc import Iterator
from pathlib import Path

import pytest

from sqft.errors import ModelError
from sqft.pipeline import recall as module
from sqft.pipeline.recall import recall


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "sqft" / "plans"


def ask(answers: Iterator[str], question: object = "how?", source: str = "sqft.errors") -> str:
    found = recall("test", question, lambda: next(answers), module=source)
    assert isinstance(found, str)
    return found


def test_an_answer_is_found_once_for_each_question_and_source(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter("abcd")
    assert [ask(answers), ask(answers)] == ["a", "a"]
    assert ask(answers, "why?") == "b"
    assert ask(answers, source="sqft.artifacts") == "c"
    monkeypatch.setattr(module, "_release", lambda library: "another")
    assert ask(answers) == "d"


@pytest.mark.parametrize("damage", ["", "[]", '{"answer": "z"}', '{"answer": "z", "sha256": "0"}'])
def test_a_damaged_answer_is_found_again(damage: str, cache: Path) -> None:
    answers = iter("abc")
    ask(answers)
    (path,) = cache.glob("*.json")
    path.write_text(damage)
    assert [ask(answers), ask(answers)] == ["b", "b"]


def test_an_error_is_no_answer(cache: Path) -> None:
    def refuse() -> str:
        raise ModelError("no such model")

    with pytest.raises(ModelError):
        recall("test", "how?", refuse, module="sqft.errors")
    assert ask(iter("a")) == "a"


def test_the_oldest_answers_are_forgotten(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 2)
    for number in range(4):
        ask(iter("a"), number)
    assert len(list(cache.glob("*.json"))) == 2


def test_answers_that_cannot_be_kept_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    answers = iter("ab")
    assert [ask(answers), ask(answers)] == ["a", "b"]
