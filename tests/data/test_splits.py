"""Loading, formatting and separating items."""

import json
from pathlib import Path
from typing import Any

import pytest

from sqft.data import Splits, load_splits
from sqft.errors import DataError
from sqft.sections import DataSection


def write(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def items(*numbers: int) -> list[dict[str, str]]:
    return [{"question": f"what is {n} plus {n}?", "answer": f" {2 * n}"} for n in numbers]


def load(tokenizer: Any, seed: int = 0, **fields: Any) -> Splits:
    return load_splits(DataSection(**fields), tokenizer, seed=seed)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    return {
        "train": write(tmp_path / "train.jsonl", items(*range(20))),
        "search": write(tmp_path / "search.jsonl", items(100, 101)),
        "test": write(tmp_path / "test.jsonl", items(200, 201, 202)),
    }


def test_items_hold_text_and_ids(files: dict[str, Any], tiny_tokenizer: Any) -> None:
    splits = load(tiny_tokenizer, **files)
    example = splits.test[0]
    assert (example.prompt, example.answer) == ("what is 200 plus 200?\n", " 400")
    assert tiny_tokenizer.decode(example.prompt_ids) == example.prompt
    assert tiny_tokenizer.decode(example.answer_ids[:-1]) == example.answer
    assert example.answer_ids[-1] == tiny_tokenizer.eos_token_id
    assert splits.report["items"] == {"train": 20, "search": 2, "test": 3}


def test_digest_follows_the_content(files: dict[str, Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    first = load(tiny_tokenizer, **files).digest
    assert load(tiny_tokenizer, **files).digest == first
    changed = files | {"test": write(tmp_path / "other.jsonl", items(200, 201, 203))}
    assert load(tiny_tokenizer, **changed).digest != first


def test_splits_are_drawn_off_train_by_the_seed(files: dict[str, Any], tiny_tokenizer: Any) -> None:
    def split(seed: int) -> Splits:
        return load(tiny_tokenizer, seed, train=files["train"], search_items=3, test_items=5)

    splits = split(0)
    prompts = [[e.prompt for e in part] for part in (splits.train, splits.search, splits.test)]
    assert [len(part) for part in prompts] == [12, 3, 5]
    assert len({prompt for part in prompts for prompt in part}) == 20
    assert split(0).digest == splits.digest
    assert split(1).digest != splits.digest


def test_repeated_items_leave_train_and_are_counted(tiny_tokenizer: Any, tmp_path: Path) -> None:
    shouted = [{"question": "What is 200  plus 200? ", "answer": "400"}]
    splits = load(
        tiny_tokenizer,
        train=write(tmp_path / "train.jsonl", items(1, 2, 100, 200, 200) + shouted),
        search=write(tmp_path / "search.jsonl", items(100, 201)),
        test=write(tmp_path / "test.jsonl", items(200, 201)),
    )
    assert [e.prompt for e in splits.train] == ["what is 1 plus 1?\n", "what is 2 plus 2?\n"]
    assert [e.prompt for e in splits.search] == ["what is 100 plus 100?\n"]
    assert splits.report["dropped"]["in_held_out"] == {"train": 4, "search": 1}


def test_near_duplicates_are_reported_and_kept(tiny_tokenizer: Any, tmp_path: Path) -> None:
    long = "a farmer has {} cows and sells some of them to his good old neighbour on {}"
    train = [{"question": long.format("seven", "monday"), "answer": "x"}, *items(1)]
    test = [{"question": long.format("seven", "friday"), "answer": "x"}, *items(2)]
    other = [{"question": "an unrelated question about the weather in the north", "answer": "x"}]
    splits = load(
        tiny_tokenizer,
        train=write(tmp_path / "train.jsonl", train),
        search=write(tmp_path / "search.jsonl", other),
        test=write(tmp_path / "test.jsonl", test),
    )
    assert len(splits.train) == 2
    assert splits.report["near_duplicates"]["test"] == {"same_but_numbers": 1, "similar": 1}
    assert splits.report["near_duplicates"]["search"] == {"same_but_numbers": 0, "similar": 0}


def test_null_and_long_items_are_dropped_and_counted(files: dict[str, Any], tiny_tokenizer: Any) -> None:
    records = [
        *items(1),
        {"question": "nothing?", "answer": None},
        {"question": "word " * 200, "answer": "x"},
    ]
    path = write(Path(files["train"]).with_name("mixed.jsonl"), records)
    splits = load(tiny_tokenizer, **(files | {"train": path}), sequence_length=100)
    assert splits.report["items"]["train"] == 1
    assert splits.report["dropped"]["null"] == {"train": 1, "search": 0, "test": 0}
    assert splits.report["dropped"]["too_long"] == {"train": 1, "search": 0, "test": 0}
    with pytest.raises(DataError, match=r"mixed.jsonl:3: \d+ tokens, more than data.sequence_length 100"):
        load(tiny_tokenizer, **(files | {"train": path}), sequence_length=100, too_long="error")


def test_choices(tiny_tokenizer: Any, tmp_path: Path) -> None:
    record = {"question": "red or blue:", "choices": ["red", "blue"], "label": 1}
    path = write(tmp_path / "items.jsonl", [record | {"question": f"{n} red or blue:"} for n in range(5)])
    splits = load(
        tiny_tokenizer, train=path, choices="choices", answer=" {answer}", search_items=1, test_items=1
    )
    example = splits.train[0]
    assert example.label == 1
    assert example.answer == " blue"
    assert example.choices_ids is not None
    assert [tiny_tokenizer.decode(ids) for ids in example.choices_ids] == [" red", " blue"]
    assert example.answer_ids == (*example.choices_ids[1], tiny_tokenizer.eos_token_id)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 2}, "'label' is 2; it must be 0 to 1"),
        ({"label": "C"}, "'label' is 'C'; it must be 0 to 1"),
        ({"label": True}, "'label' is True"),
        ({"choices": "red"}, "must be a list"),
    ],
)
def test_bad_choices(change: dict[str, Any], message: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    record = {"question": "q", "choices": ["red", "blue"], "label": 1}
    path = write(tmp_path / "items.jsonl", [record, record | change])
    with pytest.raises(DataError, match=rf"items.jsonl:2: .*{message}"):
        load(tiny_tokenizer, train=path, choices="choices")


def test_chat_template(files: dict[str, Any], tiny_tokenizer: Any) -> None:
    example = load(tiny_tokenizer, **files, template="chat").test[0]
    assert tiny_tokenizer.decode(example.prompt_ids) == "<|user|>what is 200 plus 200?</s><|assistant|>"


def test_chat_template_missing(files: dict[str, Any], tiny_tokenizer: Any) -> None:
    tiny_tokenizer = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer._tokenizer, eos_token="</s>")
    with pytest.raises(DataError, match="no chat template"):
        load(tiny_tokenizer, **files, template="chat")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "x", ', "train.jsonl:3: not JSON"),
        ('["x"]', "train.jsonl:3: a list, where a JSON object is needed"),
        ('{"question": "x"}', "train.jsonl:3: no field 'answer'; it has 'question'"),
    ],
)
def test_malformed_lines(line: str, message: str, files: dict[str, Any], tiny_tokenizer: Any) -> None:
    path = Path(files["train"])
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(DataError, match=message):
        load(tiny_tokenizer, **files)


