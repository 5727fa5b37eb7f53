"""The compiled kernels under the address and undefined-behaviour sanitizers."""

import subprocess
from pathlib import Path

import pytest

from sqft.kernels.native_build import SOURCES, find_compiler, native_sources

FUZZ = Path(__file__).with_name("fuzz_kernels.c")


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_fuzzed_products(sanitizers: str, tmp_path: Path) -> None:
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("there is no C compiler here")
    program = tmp_path / "fuzz"
    flags = ["-O1", "-g", "-std=c11", "-ffp-contract=off", "-pthread", f"-I{SOURCES}"]
    flags += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    files = [str(path) for path in [*native_sources(), FUZZ] if path.suffix == ".c"]
    made = subprocess.run(
        [compiler, *flags, *files, "-o", str(program), "-lm"], capture_output=True, text=True, check=False
    )
    if made.returncode and "cannot find" in made.stderr:
        pytest.skip("the sanitizers' libraries are not installed")
    assert made.returncode == 0, made.stderr
    for seed in range(3):
        done = subprocess.run([str(program), "300", str(seed)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert int(done.stdout.split()[0]) > 200
