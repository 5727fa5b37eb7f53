"""torchrun and accelerate, with two processes on the CPU: what one process makes, and on after a kill."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": [
        # --multi_gpu stands for several processes; with --cpu alone accelerate starts one
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    ],
}
ROOT = Path(__file__).parents[2]
SOURCE, EXAMPLE = ROOT / "src", ROOT / "examples" / "fsdp.py"


@pytest.fixture
def write_recipe(
    recipe_values: Callable[..., dict[str, Any]], tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> Callable[..., Path]:
    """A recipe with elastic ranks, dropout, two micro-batches a step, and a workspace of its own."""

    def write(workspace: str, method: str = "qa_sparse_peft", **train: Any) -> Path:
        values = recipe_values(method, tiny_model_dir("llama"))
        values["adapters"]["dropout"] = 0.1
        values["train"] |= {"gradient_accumulation": 2, "learning_rate": 1e-3, "eval_steps": 3, **train}
        values["search"] = {"method": "median"}
        values["evaluate"]["models"] = ["merged"]
        values["runtime"]["workspace"] = str(tmp_path / workspace)
        path = tmp_path / f"{workspace}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def command(recipe: Path, launcher: str | None = None) -> list[str]:
    started = ["-m", *LAUNCHERS[launcher]] if launcher else []
    return [sys.executable, *started, "-m", "sqft", "run", str(recipe)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCE)}


def run(recipe: Path, launcher: str | None = None) -> str:
    done = subprocess.run(
        command(recipe, launcher), env=environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def adapter(recipe: Path) -> dict[str, torch.Tensor]:
    (directory,) = (recipe.with_suffix("") / "stages").glob("train-*/adapter")
    return load_file(directory / "adapter_model.safetensors")


def losses(recipe: Path) -> list[float]:
    (path,) = (recipe.with_suffix("") / "stages").glob("train-*/metrics.jsonl")
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


def test_two_processes_train_what_one_does(write_recipe: Callable[..., Path]) -> None:
    """Sums in another order alone: a step's gradients agree to float32's rounding, six steps a bit less."""
    alone = write_recipe("alone")
    shown = run(alone)
    assert "certificate: passed" in shown
    for launcher in LAUNCHERS:
        together = write_recipe(launcher)
        shown = run(together, launcher)
        assert shown.count("certificate: passed") == 1  # told by one process
        assert losses(together) == pytest.approx(losses(alone), rel=1e-4)
        expected, found = adapter(alone), adapter(together)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_one_of_them_is_killed(write_recipe: Callable[..., Path]) -> None:
    """The launcher ends the others; the same command goes on, to the same bits."""
    whole, killed = (write_recipe(name, max_steps=30, eval_steps=0) for name in ("whole", "killed"))
    run(whole, "torchrun")
    launcher = subprocess.Popen(
        command(killed, "torchrun"), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    stages = killed.with_suffix("") / "stages"
    deadline = time.monotonic() + 300
    while not list(stages.glob("train-*.partial/checkpoints/checkpoint-[4-9]/complete.json")):
        assert launcher.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(worker(launcher.pid, rank=1), signal.SIGKILL)
    assert launcher.wait(timeout=120) != 0
    assert list(stages.glob("train-*.partial"))
    run(killed, "torchrun")
    assert losses(killed) == losses(whole)
    expected, found = adapter(whole), adapter(killed)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    (record,) = stages.glob("train-*/training.json")
    assert json.loads(record.read_text())["resumed"]


def worker(launcher: int, rank: int) -> int:
    """The process of a launch with this rank."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            settings = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == launcher and f"RANK={rank}".encode() in settings:
            return int(path.name)
    raise AssertionError(f"no process of rank {rank}")


def test_fsdp2_in_a_loop_of_ones_own(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """examples/fsdp.py through both launchers: the steps of one process on both batches."""
    from sqft.adapters import SearchSpace, set_ranks
    from sqft.cli import run_command_line
    from sqft.compression import sparsify_model
    from sqft.models import CheckpointWriter, load_tokenizer, open_checkpoint
    from sqft.sections import SparsifySection

    fsdp = runpy.run_path(str(EXAMPLE))
    source, sparse = open_checkpoint(tiny_model_dir("llama")), tmp_path / "sparse"
    writer = CheckpointWriter(sparse, source)
    sparsify_model(source, SparsifySection(method="magnitude", sparsity=0.5), None, writer)
    writer.close()
    for launcher, started in LAUNCHERS.items():
        program = [sys.executable, "-m", *started, str(EXAMPLE), str(sparse), str(tmp_path / launcher)]
        done = subprocess.run(
            program, env=environment(), capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    model, tokenizer = fsdp["build"](str(sparse), "cpu"), load_tokenizer(sparse)
    space = SearchSpace.of(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    for step in range(4):
        set_ranks(model, space.ranks_at(seed=0, step=step))
        for text in fsdp["TEXTS"]:
            batch = tokenizer(text, return_tensors="pt")
            (model(**batch, labels=batch["input_ids"]).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "alone")
    expected = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    for launcher in LAUNCHERS:
        found = load_file(tmp_path / launcher / "adapter_model.safetensors")
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    merge = ["merge", "--base", str(sparse), "--adapter", str(tmp_path / "torchrun")]
    assert run_command_line([*merge, "--output", str(tmp_path / "merged")]) == 0
