"""What a run would refuse hours later is refused by its plan, before anything is written."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from sqft.cli import run_command_line
from sqft.errors import AdapterError, CompressionError, DataError, ExportError, MissingExtraError, SqftError
from sqft.pipeline import parse_recipe, plan_recipe, run_recipe, runner
from sqft.pipeline.preview import preview_data

GGUF = {"export": {"formats": ["gguf"]}}
REFUSED: dict[str, tuple[str, dict[str, Any], type[SqftError], str]] = {
    "format and grid": ("llama", GGUF | {"quantize": {"method": "rtn", "group_size": 16}}, ExportError,
                        "gguf cannot hold .* groups of 16 .*that can: compressed"),
    "format and family": ("gemma2", GGUF, ExportError, "gguf cannot hold query_pre_attn_scalar 256"),
    "format and no grid": ("llama", {"export": {"formats": ["gptq"]}, "quantize": None,
                                     "adapters": {"method": "sparse_peft"}}, ExportError,
                           "gptq cannot hold weights that are not on an integer grid"),
    "format and rounding": ("llama", {"export": {"formats": ["safetensors"]},
                                      "quantize": {"method": "rtn", "group_size": 32, "bits": 8}},
                            ExportError, "safetensors cannot hold .* exact in neither float16 nor bfloat16"),
    "rank and width": ("llama", {"adapters": {"method": "qa_sparse_peft", "ranks": [65]}}, AdapterError,
                       "65 is more than .* can have; 64 is its full rank"),
    "group and width": ("llama", {"quantize": {"method": "rtn", "group_size": 48}}, CompressionError,
                        "group size 48 does not divide"),
    "too little to calibrate on": ("llama", {"calibration": {"num_samples": 9999}}, DataError,
                                   "9999 samples of 256 need 2559744: lower calibration.num_samples"),
    "missing file": ("llama", {"data": {"train": "none.jsonl"}}, DataError, "there is no file none.jsonl"),
}  # fmt: skip


@pytest.fixture
def make_recipe(
    recipe_values: Callable[..., dict[str, Any]], tiny_model_dir: Callable[..., Path]
) -> Callable[..., dict[str, Any]]:
    def make(arch: str, changes: dict[str, Any]) -> dict[str, Any]:
        values = recipe_values("qa_sparse_peft", tiny_model_dir(arch)) | {"search": {"method": "median"}}
        return {key: value for key, value in (values | changes).items() if value is not None}

    return make


@pytest.mark.parametrize("case", REFUSED)
def test_plan_and_run_refuse_alike(
    case: str, make_recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    arch, changes, kind, message = REFUSED[case]
    for attempt in (plan_recipe, run_recipe):
        with pytest.raises(kind, match=message):
            attempt(parse_recipe(make_recipe(arch, changes)))
    assert not list((tmp_path / "runs").rglob("sqft*"))


@pytest.mark.parametrize("formats", [["gguf", "openvino"], ["gptq", "compressed-tensors"]])
def test_formats_that_hold_the_grid_are_planned(
    formats: list[str], make_recipe: Callable[..., dict[str, Any]]
) -> None:
    changes = {"export": {"formats": formats}}
    try:
        planned = plan_recipe(parse_recipe(make_recipe("llama", changes)))
    except MissingExtraError as error:
        pytest.skip(str(error))
    assert [stage.name for stage in planned.stages][-2:] == [f"export-{name}" for name in formats]


def test_a_format_whose_runtime_is_missing(
    make_recipe: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where an earlier plan's answer is kept
    monkeypatch.setattr("sqft.export.table.FORMATS", {})
    with pytest.raises(ExportError, match="is unknown"):
        plan_recipe(parse_recipe(make_recipe("llama", {"export": {"formats": ["gguf"]}})))
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=r"sqft\[eval\]"):
        plan_recipe(parse_recipe(make_recipe("llama", {"evaluate": {"tasks": ["arc_easy"]}})))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": {"method": "hill_climb"}}, "hill_climb compares sub-adapters on search items"),
        ({"evaluate": {}}, "evaluate measures on test items"),
    ],
)
def test_splits_that_are_needed(
    changes: dict[str, Any], message: str, make_recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n' * 3)
    values = make_recipe("llama", {"data": {"train": str(path)}, "evaluate": None} | changes)
    values["calibration"] = {"source": str(path), "field": "question", "num_samples": 1, "sequence_length": 3}
    for attempt in (plan_recipe, run_recipe):
        with pytest.raises(DataError, match=message):
            attempt(parse_recipe(values))


def test_three_items_are_enough_where_nothing_is_measured(
    make_recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "few.jsonl"
    rows = [{"question": f"what is {n}?", "answer": str(n)} for n in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = make_recipe("llama", {"data": {"train": str(path)}, "evaluate": None})
    values["quantize"] = {"method": "rtn", "group_size": 32}
    values["sparsify"] = {"method": "magnitude"}
    result = run_recipe(parse_recipe(values))
    assert result.data.passed


def test_a_plan_shows_the_data_as_it_is_read(
    make_recipe: Callable[..., dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(make_recipe("llama", {})))
    assert run_command_line(["plan", str(recipe)]) == 0
    shown = capsys.readouterr().out
    assert "question: what is 0 plus 0? answer: «0</s>»" in shown
    assert run_command_line(["plan", str(recipe), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["data"]["report"]["items"] == {"train": 60, "search": 12, "test": 12}
    assert not (tmp_path / "runs" / "stages").exists()


def test_preview_shows_items_and_what_the_loss_counts(
    make_recipe: Callable[..., dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "chat.jsonl"
    turns = [("user", "hi"), ("assistant", "ho"), ("user", "he"), ("assistant", "hu")]
    rows = [{"messages": [{"role": r, "content": f"{c} {n}"} for r, c in turns]} for n in range(9)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = make_recipe("llama", {"data": {"train": str(data)}})
    values["calibration"] = {"num_samples": 2, "sequence_length": 32}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(values))
    assert run_command_line(["preview", str(recipe), "--items", "1", "--split", "test"]) == 0
    shown = capsys.readouterr().out
    assert "messages" in shown
    assert shown.count("«") == 2
    assert "1 test items are split off 9 (300 are usual)" in shown
    assert run_command_line(["preview", str(recipe), "--json", "data.loss_on=text"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["items"]) == 3
    assert [counted for _, counted in found["items"][0]["pieces"]] == [False, True]
    assert run_command_line(["run", str(recipe), "train.max_steps=1", "evaluate=null"]) == 0
    capsys.readouterr()
    assert run_command_line(["preview", str(recipe), "evaluate=null"]) == 0  # from the stage that is there
    assert "«ho" in capsys.readouterr().out
    assert run_command_line(["preview", str(recipe), "data=null", "adapters=null", "train=null",
                             "search=null", "evaluate=null", "calibration.source=x.txt"]) == 2  # fmt: skip
    assert "nothing to preview" in capsys.readouterr().err


def test_a_config_alone_is_planned_and_does_not_run(
    make_recipe: Callable[..., dict[str, Any]],
    tmp_path: Path,
    tiny_model_dir: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And where nothing can be written, nothing is: a folder stands where digests would be kept."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((tiny_model_dir("llama") / "config.json").read_bytes())
    (tmp_path / "runs" / ".digests.json").mkdir(parents=True)
    values = make_recipe("llama", {"model": str(tmp_path / "bare")})
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    whole = plan_recipe(parse_recipe(make_recipe("llama", {})))
    bare = plan_recipe(parse_recipe(values))
    for stage, known in zip(bare.stages, whole.stages, strict=True):
        assert stage.name == known.name
        # without a tokenizer items are as long as they may be
        assert (stage.memory_bytes == known.memory_bytes) == (
            stage.name in ("items", "sparsify", "quantize", "search", "merge")
        )
        assert stage.memory_bytes >= known.memory_bytes
    assert run_command_line(["plan", str(tmp_path / "recipe.yaml")]) == 0
    assert "a run needs them" in capsys.readouterr().out
    assert run_command_line(["run", str(tmp_path / "recipe.yaml")]) == 2
    assert "model.safetensors" in capsys.readouterr().err


def test_a_plan_of_a_large_model_in_a_new_workspace_reads_no_weights(
    make_recipe: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse_recipe(make_recipe("llama", {}))
    usual = plan_recipe(recipe)
    monkeypatch.setattr(runner, "READ_AT_ONCE", 0)
    large = plan_recipe(recipe)
    assert [replace(stage, directory=None) for stage in usual.stages] == large.stages
    assert preview_data(recipe).items
    Path(str(usual.stages[0].directory)).with_name("other").mkdir(parents=True)  # some may be there now
    assert [s.directory for s in plan_recipe(recipe).stages] == [s.directory for s in usual.stages]


def test_memory_grows_with_what_a_method_holds(make_recipe: Callable[..., dict[str, Any]]) -> None:
    def needs(**quantize: Any) -> int:
        values = make_recipe("llama", {"quantize": {"group_size": 32} | quantize})
        (stage,) = (s for s in plan_recipe(parse_recipe(values)).stages if s.name == "quantize")
        return stage.memory_bytes

    assert needs(method="rtn") < needs(method="gptq") < needs(method="gptaq")


def test_a_plan_of_what_was_planned_before_needs_no_torch(
    make_recipe: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor transformers, whose import alone takes seconds; other settings of training are nothing new."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    values = make_recipe("llama", GGUF)
    planned = plan_recipe(parse_recipe(values))
    values["train"] = values.get("train", {}) | {"learning_rate": 0.5}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(values))
    script = (
        "import sys; from sqft.cli import run_command_line; "
        f"code = run_command_line(['plan', {str(recipe)!r}, '--json']); "
        "sys.exit(code or ' '.join({'torch', 'transformers'} & sys.modules.keys()) or None)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    again = json.loads(done.stdout)
    assert again["modules"] == json.loads(json.dumps([asdict(module) for module in planned.modules]))
    assert planned.data is not None
    assert again["data"] == json.loads(json.dumps(asdict(planned.data)))
