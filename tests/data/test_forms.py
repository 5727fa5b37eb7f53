"""Twelve forms of data are recognised, brought to items, and shown as they are read."""

import json
from pathlib import Path
from typing import Any

import pytest

from sqft.data import Example, load_splits
from sqft.errors import DataError
from sqft.sections import DataSection

TURNS = [("user", "what is 3 plus 4?"), ("assistant", "7"), ("user", "and 5?"), ("assistant", "12")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]
NAMES = {"user": "human", "assistant": "gpt"}
SHAREGPT = [{"from": NAMES[role], "value": content} for role, content in TURNS]
CHAT = "<|user|>what is 3 plus 4?</s><|assistant|>7</s><|user|>and 5?</s><|assistant|>"
ARC = {"text": ["red", "blue", "green"], "label": ["A", "B", "C"]}

# form, record, prompt, answer, and what is said of it
FORMS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "messages": ({"messages": MESSAGES}, CHAT, "12", "messages"),
    "sharegpt": ({"conversations": SHAREGPT}, CHAT, "12", "messages"),
    "prompt and completion": ({"prompt": "1+1=", "completion": "2"}, "1+1=", "2", "prompt-completion"),
    "conversational completion": (
        {"prompt": MESSAGES[:3], "completion": MESSAGES[3:]},
        CHAT,
        "12",
        "prompt-completion",
    ),
    "question and answer": ({"question": "why?", "answer": "so"}, "why?\n", "so", "question-answer"),
    "alpaca": (
        {"instruction": "Add.", "input": "1 and 1", "output": "2"},
        "<|user|>Add.\n\n1 and 1</s><|assistant|>",
        "2",
        "alpaca",
    ),
    "alpaca without input": (
        {"instruction": "Add 1 and 1.", "input": "", "output": "2"},
        "<|user|>Add 1 and 1.</s><|assistant|>",
        "2",
        "alpaca",
    ),
    "choices by index": (
        {"question": "which?", "choices": ["red", "blue"], "label": 1},
        "Question: which?\nAnswer:",
        " blue",
        "choices",
    ),
    "choices as of ARC": (
        {"question": "which?", "choices": ARC, "answerKey": "C"},
        "Question: which?\nAnswer:",
        " green",
        "choices",
    ),
    "choices by letter": (
        {"question": "which?", "options": ["red", "blue"], "answer": "A"},
        "Question: which?\nAnswer:",
        " red",
        "choices",
    ),
    "choices by digit in a text": (
        {"ctx": "the sky is", "endings": ["red", "blue"], "label": "1"},
        "Question: the sky is\nAnswer:",
        " blue",
        "choices",
    ),
    "anything by format strings": ({"q": "why?", "a": ["x", "y"]}, "Q: why? A:", "x", "template"),
}


def load(tokenizer: Any, path: Path, *records: dict[str, Any], **settings: Any) -> Example:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    splits = load_splits(DataSection(train=str(path), **settings), tokenizer, seed=0)
    assert len(splits.train) == len(records)
    return splits.train[0]


@pytest.mark.parametrize("name", FORMS)
def test_forms_are_recognised(name: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    record, prompt, answer, form = FORMS[name]
    settings = {"prompt": "Q: {q} A:", "answer": "{a[0]}"} if form == "template" else {}
    path = tmp_path / "a.jsonl"
    example = load(tiny_tokenizer, path, record, **settings)
    assert (example.prompt, example.answer) == (prompt, answer)
    assert tiny_tokenizer.decode(example.prompt_ids) == prompt
    assert tiny_tokenizer.decode(example.answer_ids) == answer + "</s>"
    report = load_splits(DataSection(train=str(path), **settings), tiny_tokenizer, seed=0).report
    assert report["forms"]["train"].startswith(form)
    if form not in ("template", "choices"):
        assert load(tiny_tokenizer, path, record, form=form) == example


def test_earlier_turns_of_the_assistant_are_counted(tiny_tokenizer: Any, tmp_path: Path) -> None:
    whole = load(tiny_tokenizer, tmp_path / "a.jsonl", {"messages": MESSAGES})
    counted = [whole.token_ids[place] for place in whole.counted("answer")]
    assert tiny_tokenizer.decode(counted) == "7</s>12</s>"
    assert len(whole.counted("text")) == len(whole.token_ids) - 1
    completion = load(tiny_tokenizer, tmp_path / "a.jsonl",
                      {"prompt": MESSAGES[:3], "completion": MESSAGES[3:]})  # fmt: skip
    counted = [completion.token_ids[place] for place in completion.counted("answer")]
    assert tiny_tokenizer.decode(counted) == "12</s>"


def test_generation_markers_of_the_template_decide(tiny_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer._tokenizer, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>"
        "{% generation %}{{ m.content }}!</s>{% endgeneration %}"
        "{% else %}<|user|>{{ m.content }}</s>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    example = load(tokenizer, tmp_path / "a.jsonl", {"messages": MESSAGES})
    counted = [example.token_ids[place] for place in example.counted("answer")]
    assert tokenizer.decode(counted) == "7!</s>12!</s>"


def test_a_template_that_rewrites_earlier_turns(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """As templates of reasoning models do, which leave out what was thought before."""
    tokenizer = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer._tokenizer, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>"
        "{{ m.content if loop.last or m.role == 'user' else 'earlier' }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    path = tmp_path / "a.jsonl"
    example = load(tokenizer, path, {"messages": MESSAGES})
    counted = [example.token_ids[place] for place in example.counted("answer")]
    assert tokenizer.decode(counted) == "12</s>"
    report = load_splits(DataSection(train=str(path)), tokenizer, seed=0).report
    assert "1 earlier turns of the assistant are not counted" in report["notes"][-1]


def test_texts_are_joined_and_cut_into_windows(tiny_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"the quick brown fox {n} "}) + "\n" for n in range(40)))
    section = DataSection(train=str(path), sequence_length=64)
    splits = load_splits(section, tiny_tokenizer, seed=0)
    windows = [*splits.train, *splits.search, *splits.test]
    assert all(window.is_text for window in windows)
    assert sorted(len(window) for window in windows)[1:] == [64] * (len(windows) - 1)
    assert all(window.counted("answer") == window.counted("text") for window in windows)
    assert any(tiny_tokenizer.eos_token_id in window.answer_ids[:-1] for window in windows)
    (tmp_path / "a.txt").write_text("some words\n" * 200)
    text = load_splits(DataSection(train=str(tmp_path / "a.txt"), sequence_length=64), tiny_tokenizer, seed=0)
    assert text.report["forms"] == {"train": "text"}


