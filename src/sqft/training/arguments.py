"""Translates the settings of a training into transformers.TrainingArguments."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from sqft.errors import MissingExtraError, SqftError, TrainingError, is_out_of_memory
from sqft.launch import launched_processes
from sqft.ops.kernel_use import computes_in_bfloat16
from sqft.sections import TrainingSection
from sqft.training.trackers import check_reporting

__all__ = ["check_arguments", "refusals", "share_batch", "training_arguments"]

KNOWN = {field.name for field in fields(TrainingArguments) if field.init}
CHECKPOINTING = (
    "activation_checkpointing" if "activation_checkpointing" in KNOWN else "gradient_checkpointing"
)

# Fields that a setting of the recipe already stands for, or that exact resuming rests on.
ELSEWHERE = {
    "learning_rate": "learning_rate",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "num_train_epochs": "epochs",
    "max_steps": "max_steps",
    "warmup_steps": "warmup_steps",
    "lr_scheduler_type": "schedule",
    "gradient_checkpointing": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
    "save_steps": "checkpoint_steps",
    "eval_strategy": "eval_steps",
    "eval_steps": "eval_steps",
    "load_best_model_at_end": "keep: best",
    "metric_for_best_model": "keep: best",
    "greater_is_better": "keep: best",
}
OUTSIDE = {
    "seed": "seed",
    "data_seed": "seed",
    "use_cpu": "runtime.device",
    "output_dir": "runtime.workspace",
}
FIXED = {"save_strategy", "save_only_model", "remove_unused_columns", "resume_from_checkpoint",
         "logging_nan_inf_filter", "ignore_data_skip", "do_train", "disable_tqdm", "label_smoothing_factor",
         "auto_find_batch_size"}  # fmt: skip
UPLOADS = ("push_to_hub", "hub_")


def check_arguments(section: TrainingSection) -> None:
    """Check `section.arguments`, and that batches divide into micro-batches, without building anything.

    Raises: TrainingError for a field that TrainingArguments does not have (naming the nearest), for one that
    the recipe sets elsewhere or that uploads, for a tracker that is not installed, and for a batch that does
    not divide into its micro-batches, or these among the processes of a launch.
    """
    arguments = f"{section.place}.arguments"
    elsewhere = {name: f"{section.place}.{key}" for name, key in ELSEWHERE.items()} | OUTSIDE
    for name in section.arguments:
        if name not in KNOWN:
            near = get_close_matches(name, KNOWN, n=3) or ["see transformers.TrainingArguments"]
            raise TrainingError(
                f"{arguments}: no field {name!r} in TrainingArguments; near: {', '.join(near)}"
            )
        if name in elsewhere:
            raise TrainingError(f"{arguments}: write {elsewhere[name]} in place of {name!r}")
        if name.startswith(UPLOADS):
            raise TrainingError(
                f"{arguments}: a run uploads nothing; remove {name!r}, and upload what it made yourself"
            )
        if name in FIXED:
            raise TrainingError(
                f"{arguments}: {name!r} cannot be changed, exact resuming rests on it; remove it"
            )
    size, parts = section.batch_size, section.gradient_accumulation
    if size % parts:
        raise TrainingError(
            f"{section.place}.batch_size {size} cannot be cut into {section.place}.gradient_accumulation "
            f"{parts} equal micro-batches; make it a multiple"
        )
    check_reporting(section)
    share_batch(section, launched_processes())


def training_arguments(
    section: TrainingSection,
    *,
    seed: int,
    output_dir: Path,
    device: torch.device,
    has_experts: bool = False,
) -> TrainingArguments:
    """The section as TrainingArguments, `section.arguments` laid over it.

    has_experts: whether something that is trained takes no part in some steps, which processes that train
    together have to find out.

    Raises: TrainingError as `check_arguments`, and for a value that TrainingArguments refuses.
    """
    check_arguments(section)
    size, parts = share_batch(section, launched_processes())
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "learning_rate": section.learning_rate,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": parts,
        "num_train_epochs": section.epochs,
        "max_steps": section.max_steps or -1,
        "warmup_steps": section.warmup_steps,
        "lr_scheduler_type": section.schedule,
        CHECKPOINTING: section.gradient_checkpointing,
        f"{CHECKPOINTING}_kwargs": {"use_reentrant": False},
        "save_strategy": "steps",
        "save_steps": section.checkpoint_steps,
        "save_total_limit": 2,  # the newest may be cut short by a kill
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "remove_unused_columns": False,
        "dataloader_pin_memory": device.type == "cuda",
        "disable_tqdm": True,
        "use_cpu": device.type == "cpu",
        "ddp_find_unused_parameters": has_experts,
        "ddp_broadcast_buffers": False,  # codes and masks, which never change
        "seed": seed,
        "data_seed": seed,
        "bf16": computes_in_bfloat16(device) and not section.arguments.get("fp16"),
    }
    if "report_to" in section.arguments:
        settings |= {"logging_strategy": "steps", "logging_steps": 1}
    with refusals(section):
        return TrainingArguments(**(settings | section.arguments))


def share_batch(section: TrainingSection, processes: int) -> tuple[int, int]:
    """(items of a micro-batch, micro-batches of a step) of one of the processes that share a step.

    They share its micro-batches first, which then hold the same items as in one process.

    Raises: TrainingError if the items of a step cannot be shared equally.
    """
    size, parts = section.batch_size // section.gradient_accumulation, section.gradient_accumulation
    shared = math.gcd(parts, processes)
    rest = processes // shared
    if size % rest:
        raise TrainingError(
            f"{section.place}.batch_size {section.batch_size} in {parts} micro-batches cannot be shared by "
            f"{processes} processes; make it a multiple of {parts * rest}"
        )
    return size // rest, parts // shared


@contextmanager
def refusals(section: TrainingSection) -> Iterator[None]:
    """Turn an exception of transformers about `section.arguments` into an error of one line.

    Raises: MissingExtraError for a package that is not installed; TrainingError for everything else.
    """
    try:
        yield
    except SqftError:
        raise
    except (ValueError, TypeError, LookupError, ImportError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        kind = MissingExtraError if isinstance(error, ImportError) else TrainingError
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise kind(f"{section.place}.arguments: {lines[0]}") from error
