"""Magnitude pruning: the smallest weights go."""

from jaxtyping import Float
from torch import Tensor

__all__ = ["magnitude_scores"]


def magnitude_scores(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """scores = |W|.

    Source: Han et al., arXiv 1506.02626. Differs from the paper: rows are compared within themselves, as
    Wanda does, and nothing is retrained here.
    """
    return weight.float().abs()
