"""Whatever a user can get wrong is one line and exit code 2, and nothing half-written looks whole."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from sqft.artifacts import MANIFEST
from sqft.cli import run_command_line

ADAPTING = {"adapters", "train", "search", "evaluate"}
Values = dict[str, Any]
Change = Callable[[Values, Path], None]


@pytest.fixture
def values(
    recipe_values: Callable[..., Values], tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> Values:
    """A whole QA-SparsePEFT recipe on a copy of a tiny model that a test may damage."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir("llama"), model)
    return recipe_values("qa_sparse_peft", model)


def run(values: Values, folder: Path, *overrides: str) -> int:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return run_command_line(["run", str(path), *overrides])


def refused(capsys: pytest.CaptureFixture[str], code: int, folder: Path, *words: str) -> None:
    """One line that holds the words, exit code 2, and no directory that looks finished but is not."""
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line.startswith("sqft: ")]
    assert code == 2
    assert len(lines) == 1, shown.err
    assert all(word in lines[0] for word in words), lines[0]
    assert "Traceback" not in shown.err
    assert not list(folder.rglob("merged"))
    assert not list(folder.rglob("report.json"))
    stages = folder / "runs" / "stages"
    for directory in stages.glob("*") if stages.exists() else ():
        assert directory.name.endswith(".partial") or (directory / MANIFEST).exists()
    assert not [path for path in (folder / "runs" / "models").glob("*") if ".partial" not in path.name]


def set_value(*path_and_value: Any) -> Change:
    *path, last, value = path_and_value

    def change(values: Values, folder: Path) -> None:
        for key in path:
            values = values.setdefault(key, {})
        values[last] = value

    return change


