import logging
import os
import signal
import warnings
from pathlib import Path

import pytest
import torch

from sqft.cli import messages, run_command_line
from sqft.cli.messages import RichProgress, catch_termination, quiet_warnings


def test_long_work_leaves_a_line_in_a_log_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "NOTABLE_SECONDS", 0.0)
    with RichProgress() as progress, progress.task("pruning [1]", 3) as advance:
        for _ in range(3):
            advance(1)
    assert "pruning [1]  0 s" in capsys.readouterr().err


def test_short_work_leaves_none_and_bars_nest(capsys: pytest.CaptureFixture[str]) -> None:
    with RichProgress() as progress, progress.task("outer", 1) as outer:
        with progress.task("inner", 0) as inner:
            inner(1)
        outer(1)
    assert capsys.readouterr().err == ""


def test_only_our_own_warnings_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with quiet_warnings():
        warnings.simplefilter("always")
        warnings.warn("theirs", stacklevel=1)
        warnings.warn_explicit("ours\nis one line", UserWarning, messages.__file__, 1)
    assert capsys.readouterr().err == "sqft: warning: ours is one line\n"


def test_log_lines_of_sqft_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with quiet_warnings():
        logging.getLogger("sqft.training").warning("slow")
    assert capsys.readouterr().err == "sqft: WARNING: slow\n"
    assert logging.getLogger("sqft").handlers == []


def test_a_termination_ends_like_an_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt), catch_termination():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_no_memory_left_is_one_line(
    error: BaseException, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("sqft.pipeline.parse_recipe", fail)
    assert run_command_line(["compress", "some/model"]) == 2
    assert capsys.readouterr().err.startswith("sqft: out of memory; lower evaluate.batch_size")


def test_a_defect_stays_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("sqft.pipeline.parse_recipe", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        run_command_line(["compress", "some/model"])


def test_quiet_and_verbose_stand_anywhere(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    logger = logging.getLogger("sqft.test")

    def warn(workspace: Path) -> list[object]:
        logger.warning("a warning")
        with RichProgress() as progress, progress.task("work", 1) as advance:
            advance(1)
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sqft.cli.messages.NOTABLE_SECONDS", 0.0)
        patch.setattr("sqft.pipeline.workspace_status", warn)
        told = {}
        for words in (["status"], ["-q", "status"], ["status", "--quiet"], ["-v", "status"]):
            (tmp_path / "runs").mkdir(exist_ok=True)
            run_command_line([*words, str(tmp_path / "runs")])
            told[tuple(words)] = capsys.readouterr().err
    assert "a warning" in told["status",]
    assert "work  0 s" in told["status",]
    assert told["-q", "status"] == told["status", "--quiet"]
    assert "warning" not in told["-q", "status"]
    assert "work" not in told["-q", "status"]
    assert "a warning" in told["-v", "status"]
