"""A stand-in for a model that is yet to be made, so that formats can refuse it before any work is done."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sqft.formats.weights import ExportSource
from sqft.models import Checkpoint
from sqft.ops import GridSpec, QParams, QuantizedWeight

__all__ = ["planned_source"]

NOWHERE = Path("(planned)")
ELEMENTS = 1 << 22  # of a stand-in weight: formats look only at its grid and width, so few rows will do


def planned_source(config: Any, shapes: Mapping[str, tuple[int, int]], grid: GridSpec | None) -> ExportSource:
    """A source whose linears, `shapes` by name, hold codes on a grid; without a grid, one of 16-bit weights.

    One linear of each shape stands for the others. Its scales have as many significant bits as the recipe
    allows, its codes and zero points take every value, so that what is exact here is exact in every model of
    this grid, but for scales beyond the range of a format.
    """
    replaced: dict[str, QuantizedWeight] = {}
    if grid is not None:
        chosen: dict[tuple[int, int], str] = {}
        for name, shape in shapes.items():
            chosen.setdefault(shape, name)
        replaced = {name: _stand_in(shape, grid) for shape, name in chosen.items()}
    names = tuple(f"{name}.weight_packed" for name in replaced)
    dtype = getattr(torch, str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch."))
    return ExportSource(Checkpoint(NOWHERE, config, names, (), dtype, grid), replaced)


def _stand_in(shape: tuple[int, int], grid: GridSpec) -> QuantizedWeight:
    rows, columns = shape
    if rows * columns > ELEMENTS:
        rows = 32 + rows % 32  # which fill as many whole words
    groups = 1 if grid.group_size == -1 else columns // grid.group_size
    codes = (torch.arange(columns) % (1 << grid.bits)).to(torch.uint8).expand(rows, columns)
    scale = torch.full((rows, groups), (2.0**grid.scale_bits - 1) * 2.0 ** -(grid.scale_bits + 4))
    middle = 1 << (grid.bits - 1)
    zero_point = torch.full((rows, groups), middle, dtype=torch.uint8)
    if not grid.symmetric:
        zero_point[::2], zero_point[1::2] = 0, (1 << grid.bits) - 1
    return QuantizedWeight(codes, QParams(scale, zero_point, grid.bits, grid.symmetric))
