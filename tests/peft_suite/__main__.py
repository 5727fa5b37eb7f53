"""Fetch PEFT's source distribution of the installed version, and run its tests on SQFT's configurations.

python -m tests.peft_suite [ARGUMENTS OF PYTEST]
"""

import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

from tests.peft_suite.cases import FILES

ROOT = Path(__file__).parents[2]


def fetch_tests(directory: Path) -> Path:
    """The folder of PEFT's tests, fetched from the package index unless it is there already."""
    name = f"peft-{version('peft')}"
    tests = directory / name / "peft_tests"  # not "tests": that is the name of our own package
    if not tests.is_dir():
        directory.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
        subprocess.run([*command, "--dest", str(directory), name.replace("-", "==")], check=True)
        with tarfile.open(directory / f"{name}.tar.gz") as archive:
            archive.extractall(directory, filter="data")
        (directory / name / "tests" / "__init__.py").touch()  # its modules import each other relatively
        (directory / name / "tests").rename(tests)
    return tests


def main(arguments: list[str]) -> int:
    """Run pytest on PEFT's files."""
    tests = fetch_tests(ROOT / "runs" / "peft")
    files = [str(tests / file) for file in FILES]
    chosen = [a for a in arguments if a.endswith(".py")]
    command = [sys.executable, "-m", "pytest", "-p", "tests.peft_suite.plugin", "-q"]
    command += ["-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tests.parent)]
    command += [str(tests / a) for a in chosen] or files
    command += [a for a in arguments if a not in chosen]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.run(command, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
