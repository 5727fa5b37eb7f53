"""Cross entropy over a large vocabulary without the logits of all tokens at once.

    loss = sum over counted tokens of  logsumexp(h W^T + b) - (h W^T + b)[target]

The logits of one chunk of tokens exist at a time; their gradient with respect to h is taken in the same pass,
so that backward only has to scale it. The output layer is frozen, as it is while adapters train.

Source: the chunked linear cross entropy of Liger Kernel (arXiv 2410.10989, section 3.2).
"""

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from sqft.kernels.choices import CHUNK_ELEMENTS, choose_loss
from sqft.ops.kernel_use import device_capability

__all__ = ["chunk_elements", "chunked_cross_entropy", "liger_cross_entropy"]


def chunk_elements(device: str) -> int:
    """The most logits that exist at a time on a kind of device."""
    return CHUNK_ELEMENTS.get(device, 1 << 22)


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
    Logits are computed in the autocast dtype, else in that of hidden, and summed up in float32. On a GPU
    Liger Kernel's fused form runs where it is installed (extra: liger) and the table in `kernels.choices`
    says that it is faster on such a card.
    """
    counted = (targets != ignore_index).nonzero().squeeze(1)
    hidden, targets = hidden[counted], targets[counted]
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        if len(hidden) and _takes_liger(hidden.device):
            return liger_cross_entropy(hidden, weight, targets, bias)
        out: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, targets, bias)
    return out


def _takes_liger(device: torch.device) -> bool:
    return choose_loss(device_capability(device)) == "liger" and find_spec("liger_kernel") is not None


def liger_cross_entropy(
    hidden: Float[Tensor, "tokens features"],
    weight: Float[Tensor, "vocabulary features"],
    targets: Int64[Tensor, " tokens"],
    bias: Float[Tensor, " vocabulary"] | None = None,
) -> Float[Tensor, ""]:
    """The same by Liger Kernel, whose Triton kernels fuse softmax and gradient."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    outputs = LigerFusedLinearCrossEntropyFunction.apply(
        hidden, weight, targets, bias, None, -100, 0.0, 0.0, "sum"
    )
    loss: Tensor = outputs[0]
    return loss.float()


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
        size = max(1, chunk_elements(hidden.device.type) // weight.shape[0])
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, hidden.shape[0], size):
            part = slice(start, start + size)
            logits = F.linear(hidden[part], weight, bias).float()
            total += F.cross_entropy(logits, targets[part], reduction="sum")
            if gradient is not None:
                slope = torch.softmax(logits, -1, out=logits)
                slope[torch.arange(slope.shape[0], device=slope.device), targets[part]] -= 1
                gradient[part] = slope.to(hidden.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output.to(gradient.dtype), None, None, None
