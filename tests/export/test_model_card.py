"""What stands beside an artefact: recipe, evaluation, and commands that can be pasted."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sqft.cli import run_command_line
from sqft.errors import ExportError
from sqft.export import adapter_export, export_adapter, export_model
from sqft.export.records import model_records
from sqft.export.verification import check_export
from sqft.formats.gguf_adapter import write_gguf_adapter
from sqft.runtimes.commands import serving_commands
from tests.export.test_adapter_export import write_adapter


def test_a_recipe_and_the_command_line_tell_what_was_measured(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "<script>```.txt"
    texts.write_text("The river bends. " * 200)
    values = {
        "name": "small",
        "model": str(tiny_model_dir("llama")),
        "sparsify": {"method": "magnitude", "sparsity": 0.5},
        "quantize": {"method": "rtn", "group_size": 32},
        "evaluate": {"perplexity": str(texts)},
        "export": {"formats": ["gptq"]},
        "runtime": {"workspace": str(tmp_path / "runs"), "device": "cpu", "threads": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert run_command_line(["run", str(tmp_path / "recipe.yaml")]) == 0, capfd.readouterr().err
    (card,) = (tmp_path / "runs" / "stages").glob("export-gptq-*/README.md")
    (model,) = (path.parent / "model" for path in (tmp_path / "runs").rglob("report.json"))
    command = ["export", str(model), "--to", "safetensors", "--output", str(tmp_path / "out")]
    assert run_command_line(command) == 0, capfd.readouterr().err
    for text in (card.read_text(), (tmp_path / "out" / "README.md").read_text()):
        assert '"method": "rtn"' in text
        table = text.split("## Evaluation")[1]
        assert table.strip().startswith("| name |")
        assert "| quantized |" in table
        assert "| perplexity |" in table
        assert "<script>" not in text
    for name in ("config.json", "sqft_export.json", "README.md"):
        assert str(tmp_path) not in (tmp_path / "out" / name).read_text()  # it is made to be given away


def test_a_model_without_records_has_none_and_damaged_ones_are_no_error(
    merged_dir: Callable[..., Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(merged_dir(), tmp_path / "merged"))
    assert model_records(model) == (None, None)
    (tmp_path / "report.json").write_text(json.dumps({"merged_dir": "elsewhere/other", "models": [{"a": 1}]}))
    (model / "sqft.json").write_text("{")
    assert model_records(model) == (None, None)
    rungs = [
        {"name": "round", "loss": 2.0, "retention": 0.5},
        {"name": "polish", "loss": 1.5, "retention": 1},
    ]
    merge = {
        "base_loss": 3.0,
        "unmerged_loss": 1.0,
        "trained_on_loss": None,
        "rungs": rungs,
        "chosen": "polish",
    }
    (model / "sqft_merge.json").write_text(json.dumps(merge))
    export_model(model, "gptq", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| name | loss | retention |" in text
    assert "| base | 3 | - |" in text
    assert "| merged (polish) | 1.5 | 1 |" in text


@pytest.mark.parametrize("format", ["gguf", "openvino", "gptq", "compressed-tensors", "safetensors", "peft"])
def test_commands_can_be_pasted_and_say_whether_they_were_tried(format: str) -> None:
    place = Path("/home/Ann Lee's models/out; rm -rf x")
    for line in serving_commands(format, place, base=Path("my base")):
        words = shlex.split(line.split("  # ")[0])
        assert any(str(place) in word.replace("\\'", "'") for word in words)
        assert {"rm", "Lee's"}.isdisjoint(words)
        assert ("not tried here" if words[0] == "vllm" else "tried with SmolLM2") in line.split("  # ")[1]
        if words[0] == "python":
            compile(words[2], "command", "exec")
        if words[0] == "vllm":
            assert "pip install vllm, in an environment of its own" in line


@pytest.mark.parametrize("format", ["peft", "gguf"])
def test_an_exported_adapter_says_how_to_serve_it(
    merged_dir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str
) -> None:
    write_adapter(merged_dir(), tmp_path / "adapter")
    out = tmp_path / "out"
    command = ["export", str(tmp_path / "adapter"), "--to", format, "--base", str(merged_dir())]
    assert run_command_line([*command, "--output", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "read back: equal to the adapter" in shown
    serve = "--enable-lora" if format == "peft" else f"--lora {out}/adapter.gguf"
    assert serve in shown
    assert serve in (out / "README.md").read_text()
    assert all(finding.passed for finding in check_export(out))
    findings = [finding for finding in check_export(out, merged_dir()) if not finding.passed]
    assert all("verify it without --merged" in finding.detail for finding in findings)
    assert [finding.name for finding in findings] == ["codes", "tokenizer", "masks", "made anew"]


def test_an_adapter_that_changed_on_the_way_is_not_written(
    merged_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(merged_dir(), tmp_path / "adapter")

    def swapped(source: Any, factors: Any, path: Path) -> None:
        names = [name for name in factors if name.endswith("q_proj")]
        write(source, factors | {names[0]: factors[names[1]], names[1]: factors[names[0]]}, path)

    write = write_gguf_adapter
    monkeypatch.setattr(adapter_export, "write_gguf_adapter", swapped)
    with pytest.raises(ExportError, match="q_proj changed on the way to gguf"):
        export_adapter(tmp_path / "adapter", merged_dir(), "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
