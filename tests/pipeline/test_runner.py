"""Identities, reuse, locks and damage, on a recipe that only compresses by magnitude."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sqft.errors import AdapterError, DataError, RecipeError, TrainingError, WorkspaceError
from sqft.marks import Mark, write_mark
from sqft.pipeline import parse_recipe, plan_recipe, run_recipe, workspace_status
from sqft.pipeline.locks import StageBusyError, hold
from sqft.pipeline.runner import Workspace, stage_keys
from sqft.pipeline.stages import recipe_stages
from sqft.pipeline.team import Team, open_team


@pytest.fixture
def values(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> dict[str, Any]:
    return {
        "model": str(tiny_model_dir("llama")),
        "sparsify": {"method": "magnitude"},
        "quantize": {"method": "rtn", "group_size": 32},
        "runtime": {"workspace": str(tmp_path / "runs"), "device": "cpu"},
    }


def test_compression_alone_needs_no_data(values: dict[str, Any]) -> None:
    result = run_recipe(parse_recipe(values))
    assert result.model_dir is not None
    assert result.model_dir.name == "model"
    assert not list(result.model_dir.glob("manifest.json"))
    status = workspace_status(Path(values["runtime"]["workspace"]))
    assert [(row.name, row.finished) for row in status] == [("quantize", True), ("sparsify", True)]


def test_runtime_settings_do_not_enter_an_identity(values: dict[str, Any]) -> None:
    keys = stage_keys(parse_recipe(values), "model")
    values["runtime"]["threads"] = 2
    values["name"] = "other"
    assert stage_keys(parse_recipe(values), "model") == keys
    values["sparsify"]["sparsity"] = 0.6
    changed = stage_keys(parse_recipe(values), "model")
    assert changed["sparsify"] != keys["sparsify"]
    assert changed["quantize"] != keys["quantize"]
    assert stage_keys(parse_recipe(values), "another model")["sparsify"] != changed["sparsify"]


def test_data_enters_by_content(values: dict[str, Any], tmp_path: Path) -> None:
    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).write_text(text)
    recipes = [parse_recipe({**values, "data": {"train": str(tmp_path / name)}}) for name in "abc"]
    keys = [stage_keys(recipe, "model")["data"] for recipe in recipes]
    assert keys[0] == keys[1] != keys[2]
    with pytest.raises(DataError, match="there is no file"):
        stage_keys(parse_recipe({**values, "data": {"train": str(tmp_path / "none")}}), "model")


def test_files_of_a_task_are_part_of_its_evaluation_alone(values: dict[str, Any], tmp_path: Path) -> None:
    files = {
        "task.yaml": "task: mine\ninclude: shared/common.inc\ndoc_to_text: !function code.text\n",
        "shared/common.inc": f"dataset_path: json\ndataset_kwargs: {{data_files: {tmp_path}/items-*.jsonl}}\n"
        "process_results: !function score.points\n",
        "shared/score.py": "def points(doc, answers):\n    return {}\n",
        "code.py": "def text(doc):\n    return ''\n",
        "items-1.jsonl": "{}\n",
        "items-2.jsonl": "{}\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    values["evaluate"] = {"general_text": None, "tasks": [str(tmp_path / "task.yaml")]}
    values["model"] = {"source": values["model"], "trust_remote_code": True}
    recipe = parse_recipe(values)
    seen = stage_keys(recipe, "model")
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
        keys = stage_keys(recipe, "model")
        changed = {stage.name for stage in recipe_stages(recipe) if keys[stage.name] != seen[stage.name]}
        assert changed == {"evaluate-base", "evaluate-sparse", "evaluate-quantized"}, name
        seen = keys
    (tmp_path / "items-3.jsonl").write_text("{}")
    assert stage_keys(recipe, "model")["evaluate-base"] != seen["evaluate-base"]
    for path in tmp_path.glob("items-*"):
        path.unlink()
    with pytest.raises(DataError, match=r"evaluate\.tasks: .*task\.yaml: there is no file .*items"):
        stage_keys(recipe, "model")
    values["model"]["trust_remote_code"] = False
    with pytest.raises(DataError, match="names Python code"):
        stage_keys(parse_recipe(values), "model")


def test_an_unknown_task_is_refused_before_anything_runs(values: dict[str, Any]) -> None:
    values["evaluate"] = {"tasks": ["arc_eazy"]}
    with pytest.raises(DataError, match=r"evaluate\.tasks: lm-eval knows no task arc_eazy; .* arc_easy"):
        plan_recipe(parse_recipe(values))


def test_a_changed_stage_directory_is_noticed(values: dict[str, Any]) -> None:
    result = run_recipe(parse_recipe(values))
    weights = result.stages[0].directory / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(WorkspaceError, match=r"model\.safetensors in it changed"):
        run_recipe(parse_recipe(values))


def test_a_kill_before_the_manifest_has_its_name_does_not_stick(values: dict[str, Any]) -> None:
    whole = run_recipe(parse_recipe(values))
    stage = whole.stages[0].directory
    partial = stage.with_name(stage.name + ".partial")
    stage.rename(partial)
    (partial / "manifest.json").rename(partial / "manifest.json.tmp")
    write_mark(partial, Mark({"stage": whole.stages[0].manifest.key}))
    for _ in range(2):  # the first goes on from there, the second reuses what the first made
        stages = run_recipe(parse_recipe(values)).stages
        assert stages[0].manifest.files == whole.stages[0].manifest.files
    assert all(finished.reused for finished in stages)


def test_a_stage_is_made_by_one_process_at_a_time(values: dict[str, Any]) -> None:
    recipe = parse_recipe(values)
    stage = next(s for s in plan_recipe(recipe).stages if s.name == "sparsify")
    assert stage.directory is not None
    lock = Workspace(Path(values["runtime"]["workspace"])).lock(Path(stage.directory).name)
    with hold(lock, "a stage"), pytest.raises(StageBusyError, match="is being made by process"):
        run_recipe(recipe, wait=False)
    assert not Path(stage.directory).exists()
    assert not lock.exists()
    run_recipe(recipe, wait=False)


def test_launchers_of_several_processes_are_refused(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="started 2 processes, and only sqft run trains"):
        run_recipe(parse_recipe(values))
    with pytest.raises(RecipeError, match="cuda:1 is one GPU for 2 processes; write auto or cuda"):
        open_team("cuda:1")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match="sqft run shards no model"):
        open_team("cpu")


def test_a_batch_that_processes_cannot_share_is_refused_before_anything_runs(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    values |= {"data": {"train": str(tmp_path / "train.jsonl")}, "train": {"batch_size": 16}}
    values["adapters"] = {"method": "qa_sparse_peft", "ranks": [4]}
    with pytest.raises(TrainingError, match=r"train\.batch_size 16 .* cannot be shared by 3 processes"):
        run_recipe(parse_recipe(values), team=Team.__new__(Team))
    assert not (tmp_path / "runs").exists()


def test_workspace_that_cannot_be_written(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    values["runtime"]["workspace"] = str(tmp_path / "file")
    with pytest.raises(WorkspaceError, match="cannot write"):
        run_recipe(parse_recipe(values))


def keys_of(values: dict[str, Any], **changes: Any) -> dict[str, str]:
    merged = {**values, **{name: {**values.get(name, {}), **change} for name, change in changes.items()}}
    return stage_keys(parse_recipe(merged), "model")


def test_only_what_a_stage_obeys_enters_its_identity(values: dict[str, Any], tmp_path: Path) -> None:
    for name in ("train", "search", "test"):
        (tmp_path / name).write_text(name)
    values["data"] = {name: str(tmp_path / name) for name in ("train", "search", "test")}
    values["adapters"], values["train"] = {"method": "lora"}, {}
    keys = keys_of(values)
    assert keys_of(values, data={"test_items": 7}) == keys
    assert keys_of(values, calibration={"num_samples": 7}) == keys  # magnitude and rtn look at no text
    assert keys_of(values, train={"arguments": {"report_to": "tensorboard"}}) == keys
    assert keys_of(values, train={"arguments": {"weight_decay": 0.1}})["train"] != keys["train"]
    on_text = keys_of(values, data={"loss_on": "text"})
    assert on_text["quantize"] == keys["quantize"]
    assert on_text["train"] != keys["train"]


def test_evaluation_follows_the_content_of_its_text(values: dict[str, Any], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    values["evaluate"] = {"perplexity": str(text)}
    with pytest.raises(DataError, match=r"evaluate\.perplexity: there is no file"):
        keys_of(values)
    text.write_text("one")
    before = keys_of(values)
    text.write_text("two")
    assert keys_of(values)["evaluate-base"] != before["evaluate-base"]
    assert keys_of(values)["quantize"] == before["quantize"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_evaluation_follows_the_data_of_its_tasks(values: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    folder = tmp_path / "sets" / "svamp"
    folder.mkdir(parents=True)
    values["evaluate"] = {"tasks": ["svamp"], "tasks_data": str(tmp_path / "sets"), "models": ["base"]}
    with pytest.raises(DataError, match="data of task svamp are not here"):
        keys_of(values)
    record = {"question": "what is 3 plus 4?", "answer": 7}
    (folder / "test.jsonl").write_text(json.dumps(record))
    before = keys_of(values)
    (folder / "test.jsonl").write_text(json.dumps(record | {"answer": 8}))
    assert keys_of(values)["evaluate-base"] != before["evaluate-base"]
    assert keys_of(values)["quantize"] == before["quantize"]
    (row,) = run_recipe(parse_recipe(values)).data.models
    assert list(row.tasks) == ["svamp (acc)"]


def test_calibration_enters_by_content(values: dict[str, Any], tmp_path: Path) -> None:
    values["sparsify"] = {"method": "wanda"}
    keys = []
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("the same")
        keys.append(keys_of(values, calibration={"source": str(tmp_path / name)})["sparsify"])
    assert keys[0] == keys[1]


def test_results_can_be_edited_without_harm_to_the_stages(values: dict[str, Any]) -> None:
    result = run_recipe(parse_recipe(values))
    assert result.model_dir is not None
    config = result.model_dir / "config.json"
    config.write_text(config.read_text() + " ")
    again = run_recipe(parse_recipe(values))
    assert all(stage.reused for stage in again.stages)
    assert again.data.elapsed_seconds >= sum(again.data.stage_seconds.values())


def test_what_would_fail_late_is_refused_first(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "train").write_text("{}")
    values["data"] = {"train": str(tmp_path / "train")}
    values["quantize"]["skip_modules"] = ["down_proj"]
    values["adapters"] = {"method": "qa_sparse_peft", "target_modules": ["down_proj"]}
    with pytest.raises(AdapterError, match="needs a quantized base"):
        run_recipe(parse_recipe(values))
    values["adapters"] = {"method": "lora"}
    values["train"] = {"arguments": {"lerning_rate": 1}}
    with pytest.raises(TrainingError, match="lerning_rate"):
        run_recipe(parse_recipe(values))
    assert not (Path(values["runtime"]["workspace"]) / "stages").exists()
