"""A recipe with a teacher: what it predicted is a stage of its own, and what is learnt of it shows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from sqft.artifacts import TEACHER
from sqft.errors import DataError, ModelError, RecipeError
from sqft.pipeline import parse_recipe, plan_recipe, run_recipe
from tests.end_to_end.conftest import values_maker, write_task

TEXT = "once upon a time there was a king who had three sons. " * 40


@pytest.fixture(scope="module")
def values(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Callable[..., Path]
) -> Callable[..., dict[str, Any]]:
    """`values(text_weight=2.0, ...)`: a recipe that trains scales, with a teacher of these settings."""
    folder = tmp_path_factory.mktemp("distillation")
    (folder / "texts.txt").write_text(TEXT)
    recipe_values = values_maker(write_task(folder), folder / "runs")

    def make(**distillation: Any) -> dict[str, Any]:
        made = recipe_values("qa_sparse_peft", tiny_model_dir("llama"))
        made["adapters"] = {"method": "scales"}
        made["train"] = {"max_steps": 4, "batch_size": 4, "checkpoint_steps": 2}
        texts = {"text": str(folder / "texts.txt"), "num_samples": 8, "sequence_length": 16, "top_k": 8}
        made["sparsify"], made["quantize"] = {"method": "magnitude"}, {"method": "rtn", "group_size": 32}
        del made["search"], made["evaluate"], made["calibration"]
        return made | {"distillation": texts | distillation}

    return make


def stage(result: Any, name: str) -> Any:
    return next(stage for stage in result.stages if stage.name == name)


def test_a_teacher_predicts_once_and_every_training_learns_from_it(values: Any) -> None:
    recipe = parse_recipe(values(item_weight=0.5))
    planned, result = plan_recipe(recipe), run_recipe(recipe)
    names = [finished.name for finished in result.stages]
    assert names == [stage.name for stage in planned.stages]
    assert names[:3] == ["items", "teacher", "sparsify"]  # what does not fit is refused before the long work
    teacher = stage(result, "teacher")
    tensors = load_file(teacher.directory / TEACHER)
    assert tensors["texts.tokens"].shape == (8, 16)
    assert tensors["texts.ids"].shape == (8 * 15, 8)
    assert len(tensors["items.starts"]) == 61
    assert teacher.manifest.metrics["tokens"] > 8 * 16
    steps = (stage(result, "train").directory / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["distillation_loss"] > 0 for line in steps)
    assert result.data.passed
    assert result.model_dir is not None
    facts = json.loads((result.model_dir / "sqft.json").read_text())
    assert facts["lineage"]["teacher"] == teacher.manifest.key
    assert facts["recipe"]["distillation"]["item_weight"] == 0.5

    other = run_recipe(parse_recipe(values(item_weight=0.1, text_weight=3.0)))
    assert stage(other, "teacher").reused
    assert not stage(other, "train").reused


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"text": None, "num_samples": 8}, "num_samples would be ignored: there is no distillation.text"),
        ({"text": "train"}, "for the items, set item_weight"),
        ({"teacher": "tuned"}, "tuned needs a tune section"),
        ({"sequence_length": 1}, "the first token is not predicted"),
        ({"text_weight": 0.0}, "text_weight: must be greater than 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], words: str, values: Any) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        parse_recipe(values(**settings))
    assert "\n" not in str(caught.value)


def test_what_is_measured_is_not_learnt_and_nothing_is_no_teacher(values: Any) -> None:
    made = values()
    same = made["distillation"]["text"]
    with pytest.raises(RecipeError, match="evaluate measures on the same text"):
        parse_recipe(made | {"evaluate": {"perplexity": same}})
    with pytest.raises(RecipeError, match="nothing would be learnt from the teacher"):
        parse_recipe(made | {"distillation": {"teacher": "dense"}})
    del made["adapters"], made["train"]
    with pytest.raises(RecipeError, match="distillation: needs an adapters section"):
        parse_recipe(made)


def test_teachers_and_texts_that_do_not_fit_are_refused(
    values: Any, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("too little")
    with pytest.raises(DataError, match=r"distillation text .*lower distillation.num_samples to 0"):
        run_recipe(parse_recipe(values(text=str(tmp_path / "short.txt"))))
    with pytest.raises(DataError, match=r"distillation\.text: .*nowhere\.txt"):
        run_recipe(parse_recipe(values(text=str(tmp_path / "nowhere.txt"))))
    stranger = tiny_model_dir("llama", seed=5)
    assert run_recipe(parse_recipe(values(teacher=str(stranger)))).data.passed
    changed = tmp_path / "stranger"
    changed.mkdir()
    for path in stranger.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((changed / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[50:52]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (changed / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="has another tokenizer"):
        run_recipe(parse_recipe(values(teacher=str(changed))))
