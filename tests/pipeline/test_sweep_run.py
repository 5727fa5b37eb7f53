"""Sweeps that run: shared stages, failing cells, going on, and two processes at one sweep."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sqft.cli import run_command_line
from sqft.errors import DataError
from sqft.pipeline.sweep import expand_sweep
from sqft.pipeline.sweep_run import plan_sweep, run_sweep


@pytest.fixture
def values(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> dict[str, Any]:
    """Two sparsities, two numbers of bits, measured by perplexity."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and runs home " * 60)
    return {
        "name": "grid",
        "model": str(tiny_model_dir("llama")),
        "sparsify": {"method": "magnitude", "sparsity": [0.3, 0.6]},
        "quantize": {"method": "rtn", "group_size": 32, "bits": [4, 8]},
        "evaluate": {"perplexity": str(text), "perplexity_tokens": 256, "sequence_length": 64},
        "runtime": {"workspace": str(tmp_path / "runs"), "device": "cpu", "threads": 1},
    }


def test_what_cells_share_is_done_once(values: dict[str, Any]) -> None:
    sweep = expand_sweep(values)
    plan = plan_sweep(sweep)
    # base once, two sparsities, and for each of four cells a model and its figures
    assert (plan.num_cells, plan.wanted, plan.distinct, plan.done) == (4, 20, 1 + 2 + 2 + 4 + 4, 0)
    assert plan.unknown == ["evaluate", "quantize", "sparsify"]
    lines: list[str] = []
    result = run_sweep(sweep, tell=lines.append)
    assert not result.failed
    assert list(result.done) == [cell.name for cell in sweep.cells]
    assert len(list((Path(values["runtime"]["workspace"]) / "stages").iterdir())) == plan.distinct
    again = plan_sweep(sweep)
    assert (again.to_run, again.seconds, again.unknown) == (0, 0.0, [])
    run_sweep(sweep, tell=lines.append)
    assert lines[-1].endswith("done before")
    told = json.loads((result.directory / "sweep.json").read_text())
    assert told["cells"][0]["choices"] == {"sparsify.sparsity": "sparsity0.3", "quantize.bits": "bits4"}


def test_a_cell_that_fails_stops_no_other(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import sqft.compression

    real = sqft.compression.sparsify_model

    def fail(model: Any, section: Any, *rest: Any, **named: Any) -> Any:
        if section.sparsity == 0.3:
            raise RuntimeError("the weather")
        return real(model, section, *rest, **named)

    monkeypatch.setattr(sqft.compression, "sparsify_model", fail)
    result = run_sweep(expand_sweep(values))
    assert sorted(result.done) == ["sparsity0.6-bits4", "sparsity0.6-bits8"]
    assert result.failed["sparsity0.3-bits4"] == "RuntimeError: the weather"
    assert "failed before: the weather" in result.failed["sparsity0.3-bits8"]  # its stage was not tried again
    monkeypatch.undo()
    assert not run_sweep(expand_sweep(values)).failed


def test_a_missing_file_is_told_before_anything_runs(values: dict[str, Any]) -> None:
    values["evaluate"]["perplexity"] = "none.txt"
    with pytest.raises(DataError, match=r"cell sparsity0\.3-bits4: evaluate\.perplexity: there is no file"):
        plan_sweep(expand_sweep(values))


PROGRAM = """
import json, os, signal, sys
from dataclasses import replace
from sqft.pipeline.sweep import expand_sweep
from sqft.pipeline.sweep_run import run_sweep
import sqft.pipeline.runner as runner
made, real = [], runner._run
def noting(stage, *rest):
    made.append(stage.name)
    if made[-1] == sys.argv[2]:  # its directory is begun, nothing is in it yet
        stage = replace(stage, step=lambda context: os.kill(os.getpid(), signal.SIGKILL))
    return real(stage, *rest)
runner._run = noting
result = run_sweep(expand_sweep(json.loads(sys.argv[1])))
print(json.dumps({"made": made, "done": sorted(result.done), "failed": result.failed}))
"""


def test_two_processes_share_a_sweep_that_a_killed_one_began(values: dict[str, Any]) -> None:
    values["quantize"]["bits"] = 4
    stages = Path(values["runtime"]["workspace"]) / "stages"
    command = [sys.executable, "-c", PROGRAM, json.dumps(values)]
    killed = subprocess.run([*command, "quantize"], capture_output=True, check=False, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    (begun,) = stages.glob("*.partial")
    before = {path.name for path in stages.iterdir()} - {begun.name}
    assert {name.rsplit("-", 1)[0] for name in before} == {"sparsify"}
    processes = [subprocess.Popen([*command, "none"], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = [json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) for process in processes]
    sweep = expand_sweep(values)
    for one in found:
        assert one["failed"] == {}
        assert one["done"] == sorted(cell.name for cell in sweep.cells)
    left = plan_sweep(sweep).distinct - len(before)
    assert sum(len(one["made"]) for one in found) == left  # nothing was made twice, before the kill or after
    assert not list(stages.glob("*.partial"))
    assert not list((Path(values["runtime"]["workspace"]) / ".locks").iterdir())


def test_the_command(values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump(values))
    assert run_command_line(["sweep", str(recipe), "quantize.bits=4", "--plan"]) == 0
    shown = capsys.readouterr().out
    assert "2 runs of 10 stages; 1 are shared" in shown
    assert "time: not known" in shown
    assert run_command_line(["sweep", str(recipe), "quantize.bits=4"]) == 0
    shown = capsys.readouterr().out
    assert "done: 2, failed: 0" in shown
    assert "to sparsity0.3" in shown
    assert (tmp_path / "runs/grid/comparison.html").exists()
    assert run_command_line(["sweep", str(recipe), f"seed={list(range(100))}"]) == 2
    assert "400 cells" in capsys.readouterr().err
    assert run_command_line(["sweep", str(recipe), "quantize.bits=8", "--plan"]) == 0
    assert "by finished stages of the same kinds\n" in capsys.readouterr().out
    assert run_command_line(["status", str(tmp_path / "runs")]) == 0
    assert run_command_line(["run", str(recipe)]) == 2
    assert "sqft sweep" in capsys.readouterr().err
