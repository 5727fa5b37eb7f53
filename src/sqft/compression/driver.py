"""The loop over blocks of all that compresses; an interrupted run goes on where it was."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Generic, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sqft.artifacts import digest_json
from sqft.compression.inputs import InputGroup
from sqft.compression.processes import is_alone
from sqft.compression.reports import LayerReport, warn_few_tokens
from sqft.compression.statistics import Hessian, SingularHessianError
from sqft.compression.walk import BlockWalk, digest_tensor, read_facts
from sqft.errors import CompressionError
from sqft.models import Checkpoint, CheckpointWriter
from sqft.progress import Progress

__all__ = ["LinearWork", "Task", "compress_blocks", "digest_of_files", "weight_of"]

logger = logging.getLogger(__name__)


class Report(Protocol):
    """What a task has to say of a block, or of a part of one."""

    @property
    def name(self) -> str:
        """The full name of the block, or of its part."""

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""


AnyReport = TypeVar("AnyReport", bound=Report)


@dataclass(frozen=True)
class Task(Generic[AnyReport]):
    """One walk: what to call it, and what to do with each block.

    compress: called with the name of a block that is loaded; it writes the result and puts it into the block.
    key: what the result depends on. read_report: undoes `to_json` of its reports.
    """

    description: str
    compress: Callable[[str], list[AnyReport]]
    key: dict[str, Any]
    read_report: Callable[[dict[str, Any]], AnyReport]


@dataclass(frozen=True)
class LinearWork:
    """What a task does with a block where it is done linear by linear.

    statistic: of the inputs (None: no calibration). compress: (group, full name, module) → report; it writes
    the result and puts it into the module. finish_block: called with a block's name after its linears.
    sequential: gather the statistic of each group of linears after the groups before it in the block are
    compressed.
    """

    walk: BlockWalk
    linears: Sequence[str]
    statistic: Callable[[int, torch.device], Any] | None
    compress: Callable[[InputGroup, str, nn.Module], LayerReport]
    sequential: bool = False
    finish_block: Callable[[str], None] | None = None

    def __call__(self, name: str) -> list[LayerReport]:
        """Compress the linears of a block."""
        modules = {n: self.walk.model.get_submodule(n) for n in self.linears if n.startswith(name + ".")}
        reports = [
            self._compress(group, linear, modules[linear])
            for group in self._groups(name, modules)
            for linear in group.names
        ]
        if self.finish_block is not None:
            self.finish_block(name)
        return reports

    def _compress(self, group: InputGroup, name: str, module: nn.Module) -> LayerReport:
        try:
            return self.compress(group, name, module)
        except SingularHessianError as error:
            raise CompressionError(f"{name}: {error}") from error

    def _groups(self, name: str, modules: dict[str, nn.Module]) -> Iterator[InputGroup]:
        if not modules:
            return
        if self.statistic is None:
            yield InputGroup(list(modules), None, 0, self.walk.device)
            return
        groups = self.walk.input_groups(name, modules)
        for part in [[group] for group in groups] if self.sequential else [groups]:
            for found in self.walk.collect(name, part, self.statistic):
                if isinstance(found.statistic, Hessian):
                    warn_few_tokens(found.names, found.statistic.num_tokens, found.sample.shape[1])
                yield found


def compress_blocks(
    walk: BlockWalk,
    task: Task[AnyReport],
    writer: CheckpointWriter,
    calibration: Tensor | None,
    progress: Progress,
) -> list[AnyReport]:
    """Compress block after block.

    After each block the hidden states are kept beside the weights, so that a run on the same directory with
    the same settings, calibration, threads and library version goes on after it, with the same bits. What it
    goes on from is proven by digests: a block that the files do not hold any more, and all after it, are
    done again.
    """
    about = _about(walk, task, writer, calibration)
    reports, finished = _resume(walk, task, writer, about)
    last = next(reversed(walk.blocks))
    with progress.task(task.description, len(walk.blocks)) as advance:
        for name in walk.blocks:
            if name not in finished:
                walk.load(name)
                reports += task.compress(name)
                walk.advance(name)
                walk.unload(name)
                finished.append(name)
                if is_alone():
                    writer.sync()
                    done = {
                        "blocks": finished,
                        "reports": [report.to_json() for report in reports],
                        "digests": writer.digests,
                    }
                    facts = {"about": json.dumps(about), "done": json.dumps(done)}
                    walk.save_state(writer.state_path, facts, hidden=name != last)
            advance(1)
    return reports


def digest_of_files(checkpoint: Checkpoint) -> str:
    """What tells an edited model from the one before, without reading it."""
    paths = sorted(checkpoint.directory.glob("*.safetensors"))
    return digest_json([(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in paths])


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear, without its history."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _about(
    walk: BlockWalk, task: Task[AnyReport], writer: CheckpointWriter, calibration: Tensor | None
) -> dict[str, str]:
    """What the bits of a result depend on; a state of another run is of no use."""
    return {
        "settings": digest_json(task.key),
        "model": digest_of_files(writer.source),
        "calibration": "none" if calibration is None else digest_tensor(calibration),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "device": str(walk.device),
        "dtype": str(walk.dtype),
    }


def _resume(
    walk: BlockWalk, task: Task[AnyReport], writer: CheckpointWriter, about: dict[str, str]
) -> tuple[list[AnyReport], list[str]]:
    """(reports, finished blocks) of an interrupted run, whose hidden states the walk takes over."""
    path = writer.state_path
    if not (path.is_file() and is_alone()):
        return [], []
    try:
        facts = read_facts(path)
        before, done = json.loads(facts["about"]), json.loads(facts["done"])
    except (SafetensorError, OSError, KeyError, ValueError):
        logger.warning("%s cannot be read; the interrupted run it is of starts over", path)
        return [], []
    changed = [name for name, value in about.items() if before.get(name) != value]
    if changed:
        what = ", ".join(changed)
        logger.warning("%s is of a run with other %s; it cannot go on, and starts over", path, what)
        return [], []
    finished = list(takewhile(lambda block: writer.take_over(block, done["digests"]), done["blocks"]))
    lost = done["blocks"][len(finished) :]
    if lost:
        logger.warning(
            "%s no longer holds %s as it was written; from there on it is done again",
            writer.directory,
            lost[0],
        )
    if len(finished) < len(walk.blocks) and (lost or not walk.load_state(path)):
        if not lost:
            logger.warning("%s is damaged; its hidden states are computed again", path)
        for name in finished:
            _replay(walk, name, writer)
    reports = [task.read_report(report) for report in done["reports"]]
    return [r for r in reports if any(f"{r.name}.".startswith(f"{block}.") for block in finished)], finished


def _replay(walk: BlockWalk, name: str, writer: CheckpointWriter) -> None:
    """Take the hidden states through a finished block, with the weights that were written."""
    block = walk.load(name)
    for inner, _ in list(block.named_parameters()):
        value = writer.read_written(f"{name}.{inner}")
        if value is not None:
            walk.replace(f"{name}.{inner}", value)
    walk.advance(name)
    walk.unload(name)
