"""Training adapters, from the start or from the last whole checkpoint."""

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from peft import PeftModel
from torch import nn

from sqft.adapters import SearchSpace, set_ranks
from sqft.adapters.unrounded import load_unrounded
from sqft.artifacts import METRICS, digest_json
from sqft.data import Example
from sqft.errors import TrainingError
from sqft.progress import SILENT, Progress, errors_only
from sqft.sections import TrainingSection
from sqft.training.arguments import refusals, training_arguments
from sqft.training.best import best_step, is_exhausted
from sqft.training.cores import warn_of_busy_cores
from sqft.training.distillation import Distillation
from sqft.training.packing import check_packing
from sqft.training.record import Journal, TrainingRecord, environment, peak_bytes, reset_peak
from sqft.training.trackers import reporting_into
from sqft.training.trainer import ElasticTrainer, StepCallback

__all__ = ["train_adapters"]

logger = logging.getLogger(__name__)


def train_adapters(
    model: PeftModel,
    examples: Sequence[Example],
    section: TrainingSection,
    *,
    loss_on: Literal["answer", "text"] = "answer",
    seed: int = 0,
    output_dir: Path,
    space: SearchSpace | None = None,
    watch_dir: Path | None = None,
    measure: Callable[[], float] | None = None,
    distillation: Distillation | None = None,
    progress: Progress = SILENT,
) -> TrainingRecord:
    """Train the parameters of `model` that require gradients, and leave the model at its largest ranks.

    Each optimizer step trains one sub-adapter, `space.ranks_at(seed, step)`; the loss is the mean negative
    log-likelihood over the step's answer tokens (or all tokens). Checkpoints lie in `output_dir`; a call that
    finds some there goes on from the last whole one and ends with the same bits as a training that was never
    interrupted, on the same device kind, threads, dtype and versions (a difference is logged and recorded).
    watch_dir: gets metrics.jsonl, one line a step, and what TensorBoard reads where `section.arguments`
    reports to it. measure: the loss of `model` as it is, on items that are not trained on; called every
    `section.eval_steps` steps with the median ranks active, and after the last one. It decides what is kept,
    and when the training ends, where the section says so. distillation: what is learnt from a teacher
    beside them.

    Raises: TrainingError for wrong `section.arguments`, no items, packing that a model cannot do, a loss or
    gradient that is not a number (naming the step), a teacher's predictions for other items, and checkpoints
    of another training.

    Source: arXiv 2410.03750, section 3.2 (one sub-adapter a step, as in arXiv 2404.10934).
    Differs from the paper: ranks follow from (seed, step) and are drawn once a step; the loss counts the
    answer only, unless loss_on is "text", as in the paper.
    """
    if not examples:
        raise TrainingError("there is no item to train on")
    if section.selects and measure is None:
        raise TrainingError(
            "train.keep and train.early_stopping go by a measured loss, and nothing measures one here"
        )
    if distillation is not None and distillation.on_items:
        distillation.teacher.check_items(examples, loss_on)
    device = next(model.parameters()).device
    if section.packing:
        check_packing(model, examples, section.place)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    arguments = training_arguments(
        section,
        seed=seed,
        output_dir=output_dir,
        device=device,
        has_experts=any(".experts." in name for name in trained),
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    here = environment(model, device)
    identity = _identity(model, examples, section, loss_on, seed, distillation)
    facts = {"training": identity, "environment": here}
    journal = Journal(output_dir, watch_dir / METRICS if watch_dir else None)
    warn_of_busy_cores(device)
    record = TrainingRecord(list(space.groups) if space else [], environment=here)
    checkpoint = _last_checkpoint(journal, facts, record)
    total = section.max_steps or math.ceil(math.ceil(len(examples) / section.batch_size) * section.epochs)
    reset_peak(device)
    messages = transformers.logging
    quiet = errors_only(messages.get_verbosity, messages.set_verbosity)
    with quiet, progress.task("train", total) as advance:
        callback = StepCallback(model, space, seed, journal, facts, advance, section, measure)
        callback.steps, callback.checkpoint = record.steps, checkpoint
        advance(len(record.steps))
        ended = checkpoint is not None and (
            _is_final(checkpoint) or is_exhausted(record.steps, section.early_stopping)
        )
        if checkpoint is not None and ended:  # Trainer itself would add a step
            model.load_adapter(str(checkpoint), model.active_adapters[0], is_trainable=True)
            load_unrounded(model, checkpoint)
            callback.best.load(checkpoint)
        else:
            with reporting_into(watch_dir):
                with refusals(section):
                    trainer = ElasticTrainer(
                        model, arguments, examples, loss_on, callback, section, distillation
                    )
                with _repeatable(device):
                    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    record.peak_bytes = peak_bytes(device)
    last, best = record.steps[-1].step, best_step(record.steps)
    record.stopped_early = last < total and is_exhausted(record.steps, section.early_stopping)
    record.kept_step = best.step if best and section.keeps_best else last
    if record.kept_step != last:
        callback.best.restore()
    if space is not None:
        set_ranks(model, space.maximal())
    model.eval()
    return record


def _last_checkpoint(journal: Journal, facts: dict[str, Any], record: TrainingRecord) -> Path | None:
    """The checkpoint to go on from; those that are not whole are removed."""
    last: tuple[int, Path, dict[str, Any]] | None = None
    for step, (path, found) in journal.checkpoints().items():
        if found is None:
            if journal.writes:
                shutil.rmtree(path)
        else:
            last = (step, path, found)
    record.steps = journal.keep(last[0] if last else 0)
    if last is None:
        return None
    step, path, found = last
    if found["training"] != facts["training"]:
        raise TrainingError(
            f"{journal.directory} holds checkpoints of another training; remove it, or choose another"
        )
    then, now = found["environment"], facts["environment"]
    differences = {name: [then.get(name), now[name]] for name in now if then.get(name) != now[name]}
    for name, (before, after) in differences.items():
        logger.warning(
            "resuming with another %s (%s, was %s): the result may differ in bits", name, after, before
        )
    record.resumed.append({"step": step, "differences": differences})
    return path


def _is_final(checkpoint: Path) -> bool:
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return bool(state["global_step"] >= state["max_steps"])


def _identity(
    model: nn.Module,
    examples: Sequence[Example],
    section: TrainingSection,
    loss_on: str,
    seed: int,
    distillation: Distillation | None,
) -> str:
    trained = [[name, list(p.shape)] for name, p in model.named_parameters() if p.requires_grad]
    items = [[example.prompt_ids, example.answer_ids, example.earlier_answers] for example in examples]
    settings = section.model_dump(exclude={"checkpoint_steps", *([] if section.selects else ["eval_steps"])})
    adapters = {
        name: {
            k: sorted(v) if isinstance(v, set) else v
            for k, v in config.to_dict().items()
            if k not in ("base_model_name_or_path", "revision")
        }
        for name, config in getattr(model, "peft_config", {}).items()
    }
    taught = [] if distillation is None else [distillation.digest]
    return digest_json([trained, items, settings, loss_on, seed, adapters, *taught])


@contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """Have a GPU add up in a fixed order, as a CPU does: the backward pass of attention would not.

    An operation that cannot runs all the same. Fresh memory is not filled, which torch does unless told.
    """
    if device.type != "cuda":
        yield
        return
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fills
