"""Recipes: every error at once, with its path; overrides; rules between sections."""

from pathlib import Path

import pytest

from sqft.errors import RecipeError
from sqft.pipeline.recipe_file import load_recipe, parse_recipe, recipe_schema

DATA = {"train": "items.jsonl"}


def test_only_the_model_is_required() -> None:
    recipe = parse_recipe({"model": "some/model"})
    assert recipe.model.source == "some/model"
    assert recipe.final_stage == "model"


def test_a_pattern_needs_no_quotes(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\ncalibration: {source: a.txt}\nsparsify: {pattern: 2:4}\nseed: 12\n")
    recipe = load_recipe(path)
    assert recipe.sparsify is not None
    assert recipe.sparsify.pattern == "2:4"
    assert recipe.seed == 12
    changed = load_recipe(path, ["sparsify.pattern=4:8"]).sparsify
    assert changed is not None
    assert changed.pattern == "4:8"


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({}, "16:32 window 2"),
        ({"sparsity": 0.625}, "12:32 window 3-3-2"),
        ({"sparsity": 0.75}, "4:16"),
        ({"pattern": "16:32  window 3"}, "16:32 window 3"),
    ],
)
def test_the_target_cpu_chooses_a_pattern(settings: dict[str, object], pattern: str) -> None:
    recipe = parse_recipe({"model": "m", "data": DATA, "sparsify": {"target": "cpu", **settings}})
    assert recipe.pattern == pattern
    written = recipe.model_dump(mode="json", exclude_none=True)
    assert parse_recipe(written) == recipe


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sparsity": 0.6}, "for sparsity 0.5, 0.625, 0.75, not for 0.6"),
        ({"sparsity": "much"}, "not for much"),
        ({"pattern": "1:4"}, "no fast kernel for pattern 1:4, but for 2:4"),
        ({"budget": "owl"}, "leave budget at uniform"),
    ],
)
def test_a_target_that_cannot_be_met_is_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_recipe({"model": "m", "data": DATA, "sparsify": {"target": "cpu", **settings}})


def test_every_error_is_reported_with_its_path() -> None:
    values = {
        "model": "m",
        "sparsify": {"sparsty": 0.5, "sparsity": 1.5},
        "quantize": {"bits": 5},
        "colour": 1,
    }
    with pytest.raises(RecipeError) as error:
        parse_recipe(values)
    message = str(error.value)
    assert "sparsify.sparsty: unknown key" in message
    assert "sparsify.sparsity" in message
    assert "1.5" in message
    assert "quantize.bits" in message
    assert "colour: unknown key" in message


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"adapters": {"method": "sparse_peft"}}, "adapters: needs a data section"),
        (
            {"data": DATA, "quantize": {}, "adapters": {"method": "sparse_peft"}},
            "remove the quantize section",
        ),
        ({"train": {}}, "train: needs an adapters section"),
        ({"sparsify": {}}, "calibration.source"),
        ({"data": DATA, "evaluate": {"models": ["merged"]}}, "makes no merged"),
        ({"export": {"formats": ["gguf"]}}, "export: needs a section"),
        ({"sparsify": {}, "export": {"formats": ["banana"]}}, "export.formats.0"),
        ({"data": DATA, "sparsify": {}, "quantize": {"method": "joint"}}, "remove the sparsify section"),
        ({"data": DATA, "reconstruct": {}}, "reconstruct: needs a sparsify or quantize section"),
        ({"sparsify": {"method": "magnitude"}, "reconstruct": {}}, "calibration.source"),
        (
            {"data": DATA, "sparsify": {}, "reconstruct": {"train_scales": True}},
            "reconstruct.train_scales: needs a quantize section",
        ),
        (
            {"data": DATA, "sparsify": {}, "reconstruct": {"train_weights": False, "train_norms": False}},
            "reconstruct.train_scales: needs a quantize section; fit weights or norms",
        ),
        (
            {"data": DATA, "sparsify": {}, "reconstruct": {}, "calibration": {"num_samples": 7}},
            "set calibration.num_samples to 8 or more",
        ),
        ({"name": "stages"}, "folder of the workspace's own"),
        (
            {
                "data": DATA,
                "adapters": {
                    "method": "sparse_peft",
                    "dropout": 0.1,
                    "dropout_kind": "token",
                    "gradient": "lowrank",
                },
                "sparsify": {},
            },
            "dropout_kind token goes with gradient exact",
        ),
    ],
)
def test_rules_between_sections(values: dict[str, object], part: str) -> None:
    with pytest.raises(RecipeError, match=part):
        parse_recipe({"model": "m", **values})


