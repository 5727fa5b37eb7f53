"""Sparsify a model: which weights become zero, block by block."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from sqft.compression.budget import arithmetic_offsets, outlier_offsets, outlier_ratios, share_out
from sqft.compression.compressed import Pruned
from sqft.compression.driver import LinearWork, Task, compress_blocks, weight_of
from sqft.compression.inputs import InputGroup
from sqft.compression.magnitude import magnitude_scores
from sqft.compression.obs import obs_pass
from sqft.compression.refine import fit_kept_weights, swap_mask
from sqft.compression.reports import LayerReport, check_finite, warn_damping
from sqft.compression.ria import ria_scores
from sqft.compression.selection import check_not_quantized, choose_layers
from sqft.compression.sparsegpt import sparsegpt
from sqft.compression.statistics import DenseTargetHessian, Hessian, InputNorm
from sqft.compression.walk import BlockWalk
from sqft.compression.wanda import wanda_scores
from sqft.errors import CompressionError
from sqft.models import Checkpoint, CheckpointWriter, outline_skeleton
from sqft.ops import keep_nonzero, mask_pattern, mask_rows
from sqft.ops.adapted import exact_float32
from sqft.ops.mask import existing_mask
from sqft.ops.pattern import parse_pattern
from sqft.progress import SILENT, Progress
from sqft.sections import SparsifySection

__all__ = ["METHODS", "sparsify_model"]


@dataclass(frozen=True)
class Method:
    """A sparsifier: the statistic it wants (None: no calibration), and what it makes of a weight.

    updates: what it keeps makes up for what it prunes, with values that are right for its own mask only.
    """

    statistic: Callable[[int, torch.device], Any] | None
    prune: Callable[[Tensor, Any, SparsifySection, float], Pruned]
    updates: bool = False


def _magnitude(weight: Tensor, statistic: Any, section: SparsifySection, sparsity: float) -> Pruned:
    return Pruned(weight, choose_mask(magnitude_scores(weight), sparsity, section.pattern))


def _wanda(weight: Tensor, statistic: Any, section: SparsifySection, sparsity: float) -> Pruned:
    return Pruned(weight, choose_mask(wanda_scores(weight, statistic.norm), sparsity, section.pattern))


def _ria(weight: Tensor, statistic: Any, section: SparsifySection, sparsity: float) -> Pruned:
    return Pruned(weight, choose_mask(ria_scores(weight, statistic.norm), sparsity, section.pattern))


def _sparsegpt(weight: Tensor, statistic: Hessian, section: SparsifySection, sparsity: float) -> Pruned:
    return sparsegpt(weight, statistic, sparsity=sparsity, pattern=section.pattern, damping=section.damping)


METHODS: dict[str, Method] = {
    "magnitude": Method(None, _magnitude),
    "ria": Method(InputNorm, _ria),
    "sparsegpt": Method(Hessian, _sparsegpt, updates=True),
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
    spill: bool = False,
) -> list[LayerReport]:
    """Write the sparse 16-bit model and its masks, one block in memory at a time; close the writer yourself.

    calibration: token ids; None for methods that look at weights only. spill: keep the calibration's hidden
    states in memory-mapped files beside the weights.

    Raises: CompressionError if a layer does not fit the pattern, weights or inputs are not finite, or the
    method needs calibration and has none; ModelError for an unknown module or a split q/k/v or gate/up.
    """
    statistic = needed_statistic(section)
    check_not_quantized(checkpoint)
    linears = choose_layers(outline_skeleton(checkpoint.skeleton()), section)
    if (statistic is not None or section.budget == "owl") and calibration is None:
        raise CompressionError(f"{section.method} needs calibration texts; give a calibration section")
    spill_dir = writer.directory / "activations" if spill else None
    sparsities = _sparsities(checkpoint, section, linears, calibration, device, spill_dir)
    with BlockWalk(
        checkpoint,
        calibration if statistic else None,
        device=device,
        dense_stream=section.dense_targets,
        spill_dir=spill_dir,
    ) as walk:
        writer.prepare(masked=linears)

        def compress(group: InputGroup, name: str, module: nn.Module) -> LayerReport:
            return _sparsify_linear(walk, group, name, module, section, sparsities[name], writer)

        work = LinearWork(walk, linears, statistic, compress, section.sequential)
        key = {"sparsify": section.model_dump(mode="json")}
        task = Task(f"sparsify ({section.method})", work, key, LayerReport.from_json)
        return compress_blocks(walk, task, writer, calibration, progress)


def needed_statistic(section: SparsifySection) -> Callable[[int, torch.device], Any] | None:
    """The statistic that a method and its refinements want; None if weights are all they look at."""
    if section.dense_targets:
        return DenseTargetHessian
    return Hessian if section.swaps or section.refit else METHODS[section.method].statistic


def choose_mask(
    scores: Float[Tensor, "out in"], sparsity: float, pattern: str | None
) -> Bool[Tensor, "out in"]:
    """The mask of the highest scores: in the pattern, or else with `sparsity` of each row pruned."""
    return mask_rows(scores, sparsity) if pattern is None else mask_pattern(scores, pattern)


def prune(
    weight: Float[Tensor, "out in"], statistic: Any, section: SparsifySection, sparsity: float
) -> Pruned:
    """Choose a mask by the section's method, then refine mask and kept weights as it says."""
    target, damping = weight.float(), 0.0
    if section.dense_targets:
        target = statistic.target(weight, section.damping)
        _, damping = statistic.inverse_factor(section.damping)
    pruned = METHODS[section.method].prune(target, statistic, section, sparsity)
    pruned = replace(pruned, damping=max(pruned.damping, damping))
    if not (section.swaps or section.refit):
        return pruned
    hessian = statistic.damped(section.damping)
    if section.swaps:
        mask = swap_mask(target, pruned.mask, hessian, max_swaps=section.swaps, pattern=section.pattern)
        if METHODS[section.method].updates:
            factor, _ = statistic.inverse_factor(section.damping)
            swapped = replace(pruned, weight=obs_pass(target, factor, mask=mask).weight, mask=mask)
            pruned = _better_rows(target, hessian, pruned, swapped)
        else:
            pruned = replace(pruned, mask=mask, weight=torch.where(mask, target, 0.0))
    if section.refit:
        start = pruned.weight
        values = fit_kept_weights(target, pruned.mask, hessian, iterations=section.refit, start=start)
        pruned = replace(pruned, weight=values)
    return replace(pruned, damping=pruned.damping or section.damping)


