"""The shapes of a model as plain values, which can be kept and read again without any library for models."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["AFTER_HEAD", "ModelOutline", "Shapes"]

Shapes = dict[str, tuple[int, int]]
# Settings of architectures that change the logits after the output layer.
AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")


@dataclass(frozen=True)
class ModelOutline:
    """Shapes of a model, as plain values.

    linears: (out, in) of every linear inside the decoder blocks, by full name; other_linears: of those
    outside. fused: the numbers in each matrix of the blocks that is not a linear; heads: the shapes of
    embedding and output head. quantized: the linears that are codes already; grid: what these are on
    (bits, group_size, symmetric, scale_bits). special: the linears inside whose class has a forward of its
    own, which asks for a weight where codes have none. has_experts: those of a mixture are among the linears.
    changes_logits: after the output layer (AFTER_HEAD). has_weights: False of a directory with a config
    alone, which can be planned for.
    """

    linears: Shapes
    num_parameters: int
    num_blocks: int
    hidden_size: int
    vocab_size: int
    has_weights: bool = True
    other_linears: Shapes = field(default_factory=dict)
    fused: dict[str, int] = field(default_factory=dict)
    heads: Shapes = field(default_factory=dict)
    quantized: list[str] = field(default_factory=list)
    grid: dict[str, Any] | None = None
    special: list[str] = field(default_factory=list)
    has_experts: bool = False
    changes_logits: bool = False

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "ModelOutline":
        """An outline out of its fields as JSON has them."""
        shapes = {
            name: {linear: (rows, columns) for linear, (rows, columns) in values[name].items()}
            for name in ("linears", "other_linears", "heads")
        }
        return cls(**{**values, **shapes})
