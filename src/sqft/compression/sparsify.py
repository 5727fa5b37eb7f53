"""Sparsify a model: which weights become zero, block by block."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from sqft.compression.fit import choose_layers
from sqft.compression.magnitude import magnitude_scores
from sqft.compression.reports import LayerReport, check_finite, warn_few_tokens
from sqft.compression.statistics import Hessian, InputNorm
from sqft.compression.walk import BlockWalk, InputGroup
from sqft.compression.wanda import wanda_scores
from sqft.errors import CompressionError
from sqft.models import Checkpoint, CheckpointWriter
from sqft.ops import keep_nonzero, mask_pattern, mask_rows
from sqft.progress import SILENT, Progress
from sqft.sections import SparsifySection

__all__ = ["METHODS", "sparsify_model"]


@dataclass(frozen=True)
class Pruned:
    """A pruned weight (its kept values may be updated), its mask (True = kept), and the damping it took."""

    weight: Float[Tensor, "out in"]
    mask: Bool[Tensor, "out in"]
    damping: float = 0.0


@dataclass(frozen=True)
class Method:
    """A sparsifier: the statistic it wants (None: no calibration), and what it makes of a weight."""

    statistic: Callable[[int, torch.device], Any] | None
    prune: Callable[[Tensor, Any, SparsifySection, float], Pruned]


def _magnitude(weight: Tensor, statistic: None, section: SparsifySection, sparsity: float) -> Pruned:
    return Pruned(weight, choose_mask(magnitude_scores(weight), sparsity, section.pattern))


def _wanda(weight: Tensor, statistic: InputNorm, section: SparsifySection, sparsity: float) -> Pruned:
    return Pruned(weight, choose_mask(wanda_scores(weight, statistic.norm), sparsity, section.pattern))


METHODS: dict[str, Method] = {
    "magnitude": Method(None, _magnitude),
    "wanda": Method(InputNorm, _wanda),
}


def sparsify_model(
    checkpoint: Checkpoint,
    section: SparsifySection,
    calibration: Integer[Tensor, "n length"] | None,
    writer: CheckpointWriter,
    *,
    device: torch.device | str = "cpu",
    progress: Progress = SILENT,
) -> list[LayerReport]:
    """Write the sparse 16-bit model and its masks, one block in memory at a time; close the writer yourself.

    calibration: token ids; None for methods that look at weights only.

    Raises: CompressionError if a layer does not fit the pattern, weights or inputs are not finite, or the
    method needs calibration and has none; ModelError for an unknown module or a split q/k/v or gate/up.
    """
    method = METHODS[section.method]
    linears = choose_layers(checkpoint.skeleton(), checkpoint.linears, section)
    if method.statistic is not None and calibration is None:
        raise CompressionError(f"{section.method} needs calibration texts; give a calibration section")
    walk = BlockWalk(checkpoint, calibration if method.statistic else None, device=device)
    writer.prepare(masked=linears)
    reports: list[LayerReport] = []
    with progress.task(f"sparsify ({section.method})", len(walk.blocks)) as advance:
        for name, modules in blocks_of(walk, linears):
            for group in input_groups(walk, name, modules, method.statistic):
                for linear in group.names:
                    reports.append(
                        _sparsify_linear(walk, group, linear, modules[linear], method, section, writer)
                    )
            walk.advance(name)
            walk.unload(name)
            advance(1)
    return reports


def blocks_of(walk: BlockWalk, linears: list[str]) -> Iterator[tuple[str, dict[str, nn.Module]]]:
    """Load each block in turn; yield its name and those of its linears that are chosen."""
    for name in walk.blocks:
        walk.load(name)
        prefix = name + "."
        yield name, {n: walk.model.get_submodule(n) for n in linears if n.startswith(prefix)}


def input_groups(
    walk: BlockWalk,
    name: str,
    modules: dict[str, nn.Module],
    statistic: Callable[[int, torch.device], Any] | None,
) -> list[InputGroup]:
    """The linears of a block by what they read, with their statistic; one group of all without statistic."""
    if not modules:
        return []
    if statistic is None:
        group = InputGroup(0, lambda columns, device: None, walk.device)
        group.names = list(modules)
        return [group]
    groups = walk.collect(name, modules, statistic)
    if statistic is Hessian:
        for group in groups:
            warn_few_tokens(group.names, group.statistic.num_tokens, group.sample.shape[1])
    return groups


def choose_mask(
    scores: Float[Tensor, "out in"], sparsity: float, pattern: str | None
) -> Bool[Tensor, "out in"]:
    """The mask of the highest scores: N:M with a pattern, else `sparsity` of each row pruned."""
    return mask_rows(scores, sparsity) if pattern is None else mask_pattern(scores, pattern)


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear, without its history."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _sparsify_linear(
    walk: BlockWalk,
    group: InputGroup,
    name: str,
    module: nn.Module,
    method: Method,
    section: SparsifySection,
    writer: CheckpointWriter,
) -> LayerReport:
    started = time.perf_counter()
    dense = weight_of(module)
    check_finite(name, dense)
    pruned = method.prune(dense, group.statistic, section, section.sparsity)
    stored = keep_nonzero(pruned.weight.to(walk.checkpoint.storage_dtype), pruned.mask)
    writer.write_linear(name, stored, mask=pruned.mask)
    module.weight = nn.Parameter(stored.to(dense.dtype), requires_grad=False)
    has_inputs = group.statistic is not None
    return LayerReport(
        name,
        (dense.shape[0], dense.shape[1]),
        1 - float(pruned.mask.sum(dtype=torch.int64)) / pruned.mask.numel(),
        group.error(dense, module.weight) if has_inputs else None,
        pruned.damping,
        group.statistic.num_tokens if has_inputs else 0,
        group.statistic.num_dead if has_inputs else 0,
        time.perf_counter() - started,
    )
