"""Tuning the dense model first: trained here, or taken as it exists already, then compressed or not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from sqft.artifacts import Manifest
from sqft.certificate import check_provenance
from sqft.errors import AdapterError, ModelError, RecipeError
from sqft.models import load_model, read_masks
from sqft.pipeline import parse_recipe, plan_recipe, run_recipe
from sqft.report.summary import summary_table
from tests.end_to_end.conftest import values_maker, write_task

TUNE = {"rank": 4, "max_steps": 6, "batch_size": 4, "learning_rate": 2e-2, "checkpoint_steps": 2}
TOKENS = torch.arange(4, 24).reshape(2, 10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One workspace for all tests here, which share what they tune."""
    return tmp_path_factory.mktemp("tune")


@pytest.fixture(scope="module")
def values(folder: Path, tiny_model_dir: Callable[..., Path]) -> Callable[..., dict[str, Any]]:
    """`values("tune", "sparsify", ...)`: a recipe of these sections, and of those that measure."""
    recipe_values = values_maker(write_task(folder), folder / "runs")

    def make(*sections: str, **changes: Any) -> dict[str, Any]:
        made = recipe_values("qa_sparse_peft", tiny_model_dir("llama")) | {"tune": TUNE}
        made["adapters"] = {"method": "scales"}
        made["train"] = {"max_steps": 4, "batch_size": 4, "checkpoint_steps": 2}
        del made["search"]
        kept = {"name", "model", "data", "calibration", "evaluate", "runtime", *sections}
        return {name: value for name, value in made.items() if name in kept} | changes

    return make


def stage(result: Any, name: str) -> Any:
    return next(stage for stage in result.stages if stage.name == name)


@pytest.fixture(scope="module")
def tuned(values: Any) -> Any:
    made = values("tune", name="tuned", export={"formats": ["safetensors"]})
    made["evaluate"] = made["evaluate"] | {"general_text": "package", "sequence_length": 128}
    return run_recipe(parse_recipe(made))


def test_tuned_alone_is_the_lora_merged_and_a_model_of_its_own(tuned: Any, values: Any) -> None:
    rows = {row.name: row.loss for row in tuned.data.models}
    assert list(rows) == ["base", "tuned"]
    assert rows["tuned"] is not None
    assert rows["base"] is not None
    assert rows["tuned"] < rows["base"] - 0.1
    assert len(tuned.data.training) == 6
    general = {row.name: row.general_loss for row in tuned.data.models}
    assert general["base"] != general["tuned"]
    assert any(note.startswith("general text, tuned against the dense model: +") for note in tuned.data.notes)
    assert summary_table(tuned.data)[0][4] == "general text (nats)"
    base = load_model(Path(values()["model"]))
    training = stage(tuned, "tune").directory / "training"
    adapted = PeftModel.from_pretrained(base, training / "adapter").merge_and_unload()
    merged = load_model(tuned.model_dir)
    for name, weight in adapted.named_parameters():
        assert torch.equal(weight.to(torch.bfloat16), merged.get_parameter(name).to(torch.bfloat16)), name
    assert not (tuned.model_dir / "training").exists()
    assert not (training / "checkpoints").exists()
    facts = json.loads((tuned.model_dir / "sqft.json").read_text())
    assert list(facts["lineage"]) == ["model", "tune"]
    assert facts["prompt"]["prompt"].startswith("question")


def test_compression_starts_from_the_tuned_model(values: Any) -> None:
    result = run_recipe(parse_recipe(values("tune", "sparsify", "quantize")))
    names = [finished.name for finished in result.stages]
    assert names[:4] == ["items", "tune", "sparsify", "quantize"]
    assert "train" not in names
    rows = {row.name: row for row in result.data.models}
    assert list(rows) == ["base", "tuned", "sparse", "quantized"]
    assert rows["tuned"].sparsity is not None
    assert rows["tuned"].sparsity < 0.01
    assert rows["quantized"].loss is not None
    assert rows["base"].loss is not None
    assert rows["quantized"].loss < rows["base"].loss
    tuned, sparse = (load_model(stage(result, name).directory) for name in ("tune", "sparsify"))
    masks = read_masks(stage(result, "sparsify").directory)
    for name, mask in masks.items():
        weight = sparse.get_submodule(name).weight
        assert torch.equal(weight, torch.where(mask, tuned.get_submodule(name).weight, 0.0)), name
    assert (
        Manifest.read(stage(result, "quantize").directory).inputs["tune"]
        == stage(result, "tune").manifest.key
    )
    assert all(
        finished.reused
        for finished in run_recipe(parse_recipe(values("tune", "sparsify", "quantize"))).stages
    )


