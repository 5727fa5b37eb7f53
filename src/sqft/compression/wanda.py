"""Wanda: prune by weight times input norm."""

from jaxtyping import Float
from torch import Tensor

__all__ = ["wanda_scores"]


def wanda_scores(
    weight: Float[Tensor, "out in"], input_norm: Float[Tensor, " in"]
) -> Float[Tensor, "out in"]:
    """scores = |W| · ||X_j||, compared within each output row.

    Source: Sun et al., arXiv 2306.11695, equation 1.
    """
    return weight.float().abs() * input_norm
