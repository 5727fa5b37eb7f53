"""What the benchmarks share, and that each tells its options without data, network or a file outside."""

import importlib
import re
import sys
from pathlib import Path

import pytest
from benchmarks.common import check, checks_table, markdown_table, read_text

FOLDER = Path(__file__).parents[1] / "benchmarks"
# compression_peer runs in llm-compressor's own environment, random_llama makes a model; the others are parts.
PARTS = {
    "campaign",
    "common",
    "compression_peer",
    "decode_rivals",
    "faulty_disk",
    "published",
    "random_llama",
    "steps",
    "tiny",
    "warm",
}
COMMANDS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in PARTS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_benchmark_tells_its_options(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        module.main()
    told = capsys.readouterr().out
    assert end.value.code == 0
    assert f"python -m benchmarks.{name}" in told
    assert "--json" in told


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: path.name)
def test_no_benchmark_points_outside_the_repository(path: Path) -> None:
    assert not re.search(r"""["'](\.\./|/\w|~)""", path.read_text(encoding="utf-8"))


def test_an_aim_has_one_bound_and_what_was_not_measured_is_neither_met_nor_missed() -> None:
    assert check("time", 0.5, at_most=0.5)["met"] is True
    assert check("speed", 1.9, at_least=2.0)["met"] is False
    assert check("speed", None, at_least=2.0, aim=3.0) == {
        "name": "speed",
        "value": None,
        "at_least": 2.0,
        "met": None,
        "aim": 3.0,
    }
    with pytest.raises(AssertionError):
        check("both", 1.0, at_most=2.0, at_least=0.5)
    with pytest.raises(AssertionError):
        check("none", 1.0)


def test_tables_are_markdown() -> None:
    assert markdown_table(["a", "b"], [[1, "x"]]) == "| a | b |\n| --- | --- |\n| 1 | x |"
    table = checks_table([check("time", None, at_most=1), check("speed", 3, at_least=2, floor=1.234)])
    assert "| time | - | ≤ 1 |  |  | not measured |" in table
    assert "| speed | 3 | ≥ 2 |  | 1.23 | yes |" in table


def test_texts_come_from_a_directory_or_from_a_story_in_a_package(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("some text")
    assert read_text(tmp_path, "test.txt") == "some text"
    with pytest.raises(SystemExit, match=r"validation\.txt does not exist"):
        read_text(tmp_path, "validation.txt")
    calibration, test = (read_text(None, name) for name in ("validation.txt", "test.txt"))
    assert len(calibration) > 10_000
    assert len(test) > 15_000
    assert test[:1000] not in calibration
