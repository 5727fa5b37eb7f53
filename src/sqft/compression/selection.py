"""Which layers a section means, and whether it fits them: shapes alone, before any weight is read."""

import math
from typing import TYPE_CHECKING

from sqft.errors import CompressionError
from sqft.models.names import check_fused_groups, choose_linears
from sqft.patterns import Pattern
from sqft.sections import QuantizeSection, SparsifySection

if TYPE_CHECKING:
    from sqft.models import Checkpoint, ModelOutline

__all__ = ["check_not_quantized", "choose_heads", "choose_layers"]

LARGEST_FUSED = 0.25  # share of the blocks' weights that may lie outside linears before a user must agree


def check_not_quantized(checkpoint: "Checkpoint") -> None:
    """Raises: CompressionError if the weights are codes already."""
    if checkpoint.quantized_names:
        raise CompressionError(
            f"{checkpoint.directory} is already quantized; give the model that it was made from"
        )


def choose_layers(outline: "ModelOutline", section: SparsifySection | QuantizeSection) -> list[str]:
    """Full names of the linears to compress.

    Raises: ModelError for an unknown name, or if a group that runtimes fuse is split; CompressionError if
    nothing is left, a group size or pattern does not fit a width, a linear to quantize has a forward of its
    own, or most weights are not linears and the section does not name what to compress.
    """
    if section.target_modules is None:
        _check_fused_weights(outline)
    chosen = choose_linears(outline.linears, section.target_modules, section.skip_modules)
    check_fused_groups(chosen, outline.linears)
    if not chosen:
        raise CompressionError("target_modules and skip_modules leave no layer to compress")
    if isinstance(section, QuantizeSection) and not section.symmetric and outline.has_experts:
        raise CompressionError(
            "transformers reads experts on symmetric grids alone; set quantize.symmetric: true"
        )
    special = set(chosen) & set(outline.special)
    if isinstance(section, QuantizeSection) and special:
        raise CompressionError(
            f"{min(special)} and others are linears of a class of their own, which transformers cannot run "
            "from codes; leave quantize out, or name them in quantize.skip_modules"
        )
    for name in chosen:
        _check_width(name, outline.linears[name][1], section)
    return chosen


def choose_heads(outline: "ModelOutline", section: QuantizeSection) -> list[str]:
    """Full names of the weights of embedding and head that quantize.head means; none without it.

    Raises: CompressionError if its groups do not divide the width.
    """
    if section.head is None:
        return []
    from sqft.ops.head_grid import HEAD_GROUP  # torch, which a plan without it does not wait for

    for name, (_, width) in outline.heads.items():
        if width % HEAD_GROUP:
            raise CompressionError(
                f"quantize.head: {name} has a width of {width}, and a grid of 8 bits has groups of "
                f"{HEAD_GROUP}; leave it out"
            )
    return list(outline.heads)


def _check_fused_weights(outline: "ModelOutline") -> None:
    fused = outline.fused
    linear = sum(math.prod(shape) for shape in outline.linears.values())
    share = sum(fused.values()) / (sum(fused.values()) + linear)
    if share > LARGEST_FUSED:
        largest = max(fused, key=lambda name: fused[name])
        raise CompressionError(
            f"{share:.0%} of the weights in the blocks are not in linear layers ({largest} and others), and "
            "would stay dense; name the linears to compress in target_modules if that is meant"
        )


def _check_width(name: str, columns: int, section: SparsifySection | QuantizeSection) -> None:
    if isinstance(section, QuantizeSection) and section.group_size != -1 and columns % section.group_size:
        raise CompressionError(
            f"{name}: group size {section.group_size} does not divide its width {columns}; "
            "choose one that does, or -1 for one group a row"
        )
    if section.pattern is not None and columns % Pattern.parse(section.pattern).block:
        raise CompressionError(
            f"{name}: pattern {section.pattern} does not fit a width of {columns}; skip it"
        )
