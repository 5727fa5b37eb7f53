"""A training that goes on from an adapter that exists already, unmerged, on other items."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from sqft.adapters import attach_adapters
from sqft.adapters.start import open_start
from sqft.artifacts import Manifest, read_object
from sqft.certificate import check_provenance
from sqft.errors import AdapterError, RecipeError, SqftError
from sqft.models import load_model, load_trainable
from sqft.pipeline import RunResult, parse_recipe, plan_recipe, run_recipe
from sqft.sections import AdapterSection
from sqft.training import trainer as trainer_module
from tests.end_to_end.conftest import values_maker, write_task

METHODS = ["lora", "sparse_peft", "qa_sparse_peft", "scales"]
TENSORS = "adapter_model.safetensors"
First = Callable[[str], tuple[dict[str, Any], RunResult]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("going-on")


@pytest.fixture(scope="module")
def first(tiny_model_dir: Callable[..., Path], folder: Path) -> First:
    """`first(method)`: a recipe, and its run; elastic ranks, of which the search has taken the middle one."""
    make = values_maker(write_task(folder), folder / "runs")
    done: dict[str, tuple[dict[str, Any], RunResult]] = {}

    def run(method: str) -> tuple[dict[str, Any], RunResult]:
        if method not in done:
            values = make("qa_sparse_peft", tiny_model_dir("llama")) | {"name": method}
            values["sparsify"] = {"method": "magnitude", "sparsity": 0.5}
            values["quantize"] = {"method": "rtn", "group_size": 32}
            values["adapters"] |= {"method": method}
            values["train"] |= {"max_steps": 3}
            for section in ("evaluate", "search", "calibration"):
                del values[section]
            if method in ("lora", "sparse_peft"):
                del values["quantize"]
            if method == "scales":
                values |= {"adapters": {"method": method}, "train": {"max_steps": 3, "batch_size": 4}}
            done[method] = values, run_recipe(parse_recipe(values))
        return done[method]

    return run


def going_on(first: First, method: str, folder: Path, adapter: Path | None = None) -> dict[str, Any]:
    """The same recipe on other items, going on from what the first one left."""
    values, result = first(method)
    letters = folder / "letters.jsonl"
    letters.write_text("".join(json.dumps({"question": c, "answer": c}) + "\n" for c in "abcdefghijklmnop"))
    data = {"train": str(letters), "prompt": "again: {question}", "sequence_length": 64}
    train = values["train"] | {"adapter": str(adapter or result.adapter_dir)}
    adapters = values["adapters"] | (
        {"ranks": [8]} if method == "lora" else {}
    )  # a stock LoRA tells no others
    changes = {"name": f"{method}-again", "data": data, "adapters": adapters, "train": train}
    return values | changes


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("lora", marks=pytest.mark.slow),
        pytest.param("sparse_peft", marks=pytest.mark.slow),
        "qa_sparse_peft",
        pytest.param("scales", marks=pytest.mark.slow),
    ],
)
def test_it_goes_on_from_the_adapter_and_is_certified(method: str, first: First, folder: Path) -> None:
    values = going_on(first, method, folder)
    before = first(method)[1]
    planned = plan_recipe(parse_recipe(values))
    reused = {stage.name for stage in planned.stages if stage.reused}
    assert reused - {"items"} == {stage.name for stage in before.stages} & {"sparsify", "quantize"}
    result = run_recipe(parse_recipe(values))
    assert {stage.name for stage in result.stages if stage.reused} == reused
    assert before.adapter_dir is not None
    assert result.adapter_dir is not None
    assert result.base_dir == before.base_dir
    old, new = (load_file(run.adapter_dir / TENSORS) for run in (before, result))  # type: ignore[operator]
    assert {key: tensor.shape for key, tensor in old.items()} == {k: t.shape for k, t in new.items()}
    assert any(not torch.equal(old[key], new[key]) for key in old)
    trained = next(stage for stage in result.stages if stage.name == "train")
    assert set(trained.manifest.metrics["went_on_from"]) == {"adapter_config.json", TENSORS}
    if method != "lora":
        assert result.data.passed
        assert result.model_dir is not None
        assert result.base_dir is not None
        checks = check_provenance(result.model_dir, result.base_dir, result.adapter_dir)
        assert all(check.passed for check in checks), checks
        assert read_object(result.model_dir / "sqft.json")["lineage"]["trained"]


@pytest.mark.parametrize("method", METHODS)
def test_it_starts_with_the_very_same_weights(
    method: str, first: First, tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    values, result = first(method)
    assert result.base_dir is not None
    assert result.adapter_dir is not None
    section = AdapterSection.model_validate(values["adapters"] | ({"ranks": [8]} if method == "lora" else {}))
    model = load_trainable(result.base_dir, base_precision=section.loaded_as)
    adapted = attach_adapters(model, section, seed=7, start=open_start(result.adapter_dir))
    adapted.save_pretrained(tmp_path)
    assert sum(parameter.requires_grad for parameter in adapted.parameters()) > 0
    expected, found = load_file(result.adapter_dir / TENSORS), load_file(tmp_path / TENSORS)
    assert len(expected) == len(found)
    for key, tensor in expected.items():
        ours = key.replace(".lora_A.weight", ".sqft_A").replace(".lora_B.weight", ".sqft_B")
        assert torch.equal(found[ours], tensor), key


def test_elastic_ranks_go_on_elastic(first: First, folder: Path) -> None:
    train = next(stage for stage in first("qa_sparse_peft")[1].stages if stage.name == "train")
    values = going_on(first, "qa_sparse_peft", folder, train.directory / "adapter") | {"name": "elastic"}
    values["search"] = {"method": "hill_climb", "num_trials": 2}
    result = run_recipe(parse_recipe(values))
    assert result.data.passed
    ranks = next(stage for stage in result.stages if stage.name == "train").directory / "training.json"
    assert len({tuple(step["ranks"]) for step in json.loads(ranks.read_text())["steps"]}) > 1


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_bits(
    first: First, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = going_on(first, "scales", folder) | {"name": "killed"}
    values["train"] |= {"checkpoint_steps": 1, "seed": 5}
    original = trainer_module.StepCallback.on_step_begin

    def killed(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt
        original(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.StepCallback, "on_step_begin", killed)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(parse_recipe(values))
    resumed = run_recipe(parse_recipe(values))
    train = next(stage for stage in resumed.stages if stage.name == "train")
    assert [entry["step"] for entry in train.manifest.metrics["resumed"]] == [2]
    expected = (train.directory / "adapter" / TENSORS).read_bytes()
    shutil.rmtree(train.directory)
    again = run_recipe(parse_recipe(values))
    train = next(stage for stage in again.stages if stage.name == "train")
    assert Manifest.read(train.directory).metrics["resumed"] == []
    assert (train.directory / "adapter" / TENSORS).read_bytes() == expected


def broken(adapter: Path, folder: Path, what: str) -> Path:
    """A copy of an adapter with one thing wrong."""
    place = folder / what
    if what == "missing":
        return place
    shutil.copytree(adapter, place)
    config = json.loads((place / "adapter_config.json").read_text())
    if what == "no adapter":
        (place / "adapter_config.json").unlink()
    elif what == "no weights":
        (place / TENSORS).unlink()
    elif what == "torn":
        (place / TENSORS).write_bytes((place / TENSORS).read_bytes()[:100])
    elif what == "nan":
        tensors = load_file(place / TENSORS)
        save_file({key: tensor * torch.nan for key, tensor in tensors.items()}, place / TENSORS)
    elif what == "lacking":
        tensors = load_file(place / TENSORS)
        save_file(dict(list(tensors.items())[1:]), place / TENSORS)
    else:
        changes = {
            "type": {"peft_type": "IA3"},
            "pattern": {"rank_pattern": [3]},
            "settings": {"ranks": "no"},
        }
        (place / "adapter_config.json").write_text(json.dumps(config | changes[what]))
    return place


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("missing", "^train.adapter: .* is not a PEFT adapter: .*adapter_config.json cannot be read"),
        ("no adapter", "is not a PEFT adapter"),
        ("no weights", "adapter_model.safetensors cannot be read|is not a PEFT adapter"),
        ("torn", "adapter_model.safetensors cannot be read"),
        ("nan", "is not finite; train it again"),
        ("lacking", "is damaged: it has no sqft_A of rank 6"),
        ("type", "of the type IA3; SQFT and LORA can go on"),
        ("pattern", "adapter_config.json is damaged"),
        ("settings", "adapter_config.json is damaged"),
    ],
)
def test_what_is_no_whole_adapter_is_refused_by_the_plan(
    what: str, words: str, first: First, folder: Path
) -> None:
    adapter = first("qa_sparse_peft")[1].adapter_dir
    assert adapter is not None
    values = going_on(first, "qa_sparse_peft", folder, broken(adapter, folder, what))
    with pytest.raises(AdapterError, match=words) as caught:
        plan_recipe(parse_recipe(values))
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_the_recipe_is_refused_by_the_plan(
    first: First, folder: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    qa = going_on(first, "qa_sparse_peft", folder)
    others = {method: str(first(method)[1].adapter_dir) for method in METHODS}
    wide = str(tiny_model_dir("llama", intermediate_size=192))
    lora = get_peft_model(load_model(tiny_model_dir("llama")), LoraConfig(r=2, target_modules=["q_proj"]))
    lora.save_pretrained(folder / "stock")
    plain = going_on(first, "lora", folder, folder / "stock")
    hill_climb = {"method": "hill_climb", "num_trials": 2}
    cases: list[tuple[dict[str, Any], type[SqftError], str]] = [
        ({"adapters": qa["adapters"] | {"ranks": [8]}}, AdapterError, r"set adapters.ranks: \[8, 6, 4\]$"),
        ({"adapters": qa["adapters"] | {"alpha": 8}}, AdapterError, "set adapters.alpha: 16.0$"),
        ({"adapters": qa["adapters"] | {"train_norms": True}}, AdapterError, "adapters.train_norms: false"),
        ({"adapters": qa["adapters"] | {"target_modules": ["q_proj"]}}, AdapterError, "it has update on"),
        (
            {"train": {"adapter": others["scales"]}},
            AdapterError,
            'set adapters.method: "scales"$',
        ),
        ({"train": {"adapter": others["lora"]}}, AdapterError, 'set adapters.method: "lora", adapters.ranks'),
        ({"model": wide}, AdapterError, "is of another model: its adapter of"),
        ({"search": hill_climb}, AdapterError, "hill_climb has nothing to choose from"),
        (
            {"evaluate": {"models": ["dense_tuned"]}},
            RecipeError,
            "dense_tuned would be trained from the start",
        ),
        (plain, AdapterError, r"adapters.ranks: \[2\], adapters.alpha: 8.0$"),
    ]
    for changes, kind, words in cases:
        with pytest.raises(kind, match=words) as caught:
            plan_recipe(parse_recipe(qa | changes))
        assert "\n" not in str(caught.value)


def test_another_base_is_told_by_the_plan_and_by_the_run(first: First, folder: Path) -> None:
    values = going_on(first, "sparse_peft", folder)
    values["sparsify"] = {"method": "magnitude", "sparsity": 0.25}
    words = (
        "train.adapter: .* cannot go on here: this adapter belongs to another base .*name that one as model"
    )
    with pytest.raises(AdapterError, match="belongs to another base"):
        run_recipe(parse_recipe(values))
    with pytest.raises(AdapterError, match=words) as caught:  # the base is there now
        plan_recipe(parse_recipe(values))
    assert "\n" not in str(caught.value)
    base = first("sparse_peft")[1].base_dir
    named = {name: value for name, value in values.items() if name != "sparsify"} | {"model": str(base)}
    plan_recipe(parse_recipe(named))