def test_tune_compress_recover_is_certified_with_its_whole_chain(values: Any) -> None:
    sections = ("tune", "sparsify", "quantize", "adapters", "train")
    planned = plan_recipe(parse_recipe(values(*sections)))
    assert {module.tuned_rank for module in planned.modules} == {0, 4}
    result = run_recipe(parse_recipe(values(*sections)))
    assert [stage.name for stage in planned.stages] == [finished.name for finished in result.stages]
    assert all(stage.disk_bytes > 0 for stage in planned.stages if stage.name == "tune")
    assert result.data.passed
    assert result.model_dir is not None
    assert result.base_dir is not None
    assert result.adapter_dir is not None
    assert [row.name for row in result.data.models] == ["base", "tuned", "sparse", "quantized", "merged"]
    facts = json.loads((result.model_dir / "sqft.json").read_text())
    assert list(facts["lineage"]) == ["model", "tune", "sparsify", "quantize", "train"]
    assert facts["recipe"]["tune"]["rank"] == 4
    checks = check_provenance(result.model_dir, result.base_dir, result.adapter_dir)
    assert all(check.passed for check in checks), checks
    facts["recipe"]["tune"]["rank"] = 8
    (result.model_dir / "sqft.json").write_text(json.dumps(facts))
    checks = check_provenance(result.model_dir, result.base_dir, result.adapter_dir)
    assert any("tune is not what the base was made with" in check.detail for check in checks)


def test_an_adapter_or_a_model_that_exists_gives_the_same(tuned: Any, values: Any, folder: Path) -> None:
    adapter = shutil.copytree(stage(tuned, "tune").directory / "training" / "adapter", folder / "mine")
    for name, existing in (("adapter", adapter), ("model", tuned.model_dir)):
        made = values("tune", tune={name: str(existing)}, name=f"from-{name}")
        del made["data"], made["evaluate"]
        planned = plan_recipe(parse_recipe(made))
        result = run_recipe(parse_recipe(made))
        assert (
            [stage.name for stage in planned.stages]
            == [finished.name for finished in result.stages]
            == ["tune"]
        )
        assert result.model_dir is not None
        found, expected = load_model(result.model_dir), load_model(tuned.model_dir)
        with torch.no_grad():
            assert torch.equal(found(TOKENS).logits, expected(TOKENS).logits)


def test_a_tuning_that_was_killed_goes_on(values: Any, monkeypatch: pytest.MonkeyPatch, tuned: Any) -> None:
    expected = (stage(tuned, "tune").directory / "model.safetensors").read_bytes()
    made = values("tune", name="again")
    made["runtime"]["workspace"] += "-again"
    with monkeypatch.context() as patch:
        patch.setattr("sqft.foreign.merge_dense", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_recipe(parse_recipe(made))
    again = run_recipe(parse_recipe(made))
    steps = json.loads((stage(again, "tune").directory / "training" / "training.json").read_text())
    assert [entry["step"] for entry in steps["resumed"]] == [6]
    assert (stage(again, "tune").directory / "model.safetensors").read_bytes() == expected


@pytest.mark.parametrize(
    ("tune", "words"),
    [
        ({"rank": 0}, "tune.rank: must be greater than 0"),
        ({"adapter": "a", "model": "b"}, "leave one of them out"),
        ({"adapter": "a", "rank": 8}, "rank would be ignored: tune.adapter is trained already"),
        ({"scale_learning_rate": 1e-3}, "tune.scale_learning_rate: unknown key"),
        (TUNE | {"ranks": [4]}, "did you mean rank"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tune: dict[str, Any], words: str, values: Any) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        parse_recipe(values(tune=tune))
    assert "\n" not in str(caught.value)


def test_what_cannot_be_tuned_is_refused(
    values: Any, tuned: Any, tiny_model_dir: Callable[..., Path], folder: Path
) -> None:
    adapter = stage(tuned, "tune").directory / "training" / "adapter"
    wide = str(tiny_model_dir("llama", intermediate_size=192))
    run = parse_recipe(values("tune", "sparsify", "quantize", name="base"))
    quantized = str(run_recipe(run).model_dir)
    sparse = str(folder / "sparse")
    shutil.copytree(next((folder / "runs" / "stages").glob("sparsify-*")), sparse)
    (folder / "nothing").mkdir()
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"model": wide, "tune": {"adapter": str(adapter)}}, AdapterError, "of another model"),
        ({"tune": {"adapter": str(folder / "nothing")}}, AdapterError, "is not a PEFT adapter"),
        ({"tune": {"model": wide}}, ModelError, "has other layers than"),
        ({"tune": {"model": quantized}}, ModelError, "is quantized; tune.model is a dense model"),
        ({"tune": TUNE | {"rank": 65}}, AdapterError, "tune.rank: 65 is more than"),
        ({"model": quantized}, ModelError, "is quantized, and tune merges into 16 bits"),
        ({"model": sparse}, AdapterError, "are sparse, and tune would fill their zeros"),
    ]
    for changes, kind, words in cases:
        with pytest.raises(kind, match=words) as caught:
            run_recipe(parse_recipe(values("tune", name="bad") | changes))
        assert "\n" not in str(caught.value)
