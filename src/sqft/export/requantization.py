"""Rounding a model to a grid that it was not trained on, where a user allows it, and what that changed."""

from dataclasses import dataclass, replace

from sqft.formats.dense import half_dtype, rounding_dtype
from sqft.formats.weights import ExportSource
from sqft.ops import GridSpec, QuantizedWeight, compute_qparams, quantize

__all__ = ["Damage", "requantize_source", "rounding_damage"]


@dataclass(frozen=True)
class Damage:
    """What a new grid changed.

    weights: all quantized weights; changed: those that differ; relative_error: root mean square of the
    change over that of the weights; zeros_lost: zeros that are no longer 0.
    """

    grid: str
    weights: int
    changed: int
    relative_error: float
    zeros_lost: int


def requantize_source(source: ExportSource, grid: GridSpec) -> tuple[ExportSource, Damage]:
    """Round every quantized weight to the nearest point of a new grid."""
    replaced: dict[str, QuantizedWeight] = {}
    weights = changed = zeros_lost = 0
    error = size = 0.0
    for name in source.quantized_names:
        old = source.quantized(name).dequantize()
        qparams = compute_qparams(old, grid)
        replaced[name] = QuantizedWeight(quantize(old, qparams), qparams)
        new = replaced[name].dequantize()
        weights += old.numel()
        changed += int((new != old).sum())
        zeros_lost += int(((old == 0) & (new != 0)).sum())
        error += float((new - old).double().square().sum())
        size += float(old.double().square().sum())
    kind = "symmetric" if grid.symmetric else "asymmetric"
    told = f"{kind} {grid.bits}-bit, groups of {grid.group_size}"
    damage = Damage(told, weights, changed, (error / max(size, 1e-300)) ** 0.5, zeros_lost)
    return replace(source, replaced=replaced), damage


def rounding_damage(source: ExportSource) -> Damage:
    """What 16 bits change: the weights that neither 16-bit type holds are rounded."""
    weights = changed = zeros_lost = 0
    error = size = 0.0
    for name in source.tensor_names():
        old = source.tensor(name).float()
        dtype = half_dtype(source, name) or rounding_dtype(source)
        new = old.to(dtype).float()
        weights += old.numel()
        changed += int((new != old).sum())
        zeros_lost += int(((old == 0) & (new != 0)).sum())
        error += float((new - old).double().square().sum())
        size += float(old.double().square().sum())
    kind = str(rounding_dtype(source)).removeprefix("torch.")
    return Damage(kind, weights, changed, (error / max(size, 1e-300)) ** 0.5, zeros_lost)
