"""The part of a training's loss that comes from a teacher."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sqft.artifacts import digest_json
from sqft.data.batches import IGNORED
from sqft.ops.distillation import chunked_distillation_loss, distillation_loss
from sqft.sections import DistillationSection
from sqft.training.head import chunked_head, without_head
from sqft.training.teacher import Teacher

__all__ = ["Distillation"]


@dataclass(frozen=True)
class Distillation:
    """What is learnt from a teacher, and how much it weighs.

        loss = answers + item_weight * KL(teacher, student) on the items' counted tokens
                       + text_weight * KL(teacher, student) on a text's tokens

    each the mean over its tokens, in nats. The texts of a step are a pure function of (seed, step, process),
    so that a resumed training sees the same.
    """

    teacher: Teacher
    section: DistillationSection
    seed: int

    @property
    def on_items(self) -> bool:
        """Whether the items' tokens are learnt from the teacher too."""
        return self.section.item_weight > 0

    @property
    def num_text_tokens(self) -> int:
        """Tokens of text in a step of one process."""
        return (
            0
            if self.teacher.text_tokens is None
            else self.teacher.text_tokens[: self.section.batch_size].numel()
        )

    @property
    def digest(self) -> str:
        """Changes with whatever a training sees of it."""
        return digest_json([self.teacher.digest, self.section.model_dump(mode="json"), self.seed])

    def batch(self, sequences: Sequence[int]) -> dict[str, Tensor]:
        """The teacher's predictions for a batch of items, to go with it; nothing where items do not count."""
        if not self.on_items:
            return {}
        assert self.teacher.items is not None
        ids, log_probs = self.teacher.items.of(sequences)
        return {"teacher_ids": ids, "teacher_log_probs": log_probs}

    def item_loss(
        self, states: Tensor, targets: Tensor, told: dict[str, Tensor], head: nn.Linear | None = None
    ) -> Tensor:
        """The loss on a micro-batch's items, weighted and summed over its tokens.

        states: the logits of all places, those whose target is not counted included; with head, what the
        output layer makes them of. told: what `batch` gave.
        """
        return self.section.item_weight * _loss(
            states[targets != IGNORED], told["teacher_ids"], told["teacher_log_probs"], head
        )

    def text_loss(self, model: nn.Module, inner: nn.Module, step: int, process: int = 0) -> Tensor | None:
        """The weighted loss on the step's texts; None without any. inner: the model without its wrappers."""
        tokens, predictions = self.teacher.text_tokens, self.teacher.texts
        if tokens is None or predictions is None:
            return None
        draw = (self.seed * 1_000_003 + step) * 1_009 + process
        generator = torch.Generator().manual_seed(draw % 2**63)
        drawn = torch.randperm(len(tokens), generator=generator)[: self.section.batch_size].tolist()
        device = next(inner.parameters()).device
        ids, log_probs = (part.to(device) for part in predictions.of(drawn))
        inputs = tokens[drawn].to(device)
        head = chunked_head(inner, len(ids))
        with nullcontext() if head is None else without_head(head):
            states = model(input_ids=inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
        return self.section.text_weight * _loss(states, ids, log_probs, head) / len(ids)


def _loss(states: Tensor, ids: Tensor, log_probs: Tensor, head: nn.Linear | None) -> Tensor:
    if head is None:
        return distillation_loss(states, ids, log_probs)
    return chunked_distillation_loss(states, head.weight, ids, log_probs, head.bias)
