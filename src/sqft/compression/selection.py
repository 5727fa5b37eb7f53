"""Which layers a section means, and whether it fits them: shapes alone, before any weight is read."""

import math
from collections.abc import Mapping

from torch import nn

from sqft.errors import CompressionError
from sqft.models import Checkpoint, check_fused_groups, fused_weights, head_weights, target_linears
from sqft.models.experts import has_experts
from sqft.ops.head_grid import HEAD_GROUP
from sqft.ops.pattern import parse_pattern
from sqft.sections import QuantizeSection, SparsifySection

__all__ = ["check_not_quantized", "choose_heads", "choose_layers"]

LARGEST_FUSED = 0.25  # share of the blocks' weights that may lie outside linears before a user must agree


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
    nothing is left, a group size or pattern does not fit a width, or most weights are no linears and the
    section does not name what to compress.
    """
    if section.target_modules is None:
        _check_fused_weights(skeleton, shapes)
    chosen = list(target_linears(skeleton, section.target_modules, section.skip_modules))
    check_fused_groups(chosen, target_linears(skeleton, None, []))
    if not chosen:
        raise CompressionError("target_modules and skip_modules leave no layer to compress")
    if isinstance(section, QuantizeSection) and not section.symmetric and has_experts(skeleton):
        raise CompressionError(
            "transformers reads experts on symmetric grids alone; set quantize.symmetric: true"
        )
    for name in chosen:
        _check_width(name, shapes[name][1], section)
    return chosen


def choose_heads(skeleton: nn.Module, section: QuantizeSection) -> list[str]:
    """Full names of the weights of embedding and head that quantize.head means; none without it.

    Raises: CompressionError if its groups do not divide the width.
    """
    if section.head is None:
        return []
    heads = head_weights(skeleton)
    for name, weight in heads.items():
        if weight.shape[1] % HEAD_GROUP:
            raise CompressionError(
                f"quantize.head: {name} has a width of {weight.shape[1]}, and a grid of 8 bits has groups of "
                f"{HEAD_GROUP}; leave it out"
            )
    return list(heads)


def _check_fused_weights(skeleton: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> None:
    fused = {name: parameter.numel() for name, parameter in fused_weights(skeleton).items()}
    linear = sum(math.prod(shapes[name]) for name in target_linears(skeleton, None, []))
    share = sum(fused.values()) / (sum(fused.values()) + linear)
    if share > LARGEST_FUSED:
        largest = max(fused, key=lambda name: fused[name])
        raise CompressionError(
            f"{share:.0%} of the weights in the blocks are no linear layers ({largest} and others), and "
            "would stay dense; name the linears to compress in target_modules if that is meant"
        )


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
