"""What happened at each optimizer step, kept so that a resumed training has the whole record."""

import hashlib
import json
import logging
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sqft.artifacts import digest_files, seal, sync_path, sync_tree, unseal, write_json
from sqft.launch import launched_processes

__all__ = [
    "Journal",
    "StepRecord",
    "TrainingRecord",
    "describe_steps",
    "environment",
    "peak_bytes",
    "reset_peak",
]

logger = logging.getLogger(__name__)
STEPS = "steps.jsonl"
SHOWN_STEPS = 10  # that the figures beside the bar are taken over
MARKER = "complete.json"
PREFIX = "checkpoint-"


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step: its loss in nats a counted token, the rank of each group, and its wall time.

    eval_loss: on items that are not trained on, after the steps at which it was measured; not in `seconds`.
    distillation_loss: the weighted part that comes from a teacher, not in `loss`; None without one.
    """

    step: int
    loss: float
    ranks: list[int]
    seconds: float
    tokens: int
    eval_loss: float | None = None
    distillation_loss: float | None = None


@dataclass
class TrainingRecord:
    """A training: the rank groups, every step, the peak memory, and where it was resumed.

    resumed: one entry for each resume, {"step": the step it went on from, "differences": what differs in the
    environment since the checkpoint was written, by name: [then, now]}. kept_step: the step whose weights the
    training ended with. stopped_early: whether it ended because the loss on held-out items fell no more.
    """

    groups: list[str]
    steps: list[StepRecord] = field(default_factory=list)
    peak_bytes: int = 0
    resumed: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    kept_step: int | None = None
    stopped_early: bool = False

    @property
    def losses(self) -> list[float]:
        """The loss of each optimizer step."""
        return [step.loss for step in self.steps]

    @property
    def seconds(self) -> float:
        """Wall time of all steps, those before a resume included."""
        return sum(step.seconds for step in self.steps)

    def as_dict(self) -> dict[str, Any]:
        """Everything, as plain values for JSON."""
        return asdict(self)

    def summary(self) -> dict[str, Any]:
        """The main figures, for the report."""
        tokens = sum(step.tokens for step in self.steps)
        last = self.losses[-max(1, len(self.steps) // 10) :]
        return {
            "num_steps": len(self.steps),
            "first_loss": self.losses[0] if self.steps else None,
            "last_loss": sum(last) / len(last) if last else None,
            "eval_curve": [(step.step, step.eval_loss) for step in self.steps if step.eval_loss is not None],
            "kept_step": self.kept_step,
            "stopped_early": self.stopped_early,
            "seconds": self.seconds,
            "tokens": tokens,
            "tokens_per_second": tokens / self.seconds if self.seconds else None,
            "peak_bytes": self.peak_bytes,
            "resumed": self.resumed,
        }


def describe_steps(steps: list[StepRecord]) -> str:
    """How a training goes, in a few words: loss and tokens a second, over its last steps."""
    last = steps[-SHOWN_STEPS:]
    seconds = sum(step.seconds for step in last)
    speed = f", {sum(step.tokens for step in last) / seconds:.0f} tokens/s" if seconds else ""
    learnt = [step.distillation_loss for step in last if step.distillation_loss is not None]
    taught = f", teacher's {sum(learnt) / len(learnt):.3f}" if learnt else ""
    measured = [step.eval_loss for step in steps if step.eval_loss is not None]
    held_out = f", eval loss {measured[-1]:.3f} (best {min(measured):.3f})" if measured else ""
    return f"loss {sum(step.loss for step in last) / len(last):.3f}{taught}{held_out}{speed}"


class Journal:
    """The files beside the checkpoints: one line a step, and a marker in each finished checkpoint.

    metrics: a file of one line a step for people and programs that watch; a resumed training cuts off the
    steps that it repeats. writes: whether this process is the one that writes, where several train together.
    """

    def __init__(self, directory: Path, metrics: Path | None = None) -> None:
        self.directory = directory
        self.metrics = metrics
        self.steps_path = directory / STEPS
        self.writes = os.environ.get("RANK", "0") == "0"

    def append(self, step: StepRecord, *, rate: float = 0.0) -> None:
        """Write one step to disk. rate: the learning rate that it was made with."""
        with self.steps_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(step)) + "\n")
        if self.metrics is not None:
            figures = {
                "step": step.step,
                "loss": step.loss,
                "learning_rate": rate,
                "tokens": step.tokens,
                "seconds": step.seconds,
            }
            for name in ("eval_loss", "distillation_loss"):
                if getattr(step, name) is not None:
                    figures[name] = getattr(step, name)
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(figures) + "\n")

    def keep(self, last: int) -> list[StepRecord]:
        """Return the steps up to and including `last`; the file loses later ones and a torn last line."""
        steps = [StepRecord(**json.loads(line)) for line in self._lines(last)]
        if not self.writes:
            return steps
        temporary = self.steps_path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(asdict(step)) + "\n" for step in steps), encoding="utf-8")
        temporary.replace(self.steps_path)
        if self.metrics is not None and self.metrics.exists():
            lines = self.metrics.read_bytes().splitlines(keepends=True)
            self.metrics.write_bytes(b"".join(lines[: len(steps)]))
        return steps

    def mark(self, step: int, facts: dict[str, Any]) -> None:
        """Mark the checkpoint of a step as whole, with digests of its files and of the steps up to it.

        Everything is synced to the disk before the marker is written.
        """
        checkpoint = self._checkpoint(step)
        sync_tree(checkpoint)
        sync_path(self.steps_path)
        proof = {"files": digest_files(checkpoint), "steps": self._digest_steps(step)}
        write_json(checkpoint / MARKER, seal(facts | {"proof": proof}))

    def checkpoints(self) -> dict[int, tuple[Path, dict[str, Any] | None]]:
        """Checkpoint directories by step, with their marker's facts, or None for one that is not whole."""
        steps = [
            path.name.removeprefix(PREFIX) for path in self.directory.glob(f"{PREFIX}*") if path.is_dir()
        ]
        found = sorted(int(step) for step in steps if step.isdecimal())
        return {step: (self._checkpoint(step), self._facts(step)) for step in found}

    def _facts(self, step: int) -> dict[str, Any] | None:
        """The facts in a checkpoint's marker; None if checkpoint or steps do not match its digests."""
        marker = self._checkpoint(step) / MARKER
        if not marker.exists():
            return None
        try:
            facts = unseal(json.loads(marker.read_bytes()))
        except (ValueError, RecursionError):
            changed: Path | None = marker
        else:
            changed = self._changed_since(step, facts.pop("proof", {}))
        if changed is None:
            return facts
        logger.warning("%s is not as it was written; the training goes on from before it", changed)
        return None

    def _changed_since(self, step: int, proof: dict[str, Any]) -> Path | None:
        """The first file whose digest differs from the one in a step's marker; None if all agree."""
        checkpoint = self._checkpoint(step)
        found = digest_files(checkpoint)
        for name, digest in proof.get("files", {}).items():
            if found.get(name) != digest:
                return checkpoint / name
        return self.steps_path if proof.get("steps") != self._digest_steps(step) else None

    def _checkpoint(self, step: int) -> Path:
        return self.directory / f"{PREFIX}{step}"

    def _lines(self, last: int) -> list[bytes]:
        return self.steps_path.read_bytes().splitlines()[:last] if self.steps_path.exists() else []

    def _digest_steps(self, last: int) -> str:
        return hashlib.sha256(b"\n".join(self._lines(last))).hexdigest()


def environment(model: torch.nn.Module, device: torch.device) -> dict[str, str]:
    """What must be equal for a resume to be bit-identical: device kind, threads, processes, versions."""
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")}
    return {
        "device": f"{device.type} {name}",
        "threads": str(torch.get_num_threads()),
        "number of processes": str(launched_processes()),
        "dtype": "+".join(dtypes),
    } | versions


def reset_peak(device: torch.device) -> None:
    """Start counting peak memory anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # without it, the peak covers the process's whole life


def peak_bytes(device: torch.device) -> int:
    """Peak memory since `reset_peak`: of the device, or of this process on a CPU (0 where unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0
