"""The demo's task."""

from pathlib import Path
from typing import Any

import pytest

from sqft.data import load_splits
from sqft.data.generated import write_demo_data
from sqft.data.sources import read_records
from sqft.errors import DataError
from sqft.sections import DataSection

pytest.importorskip("reasoning_gym")


def test_the_demo_data_are_disjoint_and_load(tmp_path: Path, tiny_tokenizer: Any) -> None:
    fields = write_demo_data(tmp_path, train_items=40, search_items=10, test_items=20)
    records = {name: list(read_records(fields[name])) for name in ("train", "search", "test")}
    words = [record.fields["word"] for part in records.values() for record in part]
    assert len(words) == len(set(words)) == 70
    for record in records["test"]:
        item = record.fields
        right = item["choices"][item["label"]]
        assert right == item["word"][0 if "begins" in item["question"] else -1]
        assert len(set(item["choices"])) == 4
    splits = load_splits(DataSection(**fields), tiny_tokenizer, seed=0)
    assert splits.report["items"] == {"train": 40, "search": 10, "test": 20}


def test_the_demo_data_follow_the_seed(tmp_path: Path) -> None:
    counts = {"train_items": 5, "search_items": 2, "test_items": 2}
    texts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fields = write_demo_data(tmp_path / name, seed=seed, **counts)
        texts.append(Path(fields["train"]).read_text())
    assert texts[0] == texts[1] != texts[2]


def test_more_items_than_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqft.data.generated.WORD_LENGTHS", (4, 4))
    with pytest.raises(DataError, match="ask for fewer"):
        write_demo_data(tmp_path, train_items=6000)
