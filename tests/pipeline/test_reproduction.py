"""The paper's recipes: they expand, plan, train on the true shapes, and show what was published."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sqft.cli import run_command_line
from sqft.errors import RecipeError
from sqft.pipeline import run_recipe
from sqft.pipeline.reproduction import (
    Scale,
    experiment_names,
    load_experiment,
    recipes_folder,
    reproduction_rows,
)
from sqft.pipeline.sweep import choose_cells

FULL = ["ablation", "commonsense", "cost", "gsm8k", "hill-climbing", "math", "rank-distribution"]
# The true shapes (config.json of the hub), cut to two blocks and a vocabulary of 1,000.
CUT = {"vocab_size": 1000, "num_hidden_layers": 2, "max_position_embeddings": 128}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
              "num_key_value_heads": 8},
    "mistral": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
                "num_key_value_heads": 8},
    "phi3": {"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 32,
             "num_key_value_heads": 32},
}  # fmt: skip


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
    assert "| mistral-7b-sparse-peft | merged | 50.1 | survey 2501.16372" in shown
    assert "not found" in shown
    assert run_command_line(["reproduce", "gsm8k", "--scale", "huge"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "cell", "arch"),
    [
        *[("gsm8k", f"llama-3-8b-{p}", "llama") for p in ("shears", "sqft", "sparse-peft", "qa-sparse-peft")],
        ("math", "mistral-7b-qa-sparse-peft", "mistral"),
        *[("commonsense", p, "phi3") for p in ("sparse-peft", "qa-sparse-peft")],
    ],
)
def test_three_steps_on_the_true_shapes(
    experiment: str, cell: str, arch: str, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [
        {"question": f"what is {n}?", "instruction": f"what is {n}?", "answer": f"{n}"} for n in range(120)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name in ("gsm8k", "math", "commonsense"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(lines)
        (tmp_path / name / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
    overrides = [
        f"model={tiny_model_dir(arch, **CUT, **SHAPES[arch])}",
        "data.test_items=20", "data.search_items=8", "data.loss_on=answer",
        "calibration={source: train, num_samples: 2, sequence_length: 64}",
        "train.max_steps=3", "train.batch_size=1", "train.gradient_accumulation=1", "train.arguments={}",
        "evaluate=null", f"runtime={{workspace: {tmp_path / 'runs'}, device: cpu}}",
    ]  # fmt: skip
    sweep = load_experiment(experiment, "full", tmp_path)
    values = choose_cells(sweep, [cell]).cells[0].recipe.model_dump(mode="json", exclude_none=True)
    from sqft.pipeline import parse_recipe

    result = run_recipe(parse_recipe(values, overrides))
    assert result.data.training[-1][0] == 3
    assert result.data.passed in (None, True)
