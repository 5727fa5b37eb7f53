"""`sqft init` writes a recipe that `sqft plan` accepts, or nothing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sqft.cli import run_command_line
from sqft.pipeline import load_recipe, plan_recipe
from sqft.pipeline.draft import GOALS, RUNTIMES


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"what is {n} plus {n}?", "answer": str(2 * n)} for n in range(60)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize(("goal", "runtime"), list(zip((*GOALS, "cpu"), RUNTIMES, strict=True)))
def test_what_it_writes_is_planned(
    goal: str,
    runtime: str,
    folder: Path,
    tiny_model_dir: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [
        "--model",
        str(tiny_model_dir("llama")),
        "--data",
        "items.jsonl",
        "--goal",
        goal,
        "--for",
        runtime,
    ]
    code = run_command_line(["init", "mine.yaml", *words])
    shown = capsys.readouterr()
    if code == 2 and "pip install" in shown.err:
        pytest.skip(shown.err)
    assert code == 0, shown.err
    recipe = load_recipe("mine.yaml")
    assert (recipe.name, bool(recipe.sparsify)) == ("mine", goal != "quality")
    assert bool(recipe.export) == (runtime != "transformers")
    assert recipe.data is not None
    assert recipe.data.sequence_length % 32 == 0
    text = Path("mine.yaml").read_text()
    assert f"# Goal: {goal}" in text
    assert "held out for the test" in text
    assert plan_recipe(recipe).stages  # which the command did too, before it wrote
    assert sorted(path.name for path in folder.iterdir()) == ["items.jsonl", "mine.yaml", "runs"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --model"),
        (["--model", "m"], "give --data"),
        (["--model", "./none", "--data", "items.jsonl"], "none does not exist"),
        (["--model", "MODEL", "--data", "none.jsonl"], "there is no file none.jsonl"),
        (
            ["--model", "MODEL", "--data", "items.jsonl", "--goal", "tiny"],
            "choose from smallest, cpu, quality",
        ),
        (["--model", "MODEL", "--data", "items.jsonl", "--for", "ollama"], "from transformers"),
    ],
)
def test_nothing_is_written_where_it_cannot_work(
    words: list[str],
    message: str,
    folder: Path,
    tiny_model_dir: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(tiny_model_dir("llama")) if word == "MODEL" else word for word in words]
    assert run_command_line(["init", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(folder.glob("*.yaml"))


def test_a_file_that_is_there_stays(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yaml").write_text("mine")
    assert run_command_line(["init"]) == 2
    assert "recipe.yaml is there already" in capsys.readouterr().err
    assert Path("recipe.yaml").read_text() == "mine"