def _better_rows(target: Tensor, hessian: Tensor, first: Pruned, second: Pruned) -> Pruned:
    """Each row as it has less error: swaps see the mask, not what the kept weights make up for."""

    def error(weight: Tensor) -> Tensor:
        with exact_float32(weight.device):
            return ((weight - target) @ hessian * (weight - target)).sum(1)

    better = (error(second.weight) < error(first.weight))[:, None]
    return replace(
        first,
        weight=torch.where(better, second.weight, first.weight),
        mask=torch.where(better, second.mask, first.mask),
    )


def _sparsities(
    checkpoint: Checkpoint,
    section: SparsifySection,
    linears: list[str],
    calibration: Tensor | None,
    device: torch.device | str,
    spill_dir: Path | None,
) -> dict[str, float]:
    if section.budget == "uniform" or section.pattern is not None:
        return dict.fromkeys(linears, section.sparsity)
    blocks = checkpoint.block_names
    if section.budget == "arithmetic":
        of_block = dict(zip(blocks, arithmetic_offsets(len(blocks), section.budget_spread), strict=True))
    else:
        with BlockWalk(checkpoint, calibration, device=device, spill_dir=spill_dir) as walk:
            ratios = outlier_ratios(walk, linears)
        offsets = outlier_offsets(list(ratios.values()), section.budget_spread)
        of_block = dict(zip(ratios, offsets, strict=True))
    of_linear = {n: of_block[next(b for b in of_block if n.startswith(b + "."))] for n in linears}
    sizes = {n: checkpoint.linears[n][0] * checkpoint.linears[n][1] for n in linears}
    return share_out(section.sparsity, of_linear, sizes)


def _check_existing_zeros(name: str, weight: Tensor, sparsity: float, pattern: str | None) -> None:
    """Raises: CompressionError if a weight has more zeros than it is to have: some would be filled."""
    if pattern is not None:
        sparsity = parse_pattern(pattern).sparsity
    if existing_mask(weight) is not None and (zeros := float((weight == 0).float().mean())) > sparsity:
        raise CompressionError(
            f"{name} arrives with {zeros:.1%} zeros, and {sparsity:.1%} would fill some; ask for more, "
            "or remove the sparsify section, which keeps them as they are"
        )


def _sparsify_linear(
    walk: BlockWalk,
    group: InputGroup,
    name: str,
    module: nn.Module,
    section: SparsifySection,
    sparsity: float,
    writer: CheckpointWriter,
) -> LayerReport:
    started = time.perf_counter()
    dense = weight_of(module)
    check_finite(name, dense)
    _check_existing_zeros(name, dense, sparsity, section.pattern)
    pruned = prune(dense, group.statistic, section, sparsity)
    warn_damping(name, section.damping, pruned.damping)
    stored = keep_nonzero(pruned.weight.to(walk.checkpoint.storage_dtype), pruned.mask)
    writer.write_linear(name, stored, mask=pruned.mask)
    module.weight = nn.Parameter(stored.to(dense.dtype), requires_grad=False)
    return LayerReport.of(
        name, group, dense, weight_of(module), pruned.mask, pruned.damping, time.perf_counter() - started
    )
