"""The GPU benchmark's runner, and a dry run of its parts at tiny sizes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu.choose import merge_results
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.tables import collect_checks, markdown

from sqft.kernels import choices
from sqft.kernels.choices import TORCH, Choice, Tiling, choose_kernels, table_row

ROOT = Path(__file__).parents[1]
QUICK = ["facts", "layers"]


def dry_run(parts: list[str], path: Path, *more: str) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--dry",
        "--json",
        str(path),
        "--parts",
        ",".join(parts),
    ]
    done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "## Aims" in done.stdout
    result: dict[str, Any] = json.loads(path.read_text())
    assert list(result["parts"]) == [part.name for part in PARTS if part.name in parts]
    return result


def assert_whole(result: dict[str, Any]) -> None:
    for name, part in result["parts"].items():
        assert part["error"] is None, name
        assert part["rows"], name
        for row in part["rows"]:
            assert "error" not in row, (name, row)


def test_a_dry_run_leaves_no_row_without_figures(tmp_path: Path) -> None:
    assert_whole(dry_run(QUICK, tmp_path / "gpu.json"))


@pytest.mark.slow
@pytest.mark.parametrize("part", [part.name for part in PARTS if part.name not in QUICK])
def test_every_part_runs_dry(part: str, tmp_path: Path) -> None:
    assert_whole(dry_run([part], tmp_path / "gpu.json", "--minutes", "20"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--json", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "sees no GPU here; --dry" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "gpu.json").exists()


def test_a_part_without_time_is_named(tmp_path: Path) -> None:
    result = dry_run(["training"], tmp_path / "gpu.json", "--minutes", "0.1")
    assert "stopped after" in result["parts"]["training"]["error"]
    assert all(check["met"] is None for check in result["checks"])


def test_aims_take_the_faster_kernels_and_leave_open_what_failed() -> None:
    def row(name: str, seconds: float, peak: int) -> dict[str, Any]:
        values = {"step_seconds": [seconds, seconds], "peak_bytes": peak, "tokens_per_second": 1.0}
        return {"row": f"{name}, checkpointing", "values": values, "seconds": 1.0}

    rows = [
        row("peft lora", 1.0, 100),
        row("sparse_peft exact torch", 1.5, 110),
        row("sparse_peft exact triton", 1.2, 104),
        {"row": "published, checkpointing", "error": "OutOfMemoryError: too much", "seconds": 1.0},
    ]
    result: dict[str, Any] = {"dry": False, "parts": {"training": {"about": "", "rows": rows, "error": None}}}
    result["checks"] = collect_checks(result)
    found = {check["name"]: check for check in result["checks"]}
    exact = found["sparse_peft exact / peft lora, step of Llama-3-8B, checkpointing"]
    assert (exact["value"], exact["met"]) == (1.2, True)
    assert found["peak memory, sparse_peft / PEFT LoRA, checkpointing"]["value"] == 1.04
    assert found["sparse_peft exact / published, step of Llama-3-8B, checkpointing"]["met"] is None
    assert "OutOfMemoryError" in markdown(result)


def test_results_fill_the_table_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    tiling = Tiling(64, 64, precision="tf32x3")
    choice = Choice(tiling, Tiling(128, 256, warps=8, stages=3), product=False)
    old = table_row("8.0", (64, 64), False, TORCH)
    table: dict[str, Any] = {"measured_on": ["A"], "rows": [old], "loss": {}}
    rows = [
        {"row": "big", "values": {"table_row": table_row("9.0", (4096, 4096), True, choice)}},
        {"row": "small", "values": {"table_row": table_row("9.0", (64, 64), True, TORCH)}},
        {"row": "loss", "values": {"capability": "9.0", "torch_ms": 2.0, "liger_ms": 1.0}},
        {"row": "failed", "error": "no"},
    ]
    result = {"dry": False, "environment": {"gpu": "B"}, "parts": {"layers": {"rows": rows}}}
    merged = merge_results(merge_results(table, result) or {}, result)
    assert merged is not None
    assert merged["measured_on"] == ["A", "B"]
    assert len(merged["rows"]) == 3
    monkeypatch.setattr(choices, "_table", lambda: json.loads(json.dumps(merged)))
    choices._nearest.cache_clear()
    near: dict[str, Any] = {"quantized": True, "wanted": "auto"}
    assert choose_kernels("9.0", (5120, 4000), **near) == choice
    assert choose_kernels("9.0", (70, 50), **near) == TORCH
    assert choose_kernels("9.0", (70, 50), quantized=True, wanted="triton").gradient is not None
    assert choose_kernels("9.0", (5120, 4000), quantized=False, wanted="auto") == TORCH
    assert choose_kernels("7.5", (5120, 4000), **near) == TORCH
    assert choices.choose_loss("9.0") == "liger"
    choices._nearest.cache_clear()
