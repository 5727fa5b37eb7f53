"""Quantize a model onto its masks, block by block, from the dense weights."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Integer
from torch import Tensor, nn

from sqft.artifacts import digest_json
from sqft.compression.compressed import Rounded
from sqft.compression.descent import descend
from sqft.compression.driver import LinearWork, Task, compress_blocks, weight_of
from sqft.compression.gptaq import ALPHA, gptaq
from sqft.compression.gptq import gptq
from sqft.compression.inputs import InputGroup
from sqft.compression.refine import fit_kept_weights
from sqft.compression.reports import LayerReport, check_finite, warn_damping
from sqft.compression.rtn import rtn
from sqft.compression.selection import check_not_quantized, choose_heads, choose_layers
from sqft.compression.sparsegpt import prune_and_round
from sqft.compression.statistics import DenseTargetHessian, Hessian
from sqft.compression.walk import BlockWalk, digest_tensor
from sqft.errors import CompressionError
from sqft.models import Checkpoint, CheckpointWriter, outline_skeleton
from sqft.models.experts import scale_dtype
from sqft.ops import GridSpec, encode_latent, keep_nonzero
from sqft.ops.head_grid import round_head
from sqft.progress import SILENT, Progress
from sqft.sections import QuantizeSection

__all__ = ["METHODS", "quantize_model"]

Masks = Mapping[str, Bool[Tensor, "out in"]]


@dataclass(frozen=True)
class Method:
    """A quantizer: the statistic it wants (None: no calibration), and what it makes of a weight."""

    statistic: Callable[[int, torch.device], Any] | None
    round: Callable[[Tensor, Tensor | None, Any, QuantizeSection], Rounded]


def _rtn(weight: Tensor, mask: Tensor | None, statistic: Any, section: QuantizeSection) -> Rounded:
    return rtn(weight, mask, _grid(section), search_scales=section.scale_search)


def _gptq(weight: Tensor, mask: Tensor | None, statistic: Hessian, section: QuantizeSection) -> Rounded:
    target = weight.float()
    if mask is not None and section.refit:
        hessian = statistic.damped(section.damping)
        target = fit_kept_weights(target, mask, hessian, iterations=section.refit)
    rounded = gptq(
        target,
        mask,
        statistic,
        _grid(section),
        search_scales=section.scale_search,
        damping=section.damping,
        activation_order=section.activation_order,
    )
    return _descend(target, rounded, statistic, section) if section.descent else rounded


def _gptaq(
    weight: Tensor, mask: Tensor | None, statistic: DenseTargetHessian, section: QuantizeSection
) -> Rounded:
    rounded = gptaq(
        weight,
        mask,
        statistic,
        _grid(section),
        search_scales=section.scale_search,
        damping=section.damping,
        activation_order=section.activation_order,
    )
    if not section.descent:
        return rounded
    return _descend(statistic.target(weight, section.damping, share=ALPHA), rounded, statistic, section)


def _descend(target: Tensor, rounded: Rounded, statistic: Hessian, section: QuantizeSection) -> Rounded:
    hessian = statistic.damped(section.damping)
    scale_bits = section.scale_bits if section.scale_fit else None
    return descend(target, rounded, hessian, sweeps=section.descent, scale_bits=scale_bits)


def _joint(weight: Tensor, mask: Tensor | None, statistic: Hessian, section: QuantizeSection) -> Rounded:
    if mask is not None:
        raise CompressionError("joint chooses its own mask; leave the sparsify section out, or take gptq")
    return prune_and_round(
        weight,
        statistic,
        _grid(section),
        search_scales=section.scale_search,
        sparsity=section.sparsity,
        pattern=section.pattern,
        damping=section.damping,
    )


METHODS: dict[str, Method] = {
    "gptaq": Method(DenseTargetHessian, _gptaq),
    "gptq": Method(Hessian, _gptq),
    "joint": Method(Hessian, _joint),
    "rtn": Method(None, _rtn),
}


def quantize_model(
    checkpoint: Checkpoint,
    masks: Masks | None,
    section: QuantizeSection,
    calibration: Integer[Tensor, "n length"] | None,
    writer: CheckpointWriter,
    *,
    device: torch.device | str = "cpu",
    progress: Progress = SILENT,
    spill: bool = False,
) -> list[LayerReport]:
    """Write codes, grids, latent codes and masks, one block in memory at a time; close the writer yourself.

    checkpoint: the dense model. masks: True = kept, by linear; None keeps all. Of StoredMasks one at a time
    is in memory. A masked linear that is not quantized is written sparse. With section.head embedding and
    head are rounded as well; calibration runs through those of the dense model. spill: keep the
    calibration's hidden states in memory-mapped files.

    Raises: CompressionError if the group size does not divide a width, a mask does not fit its layer, weights
    or inputs are not finite, or the method needs calibration and has none; ModelError for an unknown module.
    """
    method = METHODS[section.method]
    check_not_quantized(checkpoint)
    outline = outline_skeleton(checkpoint.skeleton())
    linears, heads = choose_layers(outline, section), choose_heads(outline, section)
    masks = masks or {}
    _check_masks(checkpoint, masks)
    if method.statistic is not None and calibration is None:
        raise CompressionError(f"{section.method} needs calibration texts; give a calibration section")
    with BlockWalk(
        checkpoint,
        calibration if method.statistic else None,
        device=device,
        dense_stream=method.statistic is DenseTargetHessian,
        spill_dir=writer.directory / "activations" if spill else None,
    ) as walk:
        masked = linears if section.method == "joint" else masks
        grid = replace(_grid(section), stored_dtype=scale_dtype(checkpoint.skeleton(), _grid(section)))
        writer.prepare(quantized=linears, grid=grid, masked=masked, latent=linears, halves=heads)

        def compress(group: InputGroup, name: str, module: nn.Module) -> LayerReport:
            return _quantize_linear(group, name, module, masks.get(name), method, section, writer)

        def finish_block(name: str) -> None:
            _apply_other_masks(walk, name, masks, linears, writer)

        key = {
            "quantize": section.model_dump(mode="json"),
            "masks": digest_json({name: digest_tensor(mask) for name, mask in masks.items()}),
        }
        work = LinearWork(walk, linears, method.statistic, compress, section.sequential, finish_block)
        task = Task(f"quantize ({section.method})", work, key, LayerReport.from_json)
        reports = compress_blocks(walk, task, writer, calibration, progress)
    for name in heads:
        weight = checkpoint.tensor(name)
        check_finite(name, weight)
        writer.write_tensor(name, round_head(weight))
    return reports


def _grid(section: QuantizeSection) -> GridSpec:
    return GridSpec(section.bits, section.group_size, section.symmetric, section.scale_bits)


def _check_masks(checkpoint: Checkpoint, masks: Masks) -> None:
    for name, mask in masks.items():
        shape = checkpoint.linears.get(name)
        if shape is None or tuple(mask.shape) != shape:
            raise CompressionError(f"the mask of {name} has shape {tuple(mask.shape)}, the model has {shape}")


def _quantize_linear(
    group: InputGroup,
    name: str,
    module: nn.Module,
    mask: Tensor | None,
    method: Method,
    section: QuantizeSection,
    writer: CheckpointWriter,
) -> LayerReport:
    started = time.perf_counter()
    dense = weight_of(module)
    check_finite(name, dense)
    if mask is not None:
        mask = mask.to(dense.device)
    rounded = method.round(dense, mask, group.statistic, section)
    warn_damping(name, section.damping, rounded.damping)
    mask = rounded.mask
    latent = encode_latent(rounded.before_rounding, rounded.codes, mask, rounded.qparams)
    writer.write_linear(name, rounded, mask=mask, latent=latent)
    module.weight = nn.Parameter(rounded.dequantize().to(dense.dtype), requires_grad=False)
    return LayerReport.of(
        name, group, dense, weight_of(module), mask, rounded.damping, time.perf_counter() - started
    )


def _apply_other_masks(
    walk: BlockWalk, block: str, masks: Masks, quantized: list[str], writer: CheckpointWriter
) -> None:
    """Linears with a mask that are left out of quantization become sparse."""
    for name in set(masks) - set(quantized):
        if name.startswith(block + "."):
            module = walk.model.get_submodule(name)
            mask = masks[name].to(walk.device)
            sparse = keep_nonzero(weight_of(module).to(walk.checkpoint.storage_dtype), mask)
            writer.write_linear(name, sparse, mask=mask)
            module.weight = nn.Parameter(sparse.to(walk.dtype), requires_grad=False)