def test_numbers_are_texts_and_nulls_are_dropped(tiny_tokenizer: Any, tmp_path: Path) -> None:
    example = load(tiny_tokenizer, tmp_path / "a.jsonl", {"question": 3, "answer": 4.5})
    assert (example.prompt, example.answer) == ("3\n", "4.5")
    path = tmp_path / "a.jsonl"
    rows = [
        {"question": "a", "answer": "b"},
        {"question": None, "answer": "b"},
        {"question": "a", "answer": ""},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = load_splits(DataSection(train=str(path)), tiny_tokenizer, seed=0).report
    assert report["dropped"]["null"]["train"] == 2


def test_trailing_questions_are_left_out(tiny_tokenizer: Any, tmp_path: Path) -> None:
    asked = [*MESSAGES, {"role": "user", "content": "and 6?"}]
    assert load(tiny_tokenizer, tmp_path / "a.jsonl", {"messages": asked}).prompt == CHAT


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"input": "a", "target": "b"},
            "no form is known that has the fields 'input', 'target'; set data.prompt",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "of pairs of preference one answer can be learnt"),
        ({"messages": [{"role": "king", "content": "a"}]}, "the role 'king' in 'messages' is unknown"),
        ({"messages": [{"role": "user", "content": 3}]}, "is a int, no text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part that is not text"),
        ({"messages": MESSAGES[1:]}, "begins with the assistant"),
        ({"question": {"a": 1}, "answer": "b"}, "the field 'question' is a dict, no text"),
        ({"question": "a", "choices": ARC, "answerKey": "E"}, "'answerKey' is 'E'; it must be A, B, C"),
    ],
)
def test_what_is_refused(record: dict[str, Any], message: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as raised:
        load(tiny_tokenizer, tmp_path / "a.jsonl", record)
    assert f"{tmp_path / 'a.jsonl'}:1" in str(raised.value)


def test_a_template_that_refuses_is_told_with_the_place(tiny_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer._tokenizer, eos_token="</s>")
    with pytest.raises(DataError, match=r"a.jsonl:1: messages need a chat template"):
        load(tokenizer, tmp_path / "a.jsonl", {"messages": MESSAGES})
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"a.jsonl:1: the chat template refuses .*: roles must alternate"):
        load(tokenizer, tmp_path / "a.jsonl", {"messages": MESSAGES})
    tokenizer.chat_template = "{% set x = 'a' * 10**9 %}{{ x }}"
    with pytest.raises(DataError, match="refuses this conversation: it takes more than 512 MiB"):
        load(tokenizer, tmp_path / "a.jsonl", {"messages": MESSAGES})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}NEVER{% endif %}"
    with pytest.raises(DataError, match="does not write an answer right behind its header"):
        load(tokenizer, tmp_path / "a.jsonl", {"messages": MESSAGES})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "messages", "prompt": "{a}"}, "form messages fixes prompt and answer"),
        ({"form": "template", "prompt": "{a}"}, "form template needs prompt and answer"),
        ({"form": "messages", "template": "plain"}, "leave template out"),
    ],
)
def test_settings_that_contradict(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataSection(train="a.jsonl", **settings)
