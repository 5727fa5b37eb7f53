"""Records out of files of every usual form, several of them, and what is wrong with them."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from sqft.data.sources import expand_paths, read_records, source_content
from sqft.errors import DataError
from sqft.sections import DataSection, HubSource

ROWS = [{"question": 'a "quoted", one', "answer": "1"}, {"question": "two\nlines, ünïcode", "answer": "2"}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow")
        arrow.parquet.write_table(arrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.csv", "a.tsv", "a.parquet", "a"])
def test_every_form_gives_the_same_records(name: str, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow.parquet")
    path = write(tmp_path / name, ROWS)
    records = list(read_records(str(path)))
    assert [record.fields for record in records] == ROWS
    assert all(record.place.startswith(str(path)) for record in records)
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert [record.fields for record in read_records(packed)] == ROWS


@pytest.mark.parametrize(
    "content",
    [
        {"version": "1", "data": ROWS},
        {name: [row[name] for row in ROWS] for name in ROWS[0]},
    ],
    ids=["an object that holds the list", "columns"],
)
def test_json_of_other_shapes(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    assert [record.fields for record in read_records(path)] == ROWS


def test_lines_in_a_file_called_json(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS).rename(tmp_path / "a.json")
    assert [record.fields for record in read_records(path)] == ROWS


def test_text_is_one_record(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first\n\nsecond\n")
    assert [r.fields for r in read_records(tmp_path / "a.txt")] == [{"text": "first\n\nsecond\n"}]


def test_several_files_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in (("b.jsonl", 2), ("a.jsonl", 1), ("c.csv", 3)):
        write(tmp_path / name, [{"n": str(number)}])
    numbers = [r.fields["n"] for r in read_records([str(tmp_path / "*.jsonl"), str(tmp_path / "c.csv")])]
    assert numbers == ["1", "2", "3"]
    assert len(expand_paths([str(tmp_path / "a.jsonl"), str(tmp_path / "*.jsonl")])) == 2
    monkeypatch.setenv("HOME", str(tmp_path))
    assert DataSection(train="~/a.jsonl").train == str(tmp_path / "a.jsonl")
    assert expand_paths("~/a.jsonl") == [tmp_path / "a.jsonl"]


def test_identity_follows_the_content_and_the_order(tmp_path: Path) -> None:
    one, two = write(tmp_path / "1.jsonl", ROWS[:1]), write(tmp_path / "2.jsonl", ROWS[1:])
    assert source_content(str(tmp_path / "*.jsonl")) == source_content([str(one), str(two)])
    assert source_content([str(two), str(one)]) != source_content([str(one), str(two)])
    before = source_content(str(one))
    write(one, ROWS)
    assert source_content(str(one)) != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"q,a\n1,2\n1,2,3\n", r"a.csv:3: 3 fields, but the first line names 2"),
        ("a.csv", b"q,a\n1\n", r"a.csv:2: 1 fields"),
        ("a.csv", b"q,q\n1,2\n", r"a.csv:1: the field 'q' is named twice"),
        ("a.csv", b'q,a\n"1,2\n', r"a.csv:2: not CSV"),
        ("a.csv", b"q,a\n", "is empty"),
        ("a.json", b'[{"a": 1}, ', r"a.json:1: not JSON"),
        ("a.json", b"[1, 2]", r"a.json, record 1: a int, where a JSON object is needed"),
        ("a.json", b"7", "holds a int"),
        ("a.json", b"[" * 100_000, "not JSON"),
        ("a.jsonl", b"[" * 100_000, r"a.jsonl:1: not JSON"),
        ("a.parquet", b"PAR1 no", "not a whole Parquet file"),
        ("a.txt", b"\n \n", "is empty"),
        ("a.txt", b"one\n\xff", r"a.txt:2: not UTF-8"),
        ("a.jsonl.gz", b"\x1f\x8bno", "not a whole gzip file"),
    ],
)
def test_malformed_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow.parquet")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        list(read_records(tmp_path / name))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("openai/gsm8k", "there is no file openai/gsm8k; for the data set of the hub write hub:openai/gsm8k"),
        ("none/*.csv", r"there is no file none/\*.csv$"),
        (["a.jsonl", "b.jsonl"], "there is no file a.jsonl$"),
        (".", "is a folder; name its files"),
    ],
)
def test_missing_files(source: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        list(read_records(source))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hub:openai/gsm8k", HubSource(hub="openai/gsm8k")),
        ("hub:openai/gsm8k:main", HubSource(hub="openai/gsm8k", config="main")),
        ("hub:openai/gsm8k:main:test[:10]", HubSource(hub="openai/gsm8k", config="main", split="test[:10]")),
    ],
)
def test_a_text_stands_for_a_hub_source(text: str, expected: HubSource) -> None:
    section = DataSection(train=text)
    assert section.train == expected
    assert DataSection.model_validate(section.model_dump(mode="json")).train == expected


@pytest.mark.parametrize("name", ["hub:../../etc", "hub:", "hub:a/b/c", "hub:https://x.y/z"])
def test_hub_names_are_names(name: str) -> None:
    with pytest.raises(ValueError, match="hub"):
        DataSection(train=name)
