"""The loss of learning a teacher's predictions, of which the k most likely tokens are kept.

    loss = sum over tokens of  sum_i p_i (log p_i - log q_i)

where i runs over the k tokens and, as one outcome more, all others together; p is the teacher's probability,
q the student's. It is a lower bound of the divergence over the whole vocabulary, 0 where both agree.

Source: arXiv 1503.02531, section 2, at temperature 1.
Differs from the paper: k tokens and the rest's mass in place of the whole vocabulary; k tokens alone would
teach too sharp predictions (arXiv 2503.16870).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sqft.ops.cross_entropy import chunk_elements

__all__ = ["chunked_distillation_loss", "distillation_loss", "top_log_probs"]


def top_log_probs(
    logits: Float[Tensor, "tokens vocabulary"], k: int
) -> tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens outcomes"]]:
    """The k most likely tokens, and the log-probability of each and, in the last column, of all others."""
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    top, ids = log_probs.topk(k, dim=-1)
    return ids, torch.cat([top, _rest(log_probs, ids)], dim=-1)


def distillation_loss(
    logits: Float[Tensor, "tokens vocabulary"],
    ids: Int[Tensor, "tokens k"],
    log_probs: Float[Tensor, "tokens outcomes"],
) -> Float[Tensor, ""]:
    """The divergence of the student's predictions from the teacher's, summed over tokens, in nats.

    log_probs: the teacher's, as `top_log_probs` gives them; however they were rounded, they are scaled to a
    sum of 1.
    """
    teacher = torch.log_softmax(log_probs.float(), dim=-1)
    student = torch.log_softmax(logits.float(), dim=-1)
    ids = ids.long()
    student = torch.cat([student.gather(-1, ids), _rest(student, ids)], dim=-1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True)


def chunked_distillation_loss(
    hidden: Float[Tensor, "tokens features"],
    weight: Float[Tensor, "vocabulary features"],
    ids: Int[Tensor, "tokens k"],
    log_probs: Float[Tensor, "tokens outcomes"],
    bias: Float[Tensor, " vocabulary"] | None = None,
) -> Float[Tensor, ""]:
    """`distillation_loss` of an output layer's logits, of which one chunk exists at a time.

    weight, bias: the frozen output layer. The backward pass computes a chunk's logits again.
    """
    weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    size = max(1, chunk_elements(hidden.device.type) // weight.shape[0])

    def of_chunk(part: slice) -> Tensor:
        def loss(states: Tensor) -> Tensor:
            return distillation_loss(F.linear(states, weight, bias), ids[part], log_probs[part])

        found: Tensor = checkpoint(loss, hidden[part], use_reentrant=False)
        return found

    parts = [of_chunk(slice(start, start + size)) for start in range(0, len(hidden), size)]
    return torch.stack(parts).sum() if parts else hidden.sum() * 0.0


def _rest(
    log_probs: Float[Tensor, "tokens vocabulary"], ids: Int[Tensor, "tokens k"]
) -> Float[Tensor, "tokens 1"]:
    """The log-probability of all tokens but those named: exact where 1 minus a sum would be 0."""
    lowest = torch.finfo(log_probs.dtype).min  # not -inf, which has no gradient where nothing is left
    return log_probs.scatter(-1, ids, lowest).logsumexp(-1, keepdim=True)
