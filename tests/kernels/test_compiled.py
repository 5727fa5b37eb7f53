"""The kernels compile for GPUs that are not there, and fit into registers and shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
KERNELS = "_weight_kernel", "_gradient_kernel"
SHARED_BYTES = {80: 166912, 90: 232448}  # what one program may use on an A100, on an H100


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_every_cut_compiles(capability: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), *sys.path])
    script = str(Path(__file__).with_name("compile_kernels.py"))
    command = [sys.executable, script, str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) > 10
    for kernel in found:
        assert kernel["shared_bytes"] <= SHARED_BYTES[capability], kernel
        exact = "ieee" in kernel["tiling"] and kernel["kernel"] == "_weight_kernel"
        assert kernel["tensor_cores"] != exact, kernel
    # A few words on the stack beside 255 registers do no harm. The cuts are made for an H100; on an A100 some
    # do not fit, and lose when they are measured.
    for name in KERNELS:
        cuts = [kernel for kernel in found if kernel["kernel"] == name]
        spilled = [kernel for kernel in cuts if kernel["stack_bytes"] > 128]
        assert cuts, name
        assert len(spilled) <= (0 if capability == 90 else len(cuts) // 2), spilled
