"""What the CPU kernels compute, in torch: slow and plain, for tests, and where there is no compiled part.

    d[b] = max |x| / 127,  q = round to even(x * (127 / max |x|))      for each block b of 32 columns
    y[r] = sum over b of  scale[r, b] * d[b] * (sum over c in b of  step[r, c] * q[c])

Sums inside a block are exact integers. Source: the block format Q8_0 of ggml (`ggml-quants.c`); differs in
that d stays float32.
"""

import torch
from jaxtyping import Float, Int8
from torch import Tensor

__all__ = ["multiply_reference", "quantize_activations"]

BLOCK = 32


def quantize_activations(
    x: Float[Tensor, "batch in"],
) -> tuple[Int8[Tensor, "batch blocks 32"], Float[Tensor, "batch blocks"]]:
    """The vectors on their grid: q, and d of every block. Columns that do not fill a block are 0."""
    blocks = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    largest = blocks.abs().amax(-1)
    inverse = torch.where(largest > 0, 127 / largest, 0.0)
    too_small = inverse > 3e38
    inverse = torch.where(too_small, 0.0, inverse)
    q = torch.where(inverse[..., None] == 0, 0.0, torch.round(blocks * inverse[..., None]))
    return q.nan_to_num().to(torch.int8), torch.where(too_small, 0.0, largest / 127)


def multiply_reference(
    steps: Int8[Tensor, "out in"],
    scale: Float[Tensor, "out groups"],
    group_size: int,
    x: Float[Tensor, "batch in"],
) -> Float[Tensor, "batch out"]:
    """x times the transposed weight steps * scale, with the vectors on their grid. group_size: 32 or 64."""
    q, d = quantize_activations(x)
    whole = torch.nn.functional.pad(steps, (0, -steps.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    sums = torch.einsum("rbc,vbc->vrb", whole.double(), q.double())
    of_block = scale.double().repeat_interleave(group_size // BLOCK, dim=1)[:, : whole.shape[1]]
    return (sums * of_block * d[:, None, :].double()).sum(-1).float()