def test_models_that_a_recipe_reports() -> None:
    sections = {"data": DATA, "sparsify": {}, "evaluate": {}}
    lora = parse_recipe({"model": "m", **sections, "adapters": {"method": "lora"}})
    assert lora.reported_models() == ["base", "sparse", "adapted"]
    merged = parse_recipe({"model": "m", **sections, "adapters": {"method": "sparse_peft"}})
    assert merged.reported_models() == ["base", "sparse", "merged"]


def test_overrides_are_yaml_and_create_sections(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: m\n")
    recipe = load_recipe(path, ["sparsify.sparsity=0.25", "sparsify.method=magnitude", "model.revision=v1"])
    assert recipe.sparsify is not None
    assert recipe.sparsify.sparsity == 0.25
    assert recipe.model.revision == "v1"
    assert recipe.name == "mine"


@pytest.mark.parametrize("override", ["sparsify", "=1", "seed.x=1", "a..b=1"])
def test_malformed_overrides(tmp_path: Path, override: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: m\nseed: 1\n")
    with pytest.raises(RecipeError):
        load_recipe(path, [override])


@pytest.mark.parametrize("text", ["", "- a\n", "model: [unclosed\n", "\x00"])
def test_text_that_is_no_recipe(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError):
        load_recipe(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_schema_names_every_section() -> None:
    assert {"model", "sparsify", "quantize", "adapters", "train"} <= set(recipe_schema()["properties"])


def test_ranks_are_sorted_and_unique() -> None:
    recipe = parse_recipe(
        {"model": "m", "data": DATA, "adapters": {"method": "lora", "ranks": [4, 16, 8, 8]}}
    )
    assert recipe.adapters is not None
    assert recipe.adapters.ranks == [16, 8, 4]


@pytest.mark.parametrize(
    ("sparsify", "calibrates"),
    [
        ({"method": "magnitude"}, False),
        ({"method": "wanda"}, True),
        ({"method": "magnitude", "refit": 2}, True),
        ({"method": "magnitude", "swaps": 2}, True),
        ({"method": "magnitude", "budget": "owl"}, True),
    ],
)
def test_refinements_and_budgets_ask_for_calibration_too(
    sparsify: dict[str, object], calibrates: bool
) -> None:
    recipe = parse_recipe({"model": "m", "data": DATA, "sparsify": sparsify, "quantize": {"method": "rtn"}})
    assert recipe.needs_calibration is calibrates


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.answer={expression}", "{expression}"),
        ("data.prompt=Question: {question} Answer: ", "Question: {question} Answer: "),
        ("data.prompt='{a}: [b'", "{a}: [b"),
        ("data.answer=[x", "[x"),
        ("data.prompt=12", "12"),
        ("data.answer=null", None),
    ],
)
def test_an_override_of_a_text_is_the_text(tmp_path: Path, override: str, expected: str | None) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: m\ndata: {train: items.jsonl}\n")
    data = load_recipe(path, [override]).data
    assert data is not None
    assert getattr(data, override.split("=")[0].removeprefix("data.")) == expected


def test_other_overrides_are_yaml(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: m\ndata: {train: items.jsonl}\n")
    overrides = ["data.train=[a.jsonl, b.jsonl]", "adapters.ranks=[8, 4]", "quantize.symmetric=off",
                 "model.source=7b", "data.test={hub: a/b}"]  # fmt: skip
    recipe = load_recipe(path, overrides)
    assert recipe.data is not None
    assert recipe.data.train == ["a.jsonl", "b.jsonl"]
    assert recipe.adapters is not None
    assert recipe.adapters.ranks == [8, 4]
    assert recipe.quantize is not None
    assert recipe.quantize.symmetric is False
    assert recipe.model.source == "7b"
    with pytest.raises(RecipeError, match="is not valid YAML"):
        load_recipe(path, ["adapters.ranks=[8, 4"])


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("sparsity.sparsity", "sparsity: unknown key (did you mean sparsify?)"),
        ("train.lr", "(did you mean learning_rate?)"),
        ("adapters.r", "(did you mean ranks?)"),
        ("adapters.lora_alpha", "(did you mean alpha?)"),
        ("sparsify.bits", "(did you mean quantize.bits?)"),
        ("quantize.groupsize", "(did you mean group_size?)"),
        ("train.zzz", "train.zzz: unknown key"),
    ],
)
def test_an_unknown_key_comes_with_the_nearest(tmp_path: Path, key: str, meant: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: m\ndata: {train: items.jsonl}\n")
    with pytest.raises(RecipeError) as error:
        load_recipe(path, [f"{key}=1"])
    assert meant in str(error.value)


def test_a_search_needs_something_to_choose_from() -> None:
    values = {"model": "m", "data": DATA, "adapters": {"method": "lora"}, "search": {"method": "hill_climb"}}
    with pytest.raises(RecipeError, match="one rank to choose from"):
        parse_recipe(values)
