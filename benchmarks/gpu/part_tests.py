"""The tests marked `gpu`, as they stand in the repository; on a CPU, what of them runs there."""

import os
import re
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from typing import Any

from benchmarks.gpu.rows import Rows

__all__ = ["measure"]

FILES = ("tests/kernels/test_tiles.py", "tests/end_to_end/test_gpu.py")
PROCESSES = 8  # on one card: most of the time is Triton's compiler, on the CPU


def measure(rows: Rows) -> None:
    """One row for each file of tests."""
    for path in FILES:
        rows.measure(path, partial(run, path, rows.dry))


def run(path: str, dry: bool) -> dict[str, Any]:
    """How many tests passed; the names of those that did not."""
    command = [sys.executable, "-m", "pytest", path, "-p", "no:cacheprovider", "-rfE", "--tb=line"]
    command += ["-m", "not slow and not gpu", "-x", "-k", "64x64 or sparse_peft"] if dry else ["-m", "gpu"]
    if not dry and find_spec("xdist"):
        command += ["-n", str(PROCESSES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-300:]
    counts = {
        kind: int(count) for count, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)", summary)
    }
    failures = [line[:300] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if not counts.get("passed") or done.returncode:
        counts.setdefault("failed", len(failures) or 1)
    return {"counts": counts, "failures": failures, "summary": summary}
