"""What the last release wrote still opens: `release_0_1_0` was made by its code, from a tiny random model."""

import shutil
from pathlib import Path

import pytest

from sqft.artifacts import MANIFEST
from sqft.cli import run_command_line
from sqft.models import load_model
from sqft.pipeline import workspace_status

RELEASE = Path(__file__).with_name("release_0_1_0")


def stage(workspace: Path, name: str) -> Path:
    (found,) = (workspace / "stages").glob(f"{name}-*")
    return found


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RELEASE, tmp_path / "runs"))


def test_its_model_verifies_from_its_files_and_from_base_and_adapter(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = stage(workspace, "merge")
    assert run_command_line(["verify", str(merged)]) == 0
    base, adapter = stage(workspace, "quantize"), stage(workspace, "search") / "adapter"
    assert run_command_line(["verify", str(merged), "--base", str(base), "--adapter", str(adapter)]) == 0
    assert capsys.readouterr().out.count(" 0 failed") == 2


def test_a_changed_code_of_its_model_is_still_found(workspace: Path) -> None:
    weights = stage(workspace, "merge") / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    assert run_command_line(["verify", str(weights.parent)]) == 1


def test_its_stages_are_finished_ones(workspace: Path) -> None:
    rows = workspace_status(workspace)
    assert [(row.name, row.finished) for row in rows] == [
        ("merge", True),
        ("quantize", True),
        ("search", True),
    ]
    assert all(row.elapsed_seconds > 0 for row in rows)


def test_a_stage_without_its_manifest_is_refused_in_one_line(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = stage(workspace, "merge")
    (merged / MANIFEST).write_text("{")
    assert run_command_line(["status", str(workspace)]) == 2
    told = capsys.readouterr().err.strip()
    assert len(told.splitlines()) == 1
    assert "delete" in told


def test_its_model_runs(workspace: Path) -> None:
    model = load_model(stage(workspace, "merge"))
    assert model.num_parameters() > 0
