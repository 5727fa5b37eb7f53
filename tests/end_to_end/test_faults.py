"""A short round of faults: kills, power cuts, torn files, full disks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("seconds", "seed"), [(10, 1), pytest.param(600, 2, marks=pytest.mark.slow)])
def test_every_fault_ends_with_the_same_bits_or_one_line(seconds: int, seed: int, tmp_path: Path) -> None:
    output = tmp_path / "faults.json"
    command = [sys.executable, "-m", "benchmarks.faults", "--seconds", str(seconds), "--seed", str(seed)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, "--threads", "1", "--json", str(output)],
        cwd=ROOT, env=environment, check=True, capture_output=True,
    )  # fmt: skip
    results = json.loads(output.read_text())["results"]
    assert sum(result["tries"] for result in results.values()) > 0
    assert [bad for result in results.values() for bad in result["bad"]] == []
