"""What `sqft clean` removes, and what it leaves alone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from sqft.cli import run_command_line
from sqft.directories import new_directory
from sqft.errors import RecipeError, WorkspaceError
from sqft.pipeline.cleaning import Cleaning, find_removable, remove
from sqft.pipeline.locks import hold
from sqft.pipeline.runner import Workspace


@pytest.fixture
def root(tmp_path: Path, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace in which a recipe ran with two sparsities; what it has of the first, nothing uses."""
    monkeypatch.chdir(tmp_path)
    for sparsity in (0.5, 0.6):
        write_recipe(tiny_model_dir("llama"), sparsity)
        assert run_command_line(["run", "recipe.yaml"]) == 0
    return tmp_path / "runs"


def write_recipe(model: Path, sparsity: float, name: str = "recipe") -> Path:
    values = {
        "model": str(model),
        "sparsify": {"method": "magnitude", "sparsity": sparsity},
        "runtime": {"workspace": "runs", "device": "cpu"},
    }
    path = Path(f"{name}.yaml")
    path.write_text(yaml.safe_dump(values))
    return path


def names(found: Cleaning) -> list[str]:
    return sorted(item.directory.name.split("-")[0] for item in found.removable)


def test_what_nothing_uses_goes_and_all_else_stays(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path for path in root.rglob("*") if path.is_file()}
    begun = new_directory(root / "stages" / "train-0")
    (begun.__enter__() / "weights").write_bytes(b"0" * 5000)
    assert names(find_removable(root)) == ["sparsify"]  # somebody builds there
    begun.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    (root / "stages" / "mine").mkdir()
    (root / "stages" / "mine.partial").mkdir()
    (root / "models").mkdir()
    with new_directory(root / "models" / "old-bfloat16") as made:
        (made / "config.json").write_text("{}")
    found = find_removable(root)
    assert names(found) == ["old", "sparsify", "train"]
    assert {item.frees_bytes > 0 for item in found.removable} == {True}
    assert [path.name for path in found.kept] == ["mine", "mine.partial"]
    assert [path.name for path in found.recipes] == ["recipe.yaml"]

    assert run_command_line(["clean"]) == 0
    assert "3 directories" in capsys.readouterr().out
    assert names(find_removable(root)) == names(found)
    assert run_command_line(["clean", "--yes"]) == 0
    assert "removed 3 directories" in capsys.readouterr().out
    assert names(find_removable(root)) == []
    assert (root / "stages" / "mine.partial").is_dir()
    lost = {path.relative_to(root).parts[1].split("-")[0] for path in before if not path.exists()}
    assert lost == {"sparsify"}
    assert run_command_line(["run", "recipe.yaml"]) == 0


def test_what_a_user_added_or_edited_stays(root: Path) -> None:
    (old,) = (item.directory for item in find_removable(root).removable)
    (old / "notes.txt").write_text("mine")
    found = find_removable(root)
    assert not found.removable
    assert "notes.txt" in found.kept[old]
    (old / "notes.txt").unlink()
    found = find_removable(root)
    (old / "config.json").write_text("{}")
    assert remove(found, root) == []  # edited since it was found
    assert old.is_dir()


def test_recipes_that_are_given_or_lie_around(root: Path, tiny_model_dir: Callable[..., Path]) -> None:
    first = write_recipe(tiny_model_dir("llama"), 0.5, "first")
    assert names(find_removable(root)) == []  # another recipe below this folder uses the old stage
    assert names(find_removable(root, [Path("recipe.yaml")])) == ["sparsify"]
    assert names(find_removable(root, [first])) == []  # its own, and what the report came from
    first.write_text(first.read_text() + "sparsfy: {}\n")
    found = find_removable(root)
    assert names(found) == []  # what it wants, nobody knows
    assert "sparsfy" in found.unread[first.resolve()]
    with pytest.raises(RecipeError, match="sparsfy"):
        find_removable(root, [first])
    with pytest.raises(WorkspaceError, match="no workspace"):
        find_removable(root / "elsewhere")


def test_work_that_goes_on_stays(root: Path) -> None:
    workspace = Workspace(root)
    with hold(workspace.lock("another"), "another"):
        found = find_removable(root)
        assert remove(find_removable(root), root) == []
    assert names(found) == []
    assert "at work" in next(iter(found.kept.values()))
    assert names(find_removable(root)) == ["sparsify"]
    (current,) = {
        row["directory"] for row in json.loads((root / "recipe" / "report.json").read_text())["lineage"]
    }
    stage = root / "stages" / current
    begun = stage.with_name(stage.name + ".partial")
    stage.rename(begun)
    mark = json.loads((begun / ".sqft.json").read_text())
    assert mark["files"]
    assert names(find_removable(root)) == ["sparsify"]  # the run goes on with it
