"""The compiled kernels under sanitizers, and those for ARM in an emulator: fuzzed, against the plain ones."""

import shutil
import subprocess
from pathlib import Path

import pytest

from sqft.kernels.native_build import SOURCES, find_compiler, native_sources

FUZZ = Path(__file__).with_name("fuzz_kernels.c")


ARM_COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64-static"  # as Debian calls them


def compile_fuzzer(compiler: str, flags: list[str], program: Path) -> subprocess.CompletedProcess[str]:
    files = [str(path) for path in [*native_sources(), FUZZ] if path.suffix == ".c"]
    command = [compiler, *flags, "-std=c11", "-ffp-contract=off", "-pthread", f"-I{SOURCES}", *files]
    return subprocess.run([*command, "-o", str(program), "-lm"], capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_fuzzed_products(sanitizers: str, tmp_path: Path) -> None:
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("there is no C compiler here")
    program = tmp_path / "fuzz"
    flags = ["-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    made = compile_fuzzer(compiler, flags, program)
    if made.returncode and "cannot find" in made.stderr:
        pytest.skip("the sanitizers' libraries are not installed")
    assert made.returncode == 0, made.stderr
    for seed in range(3):
        done = subprocess.run([str(program), "300", str(seed)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert int(done.stdout.split()[0]) > 200


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which(ARM_COMPILER) and shutil.which(EMULATOR)), reason="no compiler or emulator for ARM"
)
def test_fuzzed_products_on_arm(tmp_path: Path) -> None:
    """One processor with dot products of bytes, one without."""
    program = tmp_path / "fuzz"
    made = compile_fuzzer(ARM_COMPILER, ["-O3", "-static", "-Wall", "-Wextra", "-Werror"], program)
    assert made.returncode == 0, made.stderr
    for processor in ("max", "cortex-a72"):
        command = [EMULATOR, "-cpu", processor, str(program), "600", "1"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert int(done.stdout.split()[0]) > 400