RECIPES: dict[str, tuple[Change, list[str]]] = {
    "unknown key": (set_value("sparsify", "sparsty", 0.5), ["sparsify.sparsty: unknown key"]),
    "unknown section": (set_value("prune", {}), ["prune: unknown key"]),
    "wrong type": (set_value("train", "max_steps", "many"), ["train.max_steps", "many"]),
    "out of range": (set_value("sparsify", "sparsity", 1.5), ["sparsify.sparsity", "1.5"]),
    "sections that do not fit": (set_value("quantize", None), ["qa_sparse_peft", "quantize"]),
    "model missing": (set_value("model", "./nowhere"), ["nowhere"]),
    "data missing": (set_value("data", "train", "nowhere.jsonl"), ["nowhere.jsonl"]),
    "field missing": (set_value("data", "prompt", "{quest}"), ["quest", ":1"]),
    "calibration missing": (set_value("calibration", "source", "nowhere.txt"), ["nowhere.txt"]),
    "calibration too short": (set_value("calibration", "num_samples", 100_000), ["num_samples"]),
    "module missing": (set_value("sparsify", "target_modules", ["zz_proj"]), ["zz_proj"]),
    "adapter module missing": (set_value("adapters", "target_modules", ["zz_proj"]), ["zz_proj"]),
    "group size": (set_value("quantize", "group_size", 48), ["48", "64"]),
    "pattern": (set_value("sparsify", {"pattern": "2:7"}), ["2:7", "64"]),
    "pattern beside a sparsity": (set_value("sparsify", "pattern", "2:4"), ["sparsify", "2:4", "sparsity"]),
    "pattern that nothing prunes": (set_value("quantize", "pattern", "2:4"), ["quantize", "joint"]),
    "no pattern": (set_value("quantize", {"method": "joint", "pattern": "4:2"}), ["quantize.pattern", "4:2"]),
    "device number": (set_value("runtime", "device", "cuda:x"), ["runtime", "cuda:N"]),
    "device": (set_value("runtime", "device", "tpu"), ["runtime", "cpu"]),
    "trainer argument": (set_value("train", "arguments", {"no_such": 1}), ["no_such"]),
    "optimizer not installed": (
        set_value("train", "arguments", {"optim": "adamw_bnb_8bit"}),
        ["train.arguments", "bitsandbytes"],
    ),
    "schedule argument": (
        set_value("train", "arguments", {"lr_scheduler_kwargs": {"zz": 1}}),
        ["train.arguments", "zz"],
    ),
    "sequence too long": (set_value("data", {"sequence_length": 2}), ["data.train"]),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_and_settings(
    name: str, values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, words = RECIPES[name]
    change(values, tmp_path)
    refused(capsys, run(values, tmp_path), tmp_path, *words)


def test_all_errors_of_a_recipe_at_once(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values["sparsify"]["sparsity"] = 2
    values["quantize"]["bits"] = 5
    values["adapters"]["rank"] = 8
    code = run(values, tmp_path)
    refused(capsys, code, tmp_path, "sparsify.sparsity", "quantize.bits", "adapters.rank")


def test_a_recipe_that_is_no_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: [")
    refused(capsys, run_command_line(["run", str(path)]), tmp_path, "line 1")
    path.write_text("model: m")
    refused(capsys, run_command_line(["run", str(path), "seed"]), tmp_path, "section.key=value")


DATA: dict[str, tuple[str | bytes, list[str]]] = {
    "empty": ("", ["is empty"]),
    "not JSON": ('{"question": "a", "answer": "b"}\n{"question": \n', [":2", "not JSON"]),
    "not an object": ("[1]\n", [":1", "object"]),
    "no UTF-8": (b'{"question": "\xff"}\n', [":1", "UTF-8"]),
    "no field": ('{"question": "a"}\n', [":1", "answer"]),
}


@pytest.mark.parametrize("name", DATA)
def test_data(name: str, values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, words = DATA[name]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    values["data"]["train"] = str(path)
    refused(capsys, run(values, tmp_path), tmp_path, "bad.jsonl", *words)


def damage_tensor(model: Path, name: str, value: float) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def truncate(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def corrupt_header(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


def drop_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | changes))

    return change


MODELS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "truncated": (truncate, ["model.safetensors"]),
    "corrupt": (corrupt_header, ["model.safetensors"]),
    "tensor missing": (drop_tensor, ["model.norm.weight"]),
    "unknown architecture": (change_config(model_type="zzz", architectures=["Zzz"]), ["zzz"]),
    "encoder": (change_config(model_type="bert", architectures=["BertModel"]), ["model"]),
    "setting of another type": (change_config(hidden_size="x"), ["config.json"]),
    "no heads": (change_config(num_attention_heads=0), ["config.json"]),
    "config that is a list": (lambda model: (model / "config.json").write_text("[]"), ["config.json"]),
    "index": (
        lambda model: (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}'),
        ["model.safetensors.index.json"],
    ),
    "generation config": (
        lambda model: (model / "generation_config.json").write_text('{"max_length"'),
        ["generation_config.json"],
    ),
    "other shapes": (change_config(intermediate_size=256), ["256"]),
    "no config": (lambda model: (model / "config.json").unlink(), ["config.json"]),
    "no tokenizer": (lambda model: (model / "tokenizer.json").unlink(), ["tokenizer"]),
    "pickles only": (
        lambda model: (model / "model.safetensors").rename(model / "pytorch_model.bin"),
        ["safetensors"],
    ),
    "weight not finite": (
        lambda model: damage_tensor(model, "model.layers.1.mlp.up_proj.weight", float("nan")),
        ["finite", "model.layers.1"],
    ),
    "activations not finite": (
        lambda model: damage_tensor(model, "model.layers.0.input_layernorm.weight", float("inf")),
        ["finite"],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, words = MODELS[name]
    damage(tmp_path / "model")
    refused(capsys, run(values, tmp_path), tmp_path, *words)


def test_a_gguf_file_that_is_none(values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(40))
    values["model"] = str(path)
    refused(capsys, run(values, tmp_path), tmp_path, "broken.gguf")


def test_a_loss_that_is_not_finite(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del values["quantize"]  # a grid would clamp what grows without bound
    values["adapters"]["method"] = "sparse_peft"
    values["train"]["learning_rate"] = 1e30
    refused(capsys, run(values, tmp_path), tmp_path, "nan", "learning_rate")


def test_an_adapter_for_another_base(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel

    from sqft.errors import AdapterError
    from sqft.models import load_trainable

    assert run(values, tmp_path) == 0
    stages = tmp_path / "runs" / "stages"
    (adapter,) = [path / "adapter" for path in stages.glob("train-*")]
    values["sparsify"]["sparsity"] = 0.6
    only_compressed = {key: value for key, value in values.items() if key not in ADAPTING}
    assert run(only_compressed | {"name": "other"}, tmp_path) == 0
    (first, other) = sorted(stages.glob("quantize-*"), key=lambda path: path.stat().st_ctime)
    PeftModel.from_pretrained(load_trainable(first), adapter)
    with pytest.raises(AdapterError):
        PeftModel.from_pretrained(load_trainable(other), adapter)
    capsys.readouterr()
    merged = tmp_path / "runs" / "qa_sparse_peft" / "merged"
    arguments = ["verify", str(merged), "--base", str(other), "--adapter", str(adapter)]
    assert run_command_line(arguments) == 1
    assert "FAILED  identity" in capsys.readouterr().out


def test_no_space_left(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqft.models import CheckpointWriter

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(CheckpointWriter, "close", full)
    refused(capsys, run(values, tmp_path), tmp_path, "no space left", "free")
    monkeypatch.undo()
    assert run(values, tmp_path) == 0


def test_a_damaged_stage_is_told_and_not_used(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(values, tmp_path) == 0
    (stage,) = (tmp_path / "runs" / "stages").glob("quantize-*")
    damage_tensor(stage, "model.norm.weight", 7.0)
    capsys.readouterr()
    code = run(values, tmp_path)
    shown = capsys.readouterr()
    assert code == 2
    assert "is damaged" in shown.err
    assert stage.name in shown.err


def test_an_interrupted_run(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sqft.certificate.certify_model", interrupt)
    monkeypatch.setattr("sqft.training.train_adapters", interrupt)
    assert run(values, tmp_path) == 130
    shown = capsys.readouterr()
    assert "sqft: interrupted" in shown.err
    assert not list(tmp_path.rglob("merged"))
    monkeypatch.undo()
    assert run(values, tmp_path) == 0
    assert list(tmp_path.rglob("merged"))
