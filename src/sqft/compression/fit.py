"""Which layers a section means, and whether it fits them: shapes alone, before any weight is read."""

from collections.abc import Mapping

from torch import nn

from sqft.errors import CompressionError
from sqft.models import Checkpoint, check_fused_groups, target_linears
from sqft.ops.pattern import parse_pattern
from sqft.sections import QuantizeSection, SparsifySection

__all__ = ["check_not_quantized", "choose_layers"]


def check_not_quantized(checkpoint: Checkpoint) -> None:
    """Raises: CompressionError if the weights are codes already."""
    if checkpoint.quantized_names:
        raise CompressionError(
            f"{checkpoint.directory} is already quantized; give the model that it was made from"
        )


def choose_layers(
    skeleton: nn.Module, shapes: Mapping[str, tuple[int, int]], section: SparsifySection | QuantizeSection
) -> list[str]:
    """Full names of the linears to compress. shapes: (out, in) by name.

    Raises: ModelError for an unknown name, or if a group that runtimes fuse is split; CompressionError if
    nothing is left, or a group size or pattern does not fit a width.
    """
    chosen = list(target_linears(skeleton, section.target_modules, section.skip_modules))
    check_fused_groups(chosen, target_linears(skeleton, None, []))
    if not chosen:
        raise CompressionError("target_modules and skip_modules leave no layer to compress")
    for name in chosen:
        _check_width(name, shapes[name][1], section)
    return chosen


def _check_width(name: str, columns: int, section: SparsifySection | QuantizeSection) -> None:
    if isinstance(section, QuantizeSection) and section.group_size != -1 and columns % section.group_size:
        raise CompressionError(
            f"{name}: group size {section.group_size} does not divide its width {columns}; "
            "choose one that does, or -1 for one group a row"
        )
    if section.pattern is not None and columns % parse_pattern(section.pattern).block:
        raise CompressionError(
            f"{name}: pattern {section.pattern} does not fit a width of {columns}; skip it"
        )
