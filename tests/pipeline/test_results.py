"""What a run may do to what lies where its results go: nothing, unless it is its own and unchanged."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sqft.artifacts import digest_files
from sqft.errors import WorkspaceError
from sqft.pipeline import RunResult, load_recipe, parse_recipe, results, run_recipe

Run = Callable[..., RunResult]


@pytest.fixture
def values(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> dict[str, Any]:
    return {
        "model": str(tiny_model_dir("llama")),
        "sparsify": {"method": "magnitude"},
        "runtime": {"workspace": str(tmp_path / "runs"), "device": "cpu"},
    }


@pytest.fixture
def run(values: dict[str, Any], tmp_path: Path) -> Run:
    """`run(name="small.yaml", **sections)`: run a recipe file of this name with these sections changed."""

    def run(name: str = "small.yaml", **sections: Any) -> RunResult:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump({**values, **sections}))
        return run_recipe(load_recipe(path))

    return run


def model_of(result: RunResult) -> Path:
    assert result.model_dir is not None
    return result.model_dir


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """Inode and modification time of everything below a directory."""
    paths = [directory, *directory.rglob("*")]
    return {str(path): (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in paths}


def test_a_users_model_where_the_results_would_go_is_not_touched(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(values["model"], "llama/model")
    Path("llama/model/notes.txt").write_text("years of work")
    before = digest_files(Path("llama"))
    recipe = {"model": "llama/model", "sparsify": {"method": "magnitude"}, "runtime": {"workspace": "."}}
    Path("llama.yaml").write_text(yaml.safe_dump(recipe))
    for _ in range(2):
        result = run_recipe(load_recipe("llama.yaml"))
        assert model_of(result) == Path("llama-2/model")
        assert digest_files(Path("llama")) == before
    assert not Path("llama-3").exists()


def test_a_run_that_changes_nothing_writes_nothing(run: Run) -> None:
    first = run()
    before = snapshot(model_of(first))
    assert model_of(run()) == model_of(first)
    assert snapshot(model_of(first)) == before


def test_an_edited_recipe_replaces_its_own_results(run: Run) -> None:
    first = run()
    old = digest_files(model_of(first))
    second = run(sparsify={"method": "magnitude", "sparsity": 0.7})
    assert model_of(second) == model_of(first)
    assert digest_files(model_of(second))["model.safetensors"] != old["model.safetensors"]
    assert sorted(path.name for path in model_of(second).parent.iterdir()) == [
        ".sqft.json", "model", "report.html", "report.json",
    ]  # fmt: skip


def test_another_recipe_of_the_same_name_gets_a_number(run: Run) -> None:
    first, second = run(), run("other/small.yaml", sparsify={"method": "magnitude", "sparsity": 0.7})
    assert model_of(first).parent.name == "small"
    assert model_of(second).parent.name == "small-2"
    assert model_of(run()).parent.name == "small"
    assert model_of(run("other/small.yaml")).parent.name == "small-2"


def test_recipes_without_a_file_are_told_apart_by_what_they_do(values: dict[str, Any]) -> None:
    names = []
    for sparsity in (0.5, 0.7, 0.5):
        values["sparsify"]["sparsity"] = sparsity
        names.append(model_of(run_recipe(parse_recipe(values))).parent.name)
    assert names == ["recipe", "recipe-2", "recipe"]


@pytest.mark.parametrize(
    "change",
    [
        lambda model: (model / "config.json").write_text((model / "config.json").read_text() + " "),
        lambda model: (model / "notes.txt").write_text("x"),
        lambda model: (model / "tokenizer.json").unlink(),
        lambda model: (shutil.move(model, model.with_name("moved")), model.symlink_to("moved")),
    ],
    ids=["edited", "added", "removed", "symlink"],
)
def test_a_published_model_that_was_changed_stays(
    change: Callable[[Path], Any], run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of(run())
    change(model)
    before = snapshot(model)
    for sparsity in (0.5, 0.7):
        result = run(sparsify={"method": "magnitude", "sparsity": sparsity})
        assert model_of(result) == model.with_name("model-2")
        assert snapshot(model) == before
    assert [message for message in caplog.messages if "and stays; see" in message]
    assert not model.with_name("model-3").exists()


def test_what_a_user_keeps_beside_the_results_stays(run: Run) -> None:
    folder = model_of(run()).parent
    for name in ("model.partial", "notes"):
        (folder / name).mkdir()
        (folder / name / "thesis").write_text("years of work")
    (folder / "report.html").write_text("my own words")
    before = {name: snapshot(folder / name) for name in ("model.partial", "notes", "report.html")}
    result = run(sparsify={"method": "magnitude", "sparsity": 0.7})
    assert {name: snapshot(folder / name) for name in before} == before
    assert result.report_html == folder / "report-2.html"
    assert not (folder / "model.partial-2").exists()


def test_a_flipped_bit_in_a_reused_stage_is_not_published_nor_built_upon(run: Run) -> None:
    first = run()
    flip_with_kept_times(first.stages[0].directory / "model.safetensors")
    with pytest.raises(WorkspaceError, match=r"sparsify-.* is damaged .model\.safetensors in it changed"):
        run()
    with pytest.raises(WorkspaceError, match=r"sparsify-.* is damaged .*model\.safetensors in it changed"):
        run(quantize={"method": "rtn", "group_size": 32})


def flip_with_kept_times(path: Path) -> None:
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


class Killed(BaseException):
    """Stands for a kill: nothing in the library catches it."""


@pytest.mark.parametrize("operation", range(0, 48, 3))
def test_a_kill_while_results_are_replaced_leaves_the_old_or_the_new_ones(
    operation: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run()
    old = digest_files(model_of(first))
    count = 0

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count > operation:
                raise Killed
            return function(*arguments, **options)

        return call

    new = {"method": "magnitude", "sparsity": 0.7}
    killed = False
    with monkeypatch.context() as patch:
        write = results.write_results

        def killable(*arguments: Any, **options: Any) -> Any:
            for name in ("rename", "replace", "unlink", "rmdir", "link", "mkdir", "fsync"):
                patch.setattr(os, name, before(getattr(os, name)))
            return write(*arguments, **options)

        patch.setattr("sqft.pipeline.run.write_results", killable)
        try:
            run(sparsify=new)
        except Killed:
            killed = True
    found = digest_files(model_of(first))
    finished = digest_files(model_of(run(sparsify=new)))
    assert found in (old, finished)
    assert killed or found == finished
    names = sorted(
        path.name for path in model_of(first).parent.iterdir() if path.is_file() or any(path.iterdir())
    )
    assert names == [".sqft.json", "model", "report.html", "report.json"]