def test_missing_empty_and_binary_files(files: dict[str, Any], tiny_tokenizer: Any) -> None:
    path = Path(files["train"])
    path.write_bytes(b'{"question": "\xff"}\n')
    with pytest.raises(DataError, match=r"train.jsonl:1: not UTF-8"):
        load(tiny_tokenizer, **files)
    path.write_text("\n\n")
    with pytest.raises(DataError, match="is empty"):
        load(tiny_tokenizer, **files)
    path.unlink()
    with pytest.raises(DataError, match="there is no file"):
        load(tiny_tokenizer, **files)


def test_small_data_gives_a_share_and_says_so(
    files: dict[str, Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    report = load(tiny_tokenizer, train=files["train"]).report
    assert report["items"] == {"train": 14, "search": 2, "test": 4}
    assert report["notes"] == [
        "4 test items are split off 20 (300 are usual)",
        "2 search items are split off 20 (64 are usual)",
    ]
    few = write(tmp_path / "few.jsonl", items(1, 2, 3))
    assert load(tiny_tokenizer, train=few).report["items"] == {"train": 3, "search": 0, "test": 0}
    many = write(tmp_path / "many.jsonl", items(*range(2000)))
    splits = load(tiny_tokenizer, train=many)
    assert splits.report["items"] == {"train": 1636, "search": 64, "test": 300}
    assert splits.report["notes"] == []


def test_too_few_items_for_the_splits_that_are_asked_for(files: dict[str, Any], tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="has 20 usable items; 18 test items and 2 search items"):
        load(tiny_tokenizer, train=files["train"], test_items=18)


@pytest.mark.parametrize("field", [{"role": "user"}, [{"role": "user", "content": "hi"}], [["a"]]])
def test_fields_that_are_no_text_are_refused(field: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [{"asked": field, "answer": "yes"}] * 5)
    with pytest.raises(DataError, match=r"t.jsonl:1: data.prompt uses \{asked\}, which is a .*, no text"):
        load(tiny_tokenizer, train=path, prompt="{asked}", answer="{answer}")


def test_nothing_left_to_train_on(files: dict[str, Any], tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no train item is left"):
        load(tiny_tokenizer, **(files | {"train": files["test"]}))


@pytest.mark.parametrize("prompt", ["{", "{}", "{0}"])
def test_bad_format_strings(prompt: str, files: dict[str, Any], tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"data\.prompt"):
        load(tiny_tokenizer, **files, prompt=prompt)


def test_a_list_is_written_out_or_indexed(tiny_tokenizer: Any, tmp_path: Path) -> None:
    record = {"question": "which", "choices": ["red", "green"], "answer": " red"}
    path = write(tmp_path / "t.jsonl", [record | {"question": f"which {i}"} for i in range(4)])
    prompt = "{question}: {choices}; first {choices[0]}, {choices!s:>11}"
    splits = load(tiny_tokenizer, train=path, prompt=prompt, search_items=1, test_items=1)
    assert splits.test[0].prompt.partition(":")[2] == " red, green; first red,  red, green"
