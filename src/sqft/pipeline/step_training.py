"""The stages `train` and `train_dense`, and the training that `tune` shares with them."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft.artifacts import TEACHER, TRAINING_RECORD, digest_json, write_json
from sqft.pipeline.context import ADAPTER, StageContext, write_adapter_facts
from sqft.pipeline.opening import tell_kept_zeros
from sqft.pipeline.reported import dense_adapters
from sqft.progress import SILENT
from sqft.sections import AdapterSection, TrainingSection, TrainSection

if TYPE_CHECKING:
    from peft import PeftModel

    from sqft.training import TrainingRecord
    from sqft.training.distillation import Distillation

__all__ = ["drop_checkpoints", "train", "train_dense", "train_on"]

CHECKPOINTS = "checkpoints"


def train(context: StageContext) -> dict[str, Any]:
    """The base → a super-adapter (or an adapter of one rank)."""
    given = {name: context.inputs.get(name) for name in ("teacher", "trained")}
    return _train(context, context.base, context.adapters, **given)


def train_dense(context: StageContext) -> dict[str, Any]:
    """The dense reference: plain LoRA on the model as it came, with the same data and budget."""
    return _train(context, context.inputs["model"], dense_adapters(context.adapters))


def _train(
    context: StageContext, base: Path, section: AdapterSection, **given: Path | None
) -> dict[str, Any]:
    training = context.recipe.train or TrainSection()
    seed = context.recipe.training_seed
    adapted, metrics = train_on(context, base, section, training, seed, **given)
    adapted.save_pretrained(context.directory / ADAPTER)
    if not section.low_rank:  # of others, search writes the adapter that is handed on
        write_adapter_facts(context)
    drop_checkpoints(context)
    return metrics


def train_on(
    context: StageContext,
    base: Path,
    section: AdapterSection,
    training: TrainingSection,
    seed: int,
    *,
    teacher: Path | None = None,
    trained: Path | None = None,
) -> tuple["PeftModel", dict[str, Any]]:
    """Train an adapter on a model directory, or go on with it. Returns the adapted model, and its figures.

    teacher: where the predictions lie that are learnt beside the answers. trained: an adapter to go on from.

    Once what was trained is saved, `drop_checkpoints`.
    """
    from sqft.adapters import SearchSpace, codes_digest, count_differing_codes, set_ranks
    from sqft.adapters.lora_files import adapter_digests
    from sqft.models import ExistingMasks, open_checkpoint

    work = partial(_attach_and_train, base, section, training, seed, teacher, trained)
    if context.team is not None:
        context.team.begin(partial(work, replace(context, team=None, progress=SILENT)))
    stored = open_checkpoint(base, trust_remote_code=context.trusts_code)
    if context.recipe.base_stage == "model" and section.method != "lora" and stored.grid is None:
        tell_kept_zeros(len(ExistingMasks(stored)))
    adapted, record = work(context)
    space = SearchSpace.of(adapted)
    digests: dict[str, str] = {}
    differing = (0, 0)
    if section.method != "lora":
        for sub_adapter in (space.minimal(), space.median(), space.maximal()):
            set_ranks(adapted, sub_adapter)
            digests[digest_json(sub_adapter)] = codes_digest(adapted)
        differing = count_differing_codes(adapted)
    write_json(context.directory / TRAINING_RECORD, record.as_dict())
    curve = [(step.step, step.loss) for step in record.steps]
    chosen = {} if section.low_rank else {"ranks": {}, "codes_digest": digests[digest_json({})]}
    return adapted, {
        "codes_digests": digests,
        "differing_codes": differing,  # of the training kernel from a merge's, and of how many
        "curve": curve,
        **({"went_on_from": adapter_digests(trained)} if trained else {}),
        **chosen,
        **record.summary(),
    }


def _attach_and_train(
    base: Path,
    section: AdapterSection,
    training: TrainingSection,
    seed: int,
    teacher: Path | None,
    trained: Path | None,
    context: StageContext,
) -> "tuple[PeftModel, TrainingRecord]":
    """What every process of a launch does; the first of them writes."""
    from sqft.adapters import SearchSpace, attach_adapters
    from sqft.adapters.start import open_start
    from sqft.data import read_items
    from sqft.evaluation import evaluate_loss
    from sqft.models import load_trainable, open_checkpoint, training_dtype
    from sqft.training import train_adapters

    stored = open_checkpoint(base, trust_remote_code=context.trusts_code)
    model = load_trainable(
        base,
        base_precision=section.loaded_as,
        dtype=training_dtype(stored, context.device),
        device=context.device,
        trust_remote_code=context.trusts_code,
    )
    adapted = attach_adapters(
        model,
        section,
        storage_dtype=None if stored.grid else stored.storage_dtype,
        seed=seed,
        start=open_start(trained) if trained else None,
    )
    loss_on, held_out = context.data.loss_on, read_items(context.inputs["items"], "search")
    record = train_adapters(
        adapted,
        read_items(context.inputs["items"], "train"),
        training,
        loss_on=loss_on,
        seed=seed,
        output_dir=context.directory / CHECKPOINTS,
        space=SearchSpace.of(adapted),
        watch_dir=context.directory,
        distillation=_distillation(context, teacher, seed),
        measure=(lambda: evaluate_loss(adapted, held_out, loss_on=loss_on).loss) if held_out else None,
        progress=context.progress,
    )
    return adapted, record


def _distillation(context: StageContext, teacher: Path | None, seed: int) -> "Distillation | None":
    from sqft.training.distillation import Distillation
    from sqft.training.teacher import Teacher

    section = context.recipe.distillation
    if teacher is None or section is None:
        return None
    found = Teacher.load(teacher / TEACHER, name=context.keys[context.recipe.teacher_stage])
    return Distillation(found, section, seed)


def drop_checkpoints(context: StageContext) -> None:
    """Remove what only an interrupted training goes on from."""
    shutil.rmtree(context.directory / CHECKPOINTS)
