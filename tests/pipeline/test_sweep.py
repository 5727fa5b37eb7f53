"""Recipes with lists: which runs they stand for, how these are called, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from sqft.errors import RecipeError
from sqft.pipeline.recipe_file import load_recipe, parse_recipe
from sqft.pipeline.sweep import expand_sweep, load_sweep


@pytest.fixture
def values() -> dict[str, Any]:
    return {
        "name": "grid",
        "model": "m",
        "data": {"train": "items.jsonl"},
        "sparsify": {"sparsity": 0.5},
        "adapters": {"method": "sparse_peft", "ranks": [16]},
    }


def names(values: dict[str, Any]) -> list[str]:
    return [cell.name for cell in expand_sweep(values).cells]


def test_without_a_list_there_is_one_run(values: dict[str, Any]) -> None:
    (cell,) = expand_sweep(values).cells
    assert cell.name == "run"
    assert cell.recipe.name == "grid/run"
    assert cell.choices == {}


def test_lists_are_crossed(values: dict[str, Any]) -> None:
    values["sparsify"]["sparsity"] = [0.3, 0.7]
    values["seed"] = [0, 1]
    sweep = expand_sweep(values)
    assert [cell.name for cell in sweep.cells] == [
        "sparsity0.3-seed0",
        "sparsity0.3-seed1",
        "sparsity0.7-seed0",
        "sparsity0.7-seed1",
    ]
    last = sweep.cells[-1]
    assert last.recipe.sparsify is not None
    assert (last.recipe.sparsify.sparsity, last.recipe.seed) == (0.7, 1)
    assert last.choices == {"sparsify.sparsity": "sparsity0.7", "seed": "seed1"}
    assert last.recipe.name == "grid/sparsity0.7-seed1"


def test_large_and_small_numbers_are_told_apart(values: dict[str, Any]) -> None:
    values["adapters"]["alpha"] = [1e-30, 1e30]
    assert names(values) == ["alpha1e-30", "alpha1e30"]


def test_a_list_that_is_a_value_stays_one(values: dict[str, Any]) -> None:
    values["adapters"]["ranks"] = [32, 24, 16]
    assert names(values) == ["run"]
    values["adapters"]["ranks"] = [[16], [32, 24, 16]]
    assert names(values) == ["ranks16", "ranks32-24-16"]
    values["adapters"]["rank_groups"] = [["q_proj", "k_proj"]]
    values["adapters"]["target_modules"] = [["q_proj"], None]
    assert names(values) == [
        "ranks16-target_modulesq_proj",
        "ranks16-no-target_modules",
        "ranks32-24-16-target_modulesq_proj",
        "ranks32-24-16-no-target_modules",
    ]


def test_sections_and_models_may_vary(values: dict[str, Any]) -> None:
    values["model"] = ["one/model-a", "models/b.gguf"]
    values["sparsify"] = [None, {"sparsity": 0.6}]
    cells = expand_sweep(values).cells
    assert [cell.name for cell in cells] == [
        "model-a-no-sparsify",
        "model-a-sparsify1",
        "b.gguf-no-sparsify",
        "b.gguf-sparsify1",
    ]
    assert cells[0].recipe.sparsify is None
    assert cells[3].recipe.model.source == "models/b.gguf"


def test_settings_that_change_together(values: dict[str, Any]) -> None:
    values["sweep"] = {
        "axes": {
            "pipeline": {
                "shears": {"adapters.method": "lora"},
                "qa": {"adapters": {"method": "qa_sparse_peft"}, "quantize.bits": 4},
                "dense": {"sparsify": None, "adapters.method": "lora", "adapters.ranks": None},
            }
        }
    }
    cells = {cell.name: cell.recipe for cell in expand_sweep(values).cells}
    assert list(cells) == ["shears", "qa", "dense"]
    assert cells["qa"].quantize is not None
    assert cells["qa"].adapters is not None
    assert cells["qa"].adapters.ranks == [16]  # merged into the section, not put in its place
    assert cells["dense"].sparsify is None
    assert cells["dense"].adapters is not None
    assert "ranks" not in cells["dense"].adapters.model_fields_set
    assert cells["shears"].sparsify is not None


def test_products_choose_what_is_crossed(values: dict[str, Any]) -> None:
    values["sweep"] = {
        "axes": {"pipeline": {"shears": {"adapters.method": "lora"}, "sp": None}},
        "products": [
            {"pipeline": "all", "adapters.ranks": [[16], [32, 16]]},
            {"pipeline": "sp", "adapters.ranks": [32, 16], "sparsify.sparsity": [0.3, 0.5]},
        ],
    }
    cells = expand_sweep(values).cells
    assert [cell.name for cell in cells] == [
        "shears-ranks16",
        "shears-ranks32-16",
        "sp-ranks16",
        "sp-ranks32-16",
        "sp-sparsity0.3",
    ]
    assert [c.recipe.sparsify.sparsity for c in cells if c.recipe.sparsify] == [0.5, 0.5, 0.5, 0.5, 0.3]


def test_the_same_recipe_runs_once(values: dict[str, Any]) -> None:
    values["sweep"] = {
        "products": [{"seed": [0, 1]}, {"seed": [1, 2]}, {"sparsify.sparsity": 0.5, "seed": [0]}]
    }
    assert names(values) == ["seed0", "seed1", "seed2"]


def test_overrides_reach_lists(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: m\nsparsify: {method: magnitude}\n")
    sweep = load_sweep(path, ["sparsify.sparsity=[0.3, 0.5]"])
    assert [cell.recipe.name for cell in sweep.cells] == ["mine/sparsity0.3", "mine/sparsity0.5"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsify": {"sparsity": [0.5, 7]}}, r"cell sparsity7: sparsify\.sparsity"),
        ({"seed": []}, "takes one value, not a list"),
        ({"nonsense": [1, 2]}, "nonsense: unknown key"),
        ({"sweep": []}, None),
        ({"sweep": {"grid": {}}}, "axes and products"),
        ({"sweep": {"axes": {"a": [1]}}}, r"sweep\.axes\.a maps"),
        ({"sweep": {"axes": {"a": {"x": 3}}}}, r"sweep\.axes\.a\.x maps"),
        ({"sweep": {"products": [{"pipeline": "all"}]}}, "neither an axis nor a setting"),
        ({"sweep": {"axes": {"a": {"x": {}}}, "products": [{"a": "y"}]}}, "axis a has no y; it has x"),
        ({"sweep": {"axes": {"a": {"x": {"model.source.deep": 1}}}}}, "model.source is a value"),
        (
            {"quantize": {}, "sweep": {"products": [{"adapters.method": ["lora", "sparse_peft"]}]}},
            "cell sparse_peft: adapters.method: sparse_peft merges into 16 bits",
        ),
    ],
)
def test_refused(values: dict[str, Any], changes: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert names(values | changes) == ["run"]
        return
    with pytest.raises(RecipeError, match=message):
        expand_sweep(values | changes)


def test_ten_thousand_cells_are_asked_about(values: dict[str, Any]) -> None:
    values["seed"] = list(range(100))
    values["sparsify"]["sparsity"] = [n / 100 for n in range(100)]
    with pytest.raises(RecipeError, match=r"10,000 cells \(100 x 100\).*--yes"):
        expand_sweep(values)
    values["seed"] = [0, 1]
    assert len(expand_sweep(values, many=True).cells) == 200


def test_a_run_takes_no_list(values: dict[str, Any], tmp_path: Path) -> None:
    values["sparsify"]["sparsity"] = [0.3, 0.5]
    with pytest.raises(RecipeError, match=r"sparsify\.sparsity: takes one value, not a list.*sqft sweep"):
        parse_recipe(values)
    path = tmp_path / "sweep.yaml"
    path.write_text("model: m\nsweep: {}\n")
    with pytest.raises(RecipeError, match="stands for several runs; use sqft sweep"):
        load_recipe(path)
