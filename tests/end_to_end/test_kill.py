"""A run that is killed at any point finishes later with the very same bits."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sqft.artifacts import digest_files

SOURCE = Path(__file__).parents[2] / "src"


def _command(recipe: Path) -> list[str]:
    return [sys.executable, "-m", "sqft", "run", str(recipe)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_run_finishes_bit_identically(
    seed: int,
    recipe_values: Callable[..., dict[str, Any]],
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
) -> None:
    values = recipe_values("qa_sparse_peft", tiny_model_dir("llama"))
    values["train"]["max_steps"] = 40
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    started = time.perf_counter()
    subprocess.run(_command(recipe), check=True, env=environment, capture_output=True)
    duration = time.perf_counter() - started
    whole = _weights(Path(values["runtime"]["workspace"]) / "qa_sparse_peft" / "merged")

    values["runtime"]["workspace"] = str(tmp_path / "killed")
    recipe.write_text(yaml.safe_dump(values))
    draw = random.Random(seed)
    for _ in range(6):
        process = subprocess.Popen(
            _command(recipe), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(timeout=duration * draw.uniform(0.2, 0.9))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    subprocess.run(_command(recipe), check=True, env=environment, capture_output=True)
    merged = tmp_path / "killed" / "qa_sparse_peft" / "merged"
    assert _weights(merged) == whole
    report = json.loads((merged.parent / "report.json").read_text())
    assert report["certificate"]["passed"]


def _weights(directory: Path) -> dict[str, str]:
    return {name: digest for name, digest in digest_files(directory).items() if name.endswith(".safetensors")}
