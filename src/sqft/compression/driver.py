"""The loop over blocks of sparsify_model and quantize_model; an interrupted run goes on where it was."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sqft.artifacts import digest_json
from sqft.compression.processes import is_alone
from sqft.compression.reports import LayerReport, warn_few_tokens
from sqft.compression.statistics import Hessian, SingularHessianError
from sqft.compression.walk import BlockWalk, InputGroup, digest_tensor, read_facts
from sqft.errors import CompressionError
from sqft.models import CheckpointWriter
from sqft.progress import Progress

__all__ = ["Task", "compress_blocks", "weight_of"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """One walk: what to call it, the linears, the statistic (None: no calibration), and what to do with each.

    compress: (group, full name, module) → report; it writes the result and puts it into the module.
    finish_block: called with a block's name after its linears. sequential: gather the statistic of each group
    of linears after the groups before it in the block are compressed. key: what the result depends on.
    """

    description: str
    linears: Sequence[str]
    statistic: Callable[[int, torch.device], Any] | None
    compress: Callable[[InputGroup, str, nn.Module], LayerReport]
    key: dict[str, Any]
    sequential: bool = False
    finish_block: Callable[[str], None] | None = None


def compress_blocks(
    walk: BlockWalk, task: Task, writer: CheckpointWriter, calibration: Tensor | None, progress: Progress
) -> list[LayerReport]:
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
                modules = {n: walk.model.get_submodule(n) for n in task.linears if n.startswith(name + ".")}
                walk.load(name)
                for group in _groups(walk, name, modules, task):
                    reports += [_compress(task, group, linear, modules[linear]) for linear in group.names]
                if task.finish_block is not None:
                    task.finish_block(name)
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


def _compress(task: Task, group: InputGroup, name: str, module: nn.Module) -> LayerReport:
    try:
        return task.compress(group, name, module)
    except SingularHessianError as error:
        raise CompressionError(f"{name}: {error}") from error


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear, without its history."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _groups(walk: BlockWalk, name: str, modules: dict[str, nn.Module], task: Task) -> Any:
    if not modules:
        return
    if task.statistic is None:
        yield InputGroup(list(modules), None, 0, walk.device)
        return
    groups = walk.input_groups(name, modules)
    for part in [[group] for group in groups] if task.sequential else [groups]:
        for found in walk.collect(name, part, task.statistic):
            if isinstance(found.statistic, Hessian):
                warn_few_tokens(found.names, found.statistic.num_tokens, found.sample.shape[1])
            yield found


def _about(
    walk: BlockWalk, task: Task, writer: CheckpointWriter, calibration: Tensor | None
) -> dict[str, str]:
    """What the bits of a result depend on; a state of another run is of no use."""
    sources = sorted(writer.source.directory.glob("*.safetensors"))
    return {
        "settings": digest_json(task.key),
        "model": digest_json([(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sources]),
        "calibration": "none" if calibration is None else digest_tensor(calibration),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "device": str(walk.device),
        "dtype": str(walk.dtype),
    }


def _resume(
    walk: BlockWalk, task: Task, writer: CheckpointWriter, about: dict[str, str]
) -> tuple[list[LayerReport], list[str]]:
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
    reports = [LayerReport.from_json(report) for report in done["reports"]]
    return [r for r in reports if any(r.name.startswith(f"{block}.") for block in finished)], finished


def _replay(walk: BlockWalk, name: str, writer: CheckpointWriter) -> None:
    """Take the hidden states through a finished block, with the weights that were written."""
    block = walk.load(name)
    for inner, module in block.named_modules():
        weight = writer.read_linear(f"{name}.{inner}") if isinstance(module, nn.Linear) else None
        if weight is not None:
            weight = weight.to(device=walk.device, dtype=walk.dtype)
            module.weight = nn.Parameter(weight, requires_grad=False)
    walk.advance(name)
    walk.unload(name)
