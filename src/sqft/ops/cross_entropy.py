"""Cross entropy over a large vocabulary without the logits of all tokens at once.

    loss = sum over counted tokens of  logsumexp(h W^T + b) - (h W^T + b)[target]

The logits of one chunk of tokens exist at a time; their gradient with respect to h is taken in the same pass,
so that backward only has to scale it. The output layer is frozen, as it is while adapters train.

Source: the chunked linear cross entropy of Liger Kernel (arXiv 2410.10989, section 3.2).
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["chunked_cross_entropy"]

CHUNK_ELEMENTS = 1 << 22  # logits that exist at a time: 16 MiB in float32


def chunked_cross_entropy(
    hidden: Float[Tensor, "tokens features"],
    weight: Float[Tensor, "vocabulary features"],
    targets: Int64[Tensor, " tokens"],
    bias: Float[Tensor, " vocabulary"] | None = None,
    *,
    ignore_index: int = -100,
) -> Float[Tensor, ""]:
    """The summed negative log-likelihood, float32, differentiable in hidden.

    weight, bias: the frozen output layer. Tokens whose target is ignore_index count nothing and cost nothing.
    """
    counted = (targets != ignore_index).nonzero().squeeze(1)
    out: Tensor = _ChunkedCrossEntropy.apply(hidden[counted], weight, targets[counted], bias)
    return out


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
        size = max(1, CHUNK_ELEMENTS // weight.shape[0])
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], size):
                part = slice(start, start + size)
                logits = F.linear(hidden[part], weight.to(hidden.dtype), bias).float()
                total += F.cross_entropy(logits, targets[part], reduction="sum")
                if gradient is not None:
                    slope = torch.softmax(logits, -1, out=logits)
                    slope[torch.arange(slope.shape[0], device=slope.device), targets[part]] -= 1
                    gradient[part] = slope.to(hidden.dtype) @ weight.to(hidden.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output.to(gradient.dtype), None, None, None
