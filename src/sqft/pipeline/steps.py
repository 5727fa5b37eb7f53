"""What each stage does: open the finished directories it reads, call one package, save, return figures.

The packages know modules and tensors; only this file knows which directory holds what.
"""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sqft.artifacts import LAYERS, Manifest, digest_json, write_json
from sqft.errors import CertificateError
from sqft.pipeline.context import StageContext
from sqft.pipeline.recipe import adapter_stage, dense_adapters, model_stage
from sqft.sections import (
    AdapterSection,
    CalibrationSection,
    EvaluateSection,
    QuantizeSection,
    ReportedModel,
    SearchSection,
    SparsifySection,
    TrainSection,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from sqft.adapters import MergedWeight
    from sqft.compression import LayerReport
    from sqft.models import QuantizedWeight

__all__ = [
    "evaluate",
    "export",
    "merge",
    "quantize",
    "search",
    "sparsify",
    "train",
    "train_dense",
]

logger = logging.getLogger(__name__)
ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
ITEMS = "items.json"
REFERENCE_ITEMS = 4
# What of a recipe a merged model depends on; data enters by content.
DETERMINING = {"model", "seed", "calibration", "sparsify", "quantize", "adapters", "train", "search"}


def sparsify(context: StageContext) -> dict[str, Any]:
    """model → masks and a sparse 16-bit model."""
    from sqft.compression import sparsify_model
    from sqft.models import CheckpointWriter

    section = context.recipe.sparsify or SparsifySection()
    tokens = context.calibration(section)
    writer = CheckpointWriter(context.directory, context.checkpoint("model"))
    layers = sparsify_model(writer.source, section, tokens, writer, **context.compressing)
    writer.close()
    return _record_layers(context, layers, tokens)


def quantize(context: StageContext) -> dict[str, Any]:
    """The dense model and the masks → a compressed-tensors model, and the weights before rounding."""
    from sqft.compression import quantize_model
    from sqft.models import CheckpointWriter, ExistingMasks, StoredMasks

    section = context.recipe.quantize or QuantizeSection()
    masks: Mapping[str, Tensor] = {}
    if context.recipe.sparsify:
        masks = StoredMasks(context.inputs["sparsify"])
    elif section.method != "joint":  # which chooses zeros by itself
        masks = ExistingMasks(context.checkpoint("model"))
        _tell_kept_zeros(len(masks))
    tokens = context.calibration(section)
    writer = CheckpointWriter(context.directory, context.checkpoint("model"))
    layers = quantize_model(writer.source, masks, section, tokens, writer, **context.compressing)
    writer.close()
    return _record_layers(context, layers, tokens)


def _record_layers(
    context: StageContext, layers: list["LayerReport"], tokens: "Tensor | None"
) -> dict[str, Any]:
    """Keep beside the weights what was done to each layer, and with what calibration."""
    from sqft.compression.walk import digest_tensor

    rows = [layer.to_json() for layer in layers]
    made_with = {"model", "seed", "sparsify", "quantize"}
    recipe = context.recipe.model_dump(mode="json", include=made_with, exclude_none=True)
    untimed = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    record: dict[str, Any] = {"recipe": recipe, "layers": untimed}
    if tokens is not None:
        section = context.recipe.calibration or CalibrationSection()
        recipe["calibration"] = section.model_dump(mode="json")
        data = {"data": context.data.train} if section.source == "train" else {}
        record["calibration"] = {"tokens": tokens.numel(), "sha256": digest_tensor(tokens)} | data
    write_json(context.directory / LAYERS, record)
    return {"layers": rows}


def train(context: StageContext) -> dict[str, Any]:
    """The base → a super-adapter (or an adapter of one rank)."""
    return _train(context, context.base, context.adapters)


def train_dense(context: StageContext) -> dict[str, Any]:
    """The dense reference: plain LoRA on the model as it came, with the same data and budget."""
    return _train(context, context.inputs["model"], dense_adapters(context.adapters))


def _train(context: StageContext, base: Path, section: AdapterSection) -> dict[str, Any]:
    from sqft.adapters import SearchSpace, attach_adapters, codes_digest, set_ranks
    from sqft.models import ExistingMasks, load_trainable, open_checkpoint
    from sqft.training import train_adapters

    model = load_trainable(
        base,
        base_precision=section.base_precision,
        device=context.device,
        trust_remote_code=context.trusts_code,
    )
    stored = open_checkpoint(base, trust_remote_code=context.trusts_code)
    adapted = attach_adapters(
        model,
        section,
        storage_dtype=None if stored.grid else stored.storage_dtype,
        seed=context.recipe.seed,
    )
    if context.recipe.base_stage == "model" and section.method != "lora":
        _tell_kept_zeros(len(ExistingMasks(stored)))
    space = SearchSpace.of(adapted)
    splits = context.splits()
    record = train_adapters(
        adapted,
        splits.train,
        context.recipe.train or TrainSection(),
        loss_on=context.data.loss_on,
        seed=context.recipe.seed,
        output_dir=context.directory / CHECKPOINTS,
        space=space,
        progress=context.progress,
    )
    digests: dict[str, str] = {}
    if section.method != "lora":
        for sub_adapter in (space.minimal(), space.median(), space.maximal()):
            set_ranks(adapted, sub_adapter)
            digests[digest_json(sub_adapter)] = codes_digest(adapted)
    adapted.save_pretrained(context.directory / ADAPTER)
    write_json(context.directory / "training.json", record.as_dict())
    shutil.rmtree(context.directory / CHECKPOINTS)
    curve = [(step.step, step.loss) for step in record.steps]
    return {"codes_digests": digests, "curve": curve, "data": splits.report, **record.summary()}


def search(context: StageContext) -> dict[str, Any]:
    """The super-adapter → the ranks that do best on the search items, cut out as an adapter of its own."""
    from sqft.adapters import SearchSpace, codes_digest, extract_sub_adapter, set_ranks
    from sqft.evaluation import evaluate_loss
    from sqft.search import search_sub_adapter

    section = context.recipe.search or SearchSection()
    adapted = open_adapted(context, context.base, context.inputs["train"] / ADAPTER).eval()
    items = context.splits().search if section.method == "hill_climb" else []

    def objective(sub_adapter: dict[str, int]) -> float:
        set_ranks(adapted, sub_adapter)
        return evaluate_loss(adapted, items, loss_on=context.data.loss_on).loss

    space = SearchSpace.of(adapted)
    result = search_sub_adapter(
        space,
        objective,
        section,
        seed=context.recipe.seed,
        storage=context.directory / "trials.log",
        progress=context.progress,
    )
    extract_sub_adapter(adapted, result.best, context.directory / ADAPTER)
    digest = None
    if context.adapters.method != "lora":
        trained = Manifest.read(context.inputs["train"]).metrics["codes_digests"]
        for sub_adapter in (space.maximal(), result.best):
            set_ranks(adapted, sub_adapter)
            digest = codes_digest(adapted)
            _check_digest(digest, trained.get(digest_json(sub_adapter)))
    write_json(context.directory / "sub_adapter.json", asdict(result))
    return {"ranks": result.best, "codes_digest": digest, "num_trials": len(result.trials)}


def merge(context: StageContext) -> dict[str, Any]:
    """The base and the sub-adapter → one model, re-opened and certified before it is called done."""
    from sqft.adapters import merge_adapters
    from sqft.certificate import certify_model
    from sqft.models import load_model, read_masks, write_model

    adapter = context.inputs["search"] / ADAPTER
    adapted = open_adapted(context, context.base, adapter).eval()
    merged = merge_adapters(adapted)
    linears = {name: _stored_weight(weight) for name, weight in merged.items()}
    masks = read_masks(context.base)
    existing = {name: weight.mask for name, weight in merged.items() if name not in masks}
    masks |= {name: mask for name, mask in existing.items() if not bool(mask.all())}
    write_model(
        context.directory,
        context.checkpoint(context.recipe.base_stage),
        linears,
        masks=masks,
        facts=_facts(context),
    )
    checks = certify_model(
        context.directory,
        base_dir=context.base,
        adapter_dir=adapter,
        adapted=adapted,
        merged=load_model(context.directory, **context.loading),
        token_ids=[example.prompt_ids for example in context.splits().test[:REFERENCE_ITEMS]],
        trained_digest=Manifest.read(context.inputs["search"]).metrics["codes_digest"],
        trust_remote_code=context.trusts_code,
        progress=context.progress,
    )
    failed = [f"{check.name} ({check.detail})" for check in checks if not check.passed]
    if failed:
        shutil.rmtree(context.directory)
        raise CertificateError(f"the merged model is not the one that was trained: {'; '.join(failed)}")
    return {"checks": [vars(check) for check in checks]}


def evaluate(context: StageContext) -> dict[str, Any]:
    """One model, measured on the test items and the text that the recipe names."""
    from sqft.evaluation.measurement import chance_of, measure_model, size_on_disk
    from sqft.models import load_tokenizer, open_checkpoint

    name = cast(ReportedModel, context.stage.removeprefix("evaluate-"))
    directory = context.inputs[model_stage(context.recipe, name)]
    stage = adapter_stage(name)
    adapter = context.inputs[stage] / ADAPTER if stage else None
    splits = context.splits() if context.recipe.data else None
    row, items = measure_model(
        open_model(context, directory, adapter),
        load_tokenizer(context.inputs["model"], trust_remote_code=context.trusts_code),
        splits.test if splits else [],
        context.recipe.evaluate or EvaluateSection(),
        trust_remote_code=context.trusts_code,
        progress=context.progress,
    )
    write_json(context.directory / ITEMS, items)
    grid = open_checkpoint(directory, trust_remote_code=context.trusts_code).grid
    row |= {"name": name, "bits": grid.bits if grid else None}
    row |= {"size_bytes": size_on_disk(directory) + (size_on_disk(adapter) if adapter else 0)}
    about = {"data": splits.report, "chance_accuracy": chance_of(splits.test)} if splits else {}
    return {"row": row, **about}


def export(context: StageContext) -> dict[str, Any]:
    """The recipe's product in the format of a runtime."""
    from sqft.export import export_model

    target = context.stage.removeprefix("export-")
    result = export_model(
        context.inputs[context.recipe.final_stage],
        target,
        context.directory,
        recipe=context.recipe.model_dump(mode="json", exclude={"runtime"}, exclude_none=True),
        evaluation=_evaluated_rows(context),
        progress=context.progress,
    )
    return {"export": result.as_dict()}


def _evaluated_rows(context: StageContext) -> list[dict[str, Any]]:
    """The figures of every model that the recipe has measured by now."""
    stages = [f"evaluate-{name}" for name in context.recipe.reported_models()]
    return [Manifest.read(context.inputs[s]).metrics["row"] for s in stages if s in context.inputs]


def _stored_weight(weight: "MergedWeight") -> "Tensor | QuantizedWeight":
    from sqft.models import QuantizedWeight

    if weight.codes is not None and weight.qparams is not None:
        return QuantizedWeight(weight.codes, weight.qparams)
    assert weight.weight is not None
    return weight.weight


def _tell_kept_zeros(count: int) -> None:
    """Say that a model arrives sparse, where the recipe does not sparsify it."""
    if count:
        logger.warning(
            "%d linears arrive sparse; their zeros are kept, as the recipe has no sparsify section",
            count,
        )


def _check_digest(digest: str, trained: str | None) -> None:
    """The adapter read from disk must give the codes that the model in memory had when training ended."""
    if trained is not None and trained != digest:
        raise CertificateError(
            "the adapter read from disk gives other codes than the trained model had; delete the train stage "
            "and run again"
        )


def _facts(context: StageContext) -> dict[str, Any]:
    """What sqft.json of a merged model says."""
    recipe = context.recipe
    return {
        "kind": "merged",
        "method": context.adapters.method,
        "pattern": recipe.pattern,
        "quantization": recipe.quantize.model_dump(mode="json") if recipe.quantize else None,
        "ranks": Manifest.read(context.inputs["search"]).metrics["ranks"],
        "lineage": {name: Manifest.read(context.inputs[name]).key for name in ("train", "search")},
        "recipe": recipe.model_dump(mode="json", include=DETERMINING, exclude_none=True),
    }


def open_model(context: StageContext, directory: Path, adapter: Path | None) -> "PreTrainedModel":
    """A model for inference in float32, with its adapter if it has one."""
    from sqft.models import load_model

    if adapter is not None:
        return open_adapted(context, directory, adapter).eval()
    return load_model(directory, **context.loading).eval()


def open_adapted(context: StageContext, directory: Path, adapter: Path) -> Any:
    """The base as it was trained on, with the adapter from a directory."""
    from peft import PeftConfig, PeftModel

    import sqft.adapters  # noqa: F401  enters the method into PEFT's tables
    from sqft.models import load_model, load_trainable

    if PeftConfig.from_pretrained(adapter).peft_type == "LORA":  # stock PEFT wants the base in one dtype
        base = load_model(directory, **context.loading)
    else:
        precision = context.adapters.base_precision
        base = load_trainable(
            directory, base_precision=precision, device=context.device, trust_remote_code=context.trusts_code
        )
    return PeftModel.from_pretrained(base, adapter)
