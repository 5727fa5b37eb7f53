"""RIA: prune by how large a weight is within its row and its column, and by its inputs."""

from jaxtyping import Float
from torch import Tensor

__all__ = ["ria_scores"]


def ria_scores(weight: Float[Tensor, "out in"], input_norm: Float[Tensor, " in"]) -> Float[Tensor, "out in"]:
    """scores = (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) · ||X_j||^0.5, compared within each row.

    Source: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language
    Models", ICLR 2024 (openreview Tr0lPx9woF), equation 4 with a = 0.5. Differs from the paper: channels are
    not permuted for N:M.
    """
    size = weight.float().abs()
    tiny = 1e-12
    relative = size / size.sum(0, keepdim=True).clamp_min(tiny) + size / size.sum(1, keepdim=True).clamp_min(
        tiny
    )
    return relative * input_norm.sqrt()
