"""transformers.Trainer with one sub-adapter a step, a loss over counted tokens, and a journal of steps."""

import math
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from sqft.adapters import SearchSpace, set_ranks
from sqft.adapters.unrounded import check_trained, load_unrounded, save_unrounded
from sqft.data import Example, collate
from sqft.data.batches import IGNORED, collate_packed
from sqft.errors import AdapterError, TrainingError
from sqft.ops.cross_entropy import chunked_cross_entropy
from sqft.progress import Advance
from sqft.sections import TrainingSection
from sqft.training.arguments import refusals
from sqft.training.best import BestState, best_step, is_exhausted
from sqft.training.distillation import Distillation
from sqft.training.head import chunked_head, without_head
from sqft.training.ranks import begin_step
from sqft.training.rates import rate_names, split_by_rate
from sqft.training.record import Journal, StepRecord, describe_steps

__all__ = ["ElasticTrainer", "EpochSampler", "Items", "StepCallback"]

MEGABATCH = 16  # batches that group_by_length sorts together


class Items(Dataset[dict[str, Any]]):
    """Examples as Trainer's dataset."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"example": self.examples[index], "index": index}


class EpochSampler(Sampler[int]):
    """An order that is a pure function of (seed, epoch), so that a resumed training sees the same batches.

    group_size: 0 for a plain shuffle; else items of like length lie together in groups of this size, the
    groups shuffled.
    """

    def __init__(self, lengths: Sequence[int], seed: int, group_size: int = 0) -> None:
        self.lengths, self.seed, self.group_size, self.epoch = lengths, seed, group_size, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order: list[int] = torch.randperm(len(self.lengths), generator=generator).tolist()
        if not self.group_size:
            return iter(order)
        span = self.group_size * MEGABATCH
        sorted_spans = [
            sorted(order[i : i + span], key=lambda index: self.lengths[index])
            for i in range(0, len(order), span)
        ]
        groups = [
            part[i : i + self.group_size]
            for part in sorted_spans
            for i in range(0, len(part), self.group_size)
        ]
        whole = [group for group in groups if len(group) == self.group_size]
        rest = [index for group in groups if len(group) < self.group_size for index in group]
        shuffled = torch.randperm(len(whole), generator=generator).tolist()
        return iter([index for i in shuffled for index in whole[i]] + rest)


class ElasticTrainer(Trainer):  # type: ignore[misc]
    """Trainer whose loss is the mean over the counted tokens of the whole optimizer step, and a teacher's.

    Logits are computed only where a label is counted, which spares most of the output layer when the loss is
    on the answer, and in chunks where there would be many. A loss that is not a number ends the training
    before it reaches any weight.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        examples: Sequence[Example],
        loss_on: Literal["answer", "text"],
        callback: "StepCallback",
        section: TrainingSection,
        distillation: Distillation | None = None,
    ) -> None:
        self.section, self.distillation = section, distillation
        join = collate_packed if section.packing else collate

        def collate_rows(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
            told = distillation.batch([row["index"] for row in rows]) if distillation else {}
            return join([row["example"] for row in rows], loss_on) | told

        super().__init__(
            model=model,
            args=args,
            train_dataset=Items(examples),
            data_collator=collate_rows,
            callbacks=[callback],
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # makes Trainer count the step's labels for compute_loss
        self.lengths = [len(example.token_ids) for example in examples]
        self.step_callback = callback
        if args.report_to:
            callback.tell = self.log

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer. Raises: MissingExtraError or TrainingError for an optimizer that cannot be made."""
        with refusals(self.section):
            optimizer = super().create_optimizer(*args, **kwargs)
        optimizer.param_groups[:] = list(
            split_by_rate(optimizer.param_groups, self.step_callback.model, self.section)
        )
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer. Raises: TrainingError for settings that the schedule does not take."""
        with refusals(self.section):
            return super().create_scheduler(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Sized | None = None) -> Sampler[int]:
        strategy = self.args.train_sampling_strategy
        if strategy not in {"random", "group_by_length"}:
            raise TrainingError(
                f"{self.section.place}.arguments.train_sampling_strategy is {strategy!r}; write random or "
                "group_by_length"
            )
        mine = self.args.train_batch_size * self.args.gradient_accumulation_steps
        grouped = mine * self.accelerator.num_processes
        return EpochSampler(self.lengths, self.args.seed, grouped if strategy == "group_by_length" else 0)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Cross entropy summed over this micro-batch's counted tokens, divided by those of the whole step.

        With a teacher, the loss of learning from it is added: on the items in the same way, and on the step's
        texts beside its first micro-batch.
        """
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        told = {name: inputs.pop(name) for name in list(inputs) if name.startswith("teacher_")}
        row_tokens = inputs.pop("row_tokens", None)
        if row_tokens is not None:  # packed: with a cache or a mask, transformers would let items mix
            inputs["use_cache"] = False
        tokens = inputs["attention_mask"].sum() if row_tokens is None else row_tokens.sum()
        counted = (labels[:, 1:] != IGNORED).any(dim=0).nonzero().squeeze(1)
        targets = labels[:, counted + 1].flatten()
        head = None if return_outputs else chunked_head(self.step_callback.model, targets.numel())
        with nullcontext() if head is None else without_head(head):
            outputs = model(**inputs, logits_to_keep=counted)
        states = outputs.logits.flatten(0, 1)
        if head is not None:
            total = chunked_cross_entropy(states, head.weight, targets, head.bias, ignore_index=IGNORED)
        else:
            total = F.cross_entropy(states.float(), targets, ignore_index=IGNORED, reduction="sum")
        if num_items_in_batch is None:
            num_items_in_batch = (labels[:, 1:] != IGNORED).sum()
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        loss = total / num_items_in_batch * processes
        taught = self._taught(model, states, targets, told, head, num_items_in_batch / processes)
        learnt = None if taught is None else float(taught.detach())
        self.step_callback.add(float(loss.detach()), int(tokens), learnt)
        loss = loss if taught is None else loss + taught
        return (loss, outputs) if return_outputs else loss

    def _taught(
        self,
        model: nn.Module,
        states: Tensor,
        targets: Tensor,
        told: dict[str, Tensor],
        head: nn.Linear | None,
        num_tokens: Tensor | float,
    ) -> Tensor | None:
        """The part of a micro-batch's loss that comes from the teacher; None without one."""
        if self.distillation is None:
            return None
        parts = [self.distillation.item_loss(states, targets, told, head) / num_tokens] if told else []
        callback = self.step_callback
        if callback.is_fresh:
            process = self.accelerator.process_index
            text = self.distillation.text_loss(model, callback.model, callback.step, process)
            if text is not None:
                parts.append(text)
                callback.tokens += self.distillation.num_text_tokens
        return torch.stack(parts).sum() if parts else None


class StepCallback(TrainerCallback):  # type: ignore[misc]
    """Sets each step's ranks before it, checks its gradients, and writes it to the journal after it.

    measure: the loss on items that are not trained on; None measures nothing. tell: takes what was measured,
    for those that a training reports to.
    """

    def __init__(
        self,
        model: nn.Module,
        space: SearchSpace | None,
        seed: int,
        journal: Journal,
        facts: dict[str, Any],
        advance: Advance,
        section: TrainingSection,
        measure: Callable[[], float] | None,
    ) -> None:
        self.model, self.space, self.seed, self.journal = model, space, seed, journal
        self.facts, self.advance, self.section, self.measure = facts, advance, section, measure
        self.best = BestState(model)
        self.tell: Callable[[dict[str, float]], None] | None = None
        self.checkpoint: Path | None = None
        self.steps: list[StepRecord] = []
        self.ranks: list[int] = []
        self.loss, self.tokens, self.started, self.step = 0.0, 0, 0.0, 0
        self.learnt: float | None = None
        self.is_fresh = True  # no micro-batch of the step is done

    def add(self, loss: float, tokens: int, learnt: float | None = None) -> None:
        """Count one micro-batch. learnt: the part of the loss that comes from a teacher.

        Raises: TrainingError if its loss is not a finite number.
        """
        total = loss + (learnt or 0.0)
        if not math.isfinite(total):
            rates = self._rates()
            raise TrainingError(f"the loss of step {self.step} is {total}; lower {rates}, or check the data")
        self.loss += loss
        self.tokens += tokens
        self.learnt = self.learnt if learnt is None else (self.learnt or 0.0) + learnt
        self.is_fresh = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on with the scales and norms of the checkpoint as they were, not as they are served."""
        if self.checkpoint is not None:
            load_unrounded(self.model, self.checkpoint)
            self.best.load(self.checkpoint)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the ranks of the step: a pure function of (seed, step)."""
        self.loss, self.tokens, self.started = 0.0, 0, time.perf_counter()
        self.learnt, self.is_fresh = None, True
        self.step = state.global_step + 1
        self.ranks = list(begin_step(self.model, self.space, self.seed, state.global_step).values())

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse gradients that are not finite, before they reach a weight."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm) and not args.fp16:  # the fp16 scaler skips such a step itself
            raise TrainingError(f"the gradient of step {self.step} is not finite; lower {self._rates()}")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse scales that no grid can have, measure where it is time, and journal the step."""
        try:
            check_trained(self.model)
        except AdapterError as error:
            message = f"after step {state.global_step} {error}; lower {self._rates()}"
            raise TrainingError(message) from None
        self._add_up()
        seconds = time.perf_counter() - self.started
        last = state.global_step >= state.max_steps
        eval_loss = self._measure() if self._is_due(state.global_step, last) else None
        if self.tell is not None and eval_loss is not None:
            told = control.should_log
            self.tell({"eval_loss": eval_loss})
            control.should_log = told  # of the step's own figures, which Trainer takes for told now
        step = StepRecord(
            state.global_step, self.loss, self.ranks, seconds, self.tokens, eval_loss, self.learnt
        )
        self.steps.append(step)
        if self.section.keeps_best and best_step(self.steps) is step:
            self.best.keep()
        if not last and is_exhausted(self.steps, self.section.early_stopping):
            control.should_training_stop = control.should_save = True
        if state.is_world_process_zero:
            self.journal.append(step, rate=float(kwargs["optimizer"].param_groups[0]["lr"]))
        self.advance(1, describe_steps(self.steps))

    def _add_up(self) -> None:
        """Of a step that processes share: the mean of their losses, each of its own items over all tokens."""
        if not _has_group():
            return
        device = next(self.model.parameters()).device
        sums = torch.tensor([self.loss, self.learnt or 0.0, float(self.tokens)], device=device)
        dist.all_reduce(sums)
        loss, learnt, tokens = sums.tolist()
        count = dist.get_world_size()
        self.loss, self.tokens = loss / count, int(tokens)
        self.learnt = None if self.learnt is None else learnt / count

    def _rates(self) -> str:
        return rate_names(self.model, self.section.place)

    def _is_due(self, step: int, last: bool) -> bool:
        every = self.section.eval_steps
        return self.measure is not None and every > 0 and (last or step % every == 0)

    def _measure(self) -> float:
        """The loss at the median ranks, without dropout; the next step draws ranks of its own."""
        assert self.measure is not None
        if self.space is not None:
            set_ranks(self.model, self.space.median())
        self.model.eval()
        loss = self.measure()
        self.model.train()
        return loss

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mark the checkpoint as whole, once every process has written its part of it."""
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            save_unrounded(self.model, checkpoint)
            self.best.save(checkpoint)
        if _has_group():
            dist.barrier()
        if state.is_world_process_zero:
            self.journal.mark(state.global_step, self.facts)


def _has_group() -> bool:
    """Whether other processes take part in this training."""
    return dist.is_available() and dist.is_initialized()
