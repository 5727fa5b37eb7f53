import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sqft
from sqft import cli
from sqft.cli import run_command_line
from sqft.errors import RecipeError
from sqft.report import write_report
from tests.report.invented import invent_report


def one_line(text: str) -> bool:
    return text.startswith("sqft: ") and text.count("\n") == 1


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["--version"]) == 0
    assert capsys.readouterr().out == f"sqft {sqft.__version__}\n"
    assert run_command_line([]) == 0
    shown = capsys.readouterr().out
    assert all(
        command in shown for command in ("run", "plan", "status", "verify", "inspect", "demo", "doctor")
    )


def test_module_can_be_run() -> None:
    done = subprocess.run([sys.executable, "-m", "sqft", "--version"], capture_output=True, check=True)
    assert done.stdout.decode() == f"sqft {sqft.__version__}\n"


def test_schema_is_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"model", "sparsify", "quantize", "adapters"} <= schema["properties"].keys()


def test_doctor_names_versions_and_extras(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("torch", "memory", "disk", "openvino", "lm-evaluation-harness"))


def test_doctor_says_which_kernels_there_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown() -> str:
        assert run_command_line(["doctor"]) == 0
        return capsys.readouterr().out

    monkeypatch.setattr("sqft.kernels.native_build.find_library", lambda: Path("sqft_cpu.so"))
    monkeypatch.setattr("sqft.kernels.packed_matrix.instruction_set", lambda: "avx2")
    assert "avx2, sqft_cpu.so" in shown()
    monkeypatch.setattr("sqft.kernels.packed_matrix.instruction_set", lambda: None)
    assert "sqft_cpu.so cannot be used" in shown()
    monkeypatch.setattr("sqft.kernels.native_build.find_library", lambda: None)
    monkeypatch.setattr("sqft.kernels.native_build.find_compiler", lambda: "/usr/bin/gcc")
    assert "none yet; /usr/bin/gcc compiles them" in shown()
    monkeypatch.setattr("sqft.kernels.native_build.find_compiler", lambda: None)
    assert "they need gcc or clang" in shown()
    monkeypatch.setattr("sqft.cli.doctor._version", lambda name: "1")
    assert "and 1 is installed" in shown()


def test_doctor_says_how_to_get_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqft.cli.doctor._found", lambda module: False)
    assert run_command_line(["doctor"]) == 0
    assert "pip install 'sqft[eval]'" in capsys.readouterr().out


def test_status_shows_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(invent_report(), tmp_path / "mine")
    assert run_command_line(["status", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "mine" in shown
    assert "certificate passed" in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ["fly"],
        ["run"],
        ["run", "missing.yaml"],
        ["run", "--fast"],
        ["plan", "missing.yaml"],
        ["status", "missing"],
        ["verify", "missing"],
        ["verify", ".", "--base", "."],
        ["verify", "."],
        ["inspect", "missing"],
        ["export", ".", "--to", "gguf", "--output", "model.gguf"],
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command_line(arguments) == 2
    shown = capsys.readouterr()
    assert one_line(shown.err)
    assert shown.out == ""


def test_an_unknown_option_points_at_the_help_of_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["bench", ".", "--tokens", "8"]) == 2
    assert capsys.readouterr().err.endswith("; try 'sqft bench --help'\n")
    assert run_command_line(["fly"]) == 2
    assert capsys.readouterr().err == "sqft: No such command 'fly'; try 'sqft --help'\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RecipeError("two\nlines"), 2, "sqft: two lines\n"),
        (KeyboardInterrupt(), 130, "sqft: interrupted; the same command goes on where it stopped\n"),
        (PermissionError(13, "Permission denied", "/x"), 2, "sqft: /x: Permission denied\n"),
        (OSError(28, "No space left on device"), 2, "sqft: No space left on device\n"),
    ],
)
def test_errors_become_one_line(
    error: BaseException,
    code: int,
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("sqft.pipeline.recipe_file.recipe_schema", fail)
    assert run_command_line(["schema"]) == code
    assert capsys.readouterr().err == line


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("sqft.pipeline.recipe_file.recipe_schema", fail)
    with pytest.raises(ZeroDivisionError):
        run_command_line(["schema"])


def test_a_closed_pipe_is_no_error() -> None:
    script = f"{sys.executable} -m sqft schema | head -c 10"
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=False)
    assert done.stdout == b'{\n  "$defs'
    assert done.stderr == b""


def test_exit_codes_reach_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sqft", "fly"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2


def test_it_works_uninstalled(tmp_path: Path) -> None:
    """From the source alone, where no installed package says its version."""
    script = """
import importlib.metadata, sys
found = importlib.metadata.version
def version(name):
    if name == "sqft":
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)
importlib.metadata.version = version
from sqft.cli import run_command_line
import sqft.pipeline.runner as runner
assert runner.environment("cpu")["sqft"]
sys.exit(run_command_line(["--version"]))
"""
    source = str(Path(__file__).parents[2] / "src")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, *sys.path])}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("sqft ")


@pytest.mark.parametrize("words", [["plan", "~/none.yaml"], ["inspect", "--json", "~/none"]])
def test_home_is_written_out(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_command_line(words) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    assert cli._expand_home("--output=~/x") == f"--output={tmp_path}/x"
    assert cli._expand_home("data.answer=~/x") == "data.answer=~/x"  # a text may begin so; paths expand it
