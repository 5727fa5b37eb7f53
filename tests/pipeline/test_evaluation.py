"""`sqft evaluate`: merged models, adapters, exports; the prompt of training; results beside the model."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sqft.cli import run_command_line
from sqft.errors import AdapterError, DataError, ModelError
from sqft.pipeline import RunResult, parse_recipe, run_recipe
from sqft.pipeline.comparison import compare_runs, find_measured
from sqft.pipeline.evaluation import evaluate_path, hub_entries
from sqft.sections import EvaluateSection

SECTION = EvaluateSection(batch_size=4, max_new_tokens=4, general_text=None)


@pytest.fixture(scope="module")
def trained(tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`trained(quantized)`: a tiny run, and its test file."""
    root = tmp_path_factory.mktemp("trained")
    rows = [{"question": f"what is {a} plus {b}?", "answer": a + b} for a in range(6) for b in range(6)]
    for name, part in (("train", rows[8:]), ("test", rows[:8])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    made: dict[bool, RunResult] = {}

    def make(quantized: bool) -> tuple[RunResult, Path]:
        values: dict[str, Any] = {
            "name": f"run-{quantized}",
            "model": str(tiny_model_dir("llama")),
            "data": {
                "train": str(root / "train.jsonl"),
                "test": str(root / "test.jsonl"),
                "search_items": 4,
                "prompt": "Q: {question}\nA: ",
                "sequence_length": 64,
            },
            "sparsify": {"method": "magnitude"},
            "adapters": {"method": "sparse_peft", "ranks": [4]},
            "train": {"max_steps": 2, "batch_size": 4},
            "evaluate": {"models": ["merged"], "batch_size": 4, "max_new_tokens": 4},
            "runtime": {"workspace": str(root / "runs"), "device": "cpu", "threads": 1},
        }
        if quantized:
            values["quantize"] = {"method": "rtn", "group_size": 32}
            values["adapters"]["method"] = "qa_sparse_peft"
        if quantized not in made:
            made[quantized] = run_recipe(parse_recipe(values))
        return made[quantized], root / "test.jsonl"

    return make


def test_search_items_are_measured_where_a_setting_is_chosen_by_them(trained: Any) -> None:
    result, _ = trained(False)
    values = result.data.recipe
    again = run_recipe(parse_recipe({**values, "evaluate": {**values["evaluate"], "split": "search"}}))
    assert [stage.reused for stage in again.stages] == [True, True, True, True, True, False]
    assert again.data.models[0].num_items == 4


@pytest.mark.parametrize("quantized", [False, True])
def test_a_finished_model_gives_the_figures_of_its_run(trained: Any, quantized: bool) -> None:
    result, test = trained(quantized)
    found = evaluate_path(str(result.model_dir), SECTION, {"test": str(test)}, write=False)
    (row,) = result.data.models
    assert found.row.loss == row.loss
    assert found.row.accuracy == row.accuracy
    assert found.row.size_bytes == row.size_bytes
    assert (found.row.bits, found.row.num_items) == (4 if quantized else None, 8)
    assert found.row.sparsity == row.sparsity


def test_an_adapter_with_its_base_is_the_merged_model(trained: Any) -> None:
    result, test = trained(True)
    merged = evaluate_path(str(result.model_dir), SECTION, {"test": str(test)}, write=False)
    adapter = evaluate_path(str(result.adapter_dir), SECTION, {"test": str(test)}, write=False)
    assert adapter.row.loss == pytest.approx(merged.row.loss, abs=1e-6)
    assert adapter.name == f"{result.base_dir.name} + adapter"


def test_an_adapter_without_its_base(trained: Any, tmp_path: Path) -> None:
    import shutil

    result, test = trained(False)
    shutil.copytree(result.adapter_dir, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    for base in (None, str(tmp_path / "moved")):
        (tmp_path / "adapter/adapter_config.json").write_text(
            json.dumps(config | {"base_model_name_or_path": base})
        )
        with pytest.raises(AdapterError, match=r"base of the adapter .* is not here .*--base"):
            evaluate_path(str(tmp_path / "adapter"), SECTION, {"test": str(test), "prompt": "{question}"})
    given = evaluate_path(
        str(tmp_path / "adapter"),
        SECTION,
        {"test": str(test), "prompt": "Q: {question}\nA: "},
        base=str(result.base_dir),
    )
    assert given.row.num_items == 8
    with pytest.raises(AdapterError, match="is not an adapter"):
        evaluate_path(str(result.model_dir), SECTION, {"test": str(test)}, base=str(result.base_dir))


def test_results_lie_beside_the_model_and_can_be_compared(trained: Any, tmp_path: Path) -> None:
    results = [trained(quantized)[0] for quantized in (False, True)]
    test = trained(True)[1]
    for result in results:
        evaluate_path(str(result.model_dir), SECTION, {"test": str(test)})
    folder = results[0].model_dir / ".eval_results"
    (written,) = folder.glob("[!.]*.json")
    assert find_measured(str(results[0].model_dir))[0].row.num_items == 8
    data = compare_runs([str(result.model_dir) for result in results])
    assert data.num_items["loss"] == 8
    assert data.differing["quantize"] == ["-", "rtn, group_size 32"]
    # The same measurement takes its own place; a file of somebody else's stays.
    before = written.read_bytes()
    evaluate_path(str(results[0].model_dir), SECTION, {"test": str(test)})
    assert len(list(folder.glob("[!.]*.json"))) == 1
    written.write_text("mine")
    evaluate_path(str(results[0].model_dir), SECTION, {"test": str(test)})
    assert written.read_text() == "mine"
    assert len(list(folder.glob("[!.]*.json"))) == 2
    written.write_bytes(before)
    # The run still takes the model for its own, and the certificate still holds.
    again = run_recipe(parse_recipe(dict(results[0].data.recipe)))
    assert again.model_dir == results[0].model_dir
    assert written.exists()
    assert run_command_line(["verify", str(results[0].model_dir)]) == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_exports_are_measured_in_their_runtimes(trained: Any, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    from sqft.export import export_model

    result, test = trained(True)
    export_model(result.model_dir, "gguf", tmp_path / "gguf")
    form = {"test": str(test), "prompt": "Q: {question}\nA: "}
    found = evaluate_path(str(tmp_path / "gguf"), SECTION, form)
    assert found.runtime == "llama.cpp"
    (row,) = result.data.models
    assert found.row.loss == pytest.approx(row.loss, rel=0.02)  # inputs rounded to 8 bits
    assert list((tmp_path / "gguf/.eval_results").glob("test-*.json"))
    file = next((tmp_path / "gguf").glob("*.gguf"))
    other = evaluate_path(str(file), SECTION, form, tokenizer_dir=result.model_dir, write=False)
    assert other.row.loss == pytest.approx(found.row.loss, rel=1e-3)


def test_what_cannot_be_measured(trained: Any, tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    result, test = trained(False)
    with pytest.raises(DataError, match="nothing to measure"):
        evaluate_path(str(result.model_dir), EvaluateSection(general_text=None))
    with pytest.raises(ModelError, match="does not exist"):
        evaluate_path(str(tmp_path / "none"), SECTION, {"test": str(test)})
    with pytest.raises(DataError, match="does not record the prompt"):
        evaluate_path(str(tiny_model_dir("llama")), SECTION, {"test": str(test)})
    with pytest.raises(DataError, match="there is no file"):
        evaluate_path(str(result.model_dir), SECTION, {"test": str(tmp_path / "none.jsonl")})


def test_perplexity_and_the_command_line(
    trained: Any, tmp_path: Path, tiny_model_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    result, test = trained(False)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and runs home " * 60)
    model = str(tiny_model_dir("llama"))
    texts = ["--perplexity", str(text), "--general", str(text)]
    assert run_command_line(["evaluate", model, *texts, "--no-write", "--json"]) == 0
    (values,) = json.loads(capsys.readouterr().out)
    assert values["perplexity"] > 1
    assert values["general_loss"] == pytest.approx(math.log(values["perplexity"]))
    assert values["loss"] is None
    arguments = ["evaluate", str(result.model_dir), model, "--data", str(test), "--prompt", "Q: {question}"]
    assert run_command_line([*arguments, "--no-write", "--max-items", "3", "--max-new-tokens", "2"]) == 0
    shown = capsys.readouterr().out
    assert "merged" in shown
    assert "written" not in shown
    assert run_command_line(["evaluate", model, "--tasks", "arc_eazy"]) == 2
    assert "arc_easy" in capsys.readouterr().err
    assert run_command_line(["evaluate", model, "--num-fewshot", "3", "--perplexity", str(text)]) == 2
    assert "name some" in capsys.readouterr().err
    assert run_command_line(["evaluate", model, "--prompt", "{question}"]) == 2
    assert "--data" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tasks_become_evaluation_results_of_the_hub(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    pytest.importorskip("lm_eval")
    shutil.copytree(tiny_model_dir("llama"), tmp_path / "model")
    folder = tmp_path / "sets/arc_easy"
    folder.mkdir(parents=True)
    rows = [{"question": f"who is {n}?", "choices": ["a fox", "a dog"], "label": n % 2} for n in range(5)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["evaluate", str(tmp_path / "model"), "--tasks", "arc_easy", "--samples", "--max-items", "4"]
    shutil.copytree(tmp_path / "model", tmp_path / "other" / "model")
    arguments.insert(2, str(tmp_path / "other/model"))
    assert run_command_line([*arguments, "--tasks-data", str(tmp_path / "sets")]) == 0
    shown = capsys.readouterr().out
    assert "standard error" in shown
    for folder in (tmp_path / "model", tmp_path / "other/model"):  # told apart by their paths
        assert f"{folder}  arc_easy  acc: " in shown
    results = tmp_path / "model/.eval_results"
    (path,) = results.glob("*.yaml")
    (entry,) = yaml.safe_load(path.read_text())
    assert entry["dataset"] == {"id": "allenai/ai2_arc", "task_id": "arc_easy"}
    assert 0 <= entry["value"] <= 100
    assert entry["notes"].endswith("4 items, the first 4 of the set")
    (samples,) = results.glob("*.samples.jsonl")
    assert len(samples.read_text().splitlines()) == 4
    (record,) = results.glob("[!.]*.json")
    values = json.loads(record.read_text())
    assert "samples" not in values["items"]["tasks"]["arc_easy"]
    assert hub_entries(values)[0]["value"] == entry["value"]
