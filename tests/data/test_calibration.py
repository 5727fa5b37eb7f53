"""Packing texts into calibration rows."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from sqft.data import calibration_tokens, load_splits
from sqft.errors import DataError
from sqft.sections import CalibrationSection, DataSection


def section(**fields: Any) -> CalibrationSection:
    return CalibrationSection(**({"num_samples": 3, "sequence_length": 8} | fields))


def test_texts_are_packed_with_an_end_between(tiny_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {n} " * 3}) + "\n" for n in range(4)))
    tokens = calibration_tokens(section(source=str(path)), None, tiny_tokenizer, seed=0)
    assert tokens.shape == (3, 8)
    text = tiny_tokenizer.decode(tokens.flatten().tolist())
    assert "</s>te" in text
    again = calibration_tokens(section(source=str(path)), None, tiny_tokenizer, seed=0)
    assert tokens.equal(again)
    assert not tokens.equal(calibration_tokens(section(source=str(path)), None, tiny_tokenizer, seed=2))


def test_train_never_shows_held_out_items(tiny_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{n}:", "answer": str(n)}) + "\n" for n in range(40)))
    data = DataSection(train=str(path), search_items=5, test_items=5)
    splits = load_splits(data, tiny_tokenizer, seed=0)
    tokens = calibration_tokens(section(source="train", num_samples=15), splits.train, tiny_tokenizer, seed=0)
    seen = set(tiny_tokenizer.decode(tokens.flatten().tolist()).split("</s>")[1:-1])
    assert len(seen) > 10
    assert seen <= {e.prompt + e.answer for e in splits.train}


def test_a_mixture_has_the_same_texts_and_others(tiny_tokenizer: Any, tmp_path: Path) -> None:
    for name in ("task", "general"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name} text"}}\n' * 40)
    task, general = (str(tmp_path / f"{name}.jsonl") for name in ("task", "general"))
    mixed = section(source=task, mix=general, mix_share=0.25, num_samples=8)
    tokens = calibration_tokens(mixed, None, tiny_tokenizer, seed=0)
    assert tokens.shape == (8, 8)
    for source, rows in ((task, tokens[:6]), (general, tokens[6:])):
        alone = section(source=source, num_samples=len(rows))
        assert rows.equal(calibration_tokens(alone, None, tiny_tokenizer, seed=0))
    with pytest.raises(DataError, match=r"lower calibration\.num_samples to"):
        calibration_tokens(section(source=task, mix=general, num_samples=900), None, tiny_tokenizer, seed=0)
    for wrong in ({"mix_share": 0.5}, {"mix": "train"}):
        with pytest.raises(ValueError, match=r"no calibration\.mix|other than the training items"):
            section(**wrong)


def test_too_few_tokens_says_how_many(tiny_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("abc def\n")
    with pytest.raises(DataError, match=r"has \d+ tokens; 3 samples of 8 need 24: lower .* to \d"):
        calibration_tokens(section(source=str(path)), None, tiny_tokenizer, seed=0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("train", "there are no training items"),
        ("missing.txt", "there is no file missing.txt"),
        ("missing.jsonl", "there is no file missing.jsonl"),
    ],
)
def test_bad_sources(source: str, message: str, tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match=message):
        calibration_tokens(section(source=source), None, tiny_tokenizer, seed=0)


def test_a_tokenizer_without_an_end_joins_texts(tiny_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {n} " * 3}) + "\n" for n in range(4)))
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = None
    tokens = calibration_tokens(section(source=str(path)), None, tokenizer, seed=0)
    assert tokens.shape == (3, 8)
    assert "</s>" not in tokenizer.decode(tokens.flatten().tolist())


@pytest.mark.parametrize("end", ["txt", "jsonl"])
def test_a_directory_is_no_text(end: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / f"x.{end}").mkdir()
    with pytest.raises(DataError, match=rf"x.{end} is a folder; name its files"):
        calibration_tokens(section(source=str(tmp_path / f"x.{end}")), None, tiny_tokenizer, seed=0)


def test_wrong_field(tiny_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"body": "x"}\n')
    with pytest.raises(DataError, match=r"texts.jsonl:1: no text in field 'text'; it has 'body'"):
        calibration_tokens(section(source=str(path)), None, tiny_tokenizer, seed=0)


def test_a_hub_that_cannot_be_reached(tiny_tokenizer: Any) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(
        DataError, match=r"hub:nobody/nothing, split train: .* \(a local file can be given in its place\)"
    ):
        calibration_tokens(section(source="hub:nobody/nothing"), None, tiny_tokenizer, seed=0)
