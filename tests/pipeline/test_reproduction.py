"""The paper's recipes: they expand, plan, train on the true shapes, and show what was published."""

from pathlib import Path

import pytest

from sqft.cli import run_command_line
from sqft.errors import RecipeError
from sqft.pipeline.reproduction import (
    Scale,
    experiment_names,
    load_experiment,
    recipes_folder,
    reproduction_rows,
)

FULL = ["ablation", "commonsense", "cost", "gsm8k", "hill-climbing", "math", "rank-distribution"]


def test_every_experiment_expands() -> None:
    assert experiment_names("full") == [*FULL, "sparsity-levels"]
    assert experiment_names("small") == ["math", "mawps", "science"]
    scales: tuple[Scale, ...] = ("full", "small")
    for scale in scales:
        for name in experiment_names(scale):
            sweep = load_experiment(name, scale, Path("data"))
            assert len(sweep.cells) > 1
            for cell in sweep.cells:
                data = cell.recipe.data
                assert data is not None
                assert str(data.train).startswith("data/")
                tasks = cell.recipe.evaluate and cell.recipe.evaluate.tasks
                assert not tasks or cell.recipe.evaluate.tasks_data == "data"  # type: ignore[union-attr]


def test_overrides_are_read_as_everywhere() -> None:
    """A prompt has braces and is a text, a rate with an exponent is a number."""
    overrides = ["data.prompt={question}: ", "train.learning_rate=1e-4"]
    for cell in load_experiment("ablation", "full", Path("data"), overrides).cells:
        recipe = cell.recipe
        assert recipe.data is not None
        assert recipe.data.prompt == "{question}: "
        assert recipe.train is not None
        assert recipe.train.learning_rate == 1e-4
    with pytest.raises(RecipeError, match="'data' is not an override"):
        load_experiment("ablation", "full", Path("data"), ["data"])


def test_budgets_are_as_published() -> None:
    """Quantization-aware runs have an epoch more, with a row of equal budget beside them."""
    cells = {cell.name: cell.recipe for cell in load_experiment("gsm8k", "full", Path("data")).cells}
    epochs = {name: recipe.train.epochs for name, recipe in cells.items() if recipe.train}
    assert epochs["llama-3-8b-qa-sparse-peft"] == 4
    assert epochs["llama-3-8b-qa-sparse-peft-equal-budget"] == 3
    assert {epochs[f"mistral-7b-{name}"] for name in ("lora", "shears", "sqft", "sparse-peft")} == {3}


def test_published_figures_name_cells_that_exist() -> None:
    import yaml

    published = yaml.safe_load((recipes_folder() / "paper/published.yaml").read_text())
    for name, figures in published.items():
        rows = reproduction_rows(name, load_experiment(name, "full", Path("data")), Path("none"))
        known = {f"{row.cell}:{row.model}" for row in rows} | {row.cell for row in rows}
        assert set(figures) <= known
        assert sum(row.published is not None for row in rows) == len(figures)
        assert all(row.source for row in rows if row.published is not None)
        assert all(row.ours is None for row in rows)


def test_unknown_names_and_the_table_of_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match=r"no experiment gsm9k at scale full; there are ablation.*mawps"):
        load_experiment("gsm9k", "full", Path("data"))
    monkeypatch.chdir(tmp_path)
    assert run_command_line(["reproduce", "gsm8k", "--table"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("| cell | model | ours | published (accuracy, %) | source |\n")
    assert "| mistral-7b-sparse-peft | merged | not run | 50.1 | survey 2501.16372" in shown
    assert "| llama-3-8b-sqft | adapted | not run | not found | - |" in shown
    assert run_command_line(["reproduce", "gsm8k", "--scale", "huge"]) == 2
