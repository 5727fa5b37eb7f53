"""Shared by the tests: drawn inputs, and whole runs over a tiny model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqft.compression import LayerReport, quantize_model, sparsify_model
from sqft.compression.statistics import Hessian
from sqft.models import CheckpointWriter, open_checkpoint
from sqft.sections import QuantizeSection, SparsifySection


def inputs(tokens: int = 300, columns: int = 24, seed: int = 0) -> Tensor:
    """Correlated inputs, (tokens, columns)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    return torch.randn(tokens, columns, generator=generator) @ mixing


def hessian_of(x: Tensor) -> Hessian:
    """The statistic of these inputs."""
    hessian = Hessian(x.shape[1], x.device)
    hessian.update(x)
    return hessian


def tokens(rows: int = 10, length: int = 24, seed: int = 0) -> Tensor:
    """Token ids of the tiny models."""
    return torch.randint(4, 288, (rows, length), generator=torch.Generator().manual_seed(seed))


def sparsify(
    directory: Path, out: Path, calibration: Tensor | None = None, *, spill: bool = False, **settings: Any
) -> list[LayerReport]:
    """A sparse model in `out`. calibration: default `tokens()`."""
    writer = CheckpointWriter(out, open_checkpoint(directory))
    ids = tokens() if calibration is None else calibration
    reports = sparsify_model(writer.source, SparsifySection(**settings), ids, writer, spill=spill)
    writer.close({})
    return reports


def quantize(
    directory: Path,
    out: Path,
    masks: Mapping[str, Tensor] | None = None,
    *,
    spill: bool = False,
    **settings: Any,
) -> list[LayerReport]:
    """A quantized model in `out`."""
    writer = CheckpointWriter(out, open_checkpoint(directory))
    section = QuantizeSection(**({"group_size": 32} | settings))
    reports = quantize_model(writer.source, masks, section, tokens(), writer, spill=spill)
    writer.close({})
    return reports
