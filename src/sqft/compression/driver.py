"""The loop over blocks of sparsify_model and quantize_model; an interrupted run goes on where it was."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sqft.artifacts import digest_json
from sqft.compression.processes import is_alone
from sqft.compression.reports import LayerReport, warn_few_tokens
from sqft.compression.statistics import Hessian, SingularHessianError
from sqft.compression.walk import BlockWalk, InputGroup, digest_tensor
from sqft.errors import CompressionError
from sqft.models import CheckpointWriter
from sqft.progress import Progress

__all__ = ["Task", "compress_blocks", "weight_of"]

STATE = "resume.safetensors"


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
    the same settings, calibration and library version goes on after it, with the same bits.
    """
    path = writer.directory / STATE
    sources = sorted(writer.source.directory.glob("*.safetensors"))
    key = digest_json(
        task.key
        | {
            "source": [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sources],
            "calibration": None if calibration is None else digest_tensor(calibration),
            "versions": [torch.__version__, torch.get_num_threads(), str(walk.device), str(walk.dtype)],
        }
    )
    reports = _resume(walk, path, key)
    done = {report.name for report in reports}
    writer.mark_written(done)
    last = next(reversed(walk.blocks))
    with progress.task(task.description, len(walk.blocks)) as advance:
        for name in walk.blocks:
            modules = {n: walk.model.get_submodule(n) for n in task.linears if n.startswith(name + ".")}
            if name in _finished_blocks(path, key):
                advance(1)
                continue
            walk.load(name)
            for group in _groups(walk, name, modules, task):
                reports += [_compress(task, group, linear, modules[linear]) for linear in group.names]
            if task.finish_block is not None:
                task.finish_block(name)
            walk.advance(name)
            walk.unload(name)
            if is_alone() and name != last:
                blocks = [*_finished_blocks(path, key), name]
                facts = {"key": key, "blocks": json.dumps(blocks)}
                walk.save_state(path, facts | {"reports": json.dumps([r.to_json() for r in reports])})
            advance(1)
    path.unlink(missing_ok=True)
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


def _facts(path: Path, key: str) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            facts = dict(file.metadata() or {})
    except (SafetensorError, OSError):
        return {}
    return facts if facts.get("key") == key else {}


def _finished_blocks(path: Path, key: str) -> list[str]:
    return list(json.loads(_facts(path, key).get("blocks", "[]")))


def _resume(walk: BlockWalk, path: Path, key: str) -> list[LayerReport]:
    facts = _facts(path, key)
    if not facts:
        return []
    walk.load_state(path)
    return [LayerReport(**report) for report in json.loads(facts["reports"])]
