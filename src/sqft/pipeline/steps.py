"""What each stage does: open the finished directories it reads, call one package, save, return figures.

The packages know modules and tensors; only this file knows which directory holds what.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft.artifacts import write_json
from sqft.errors import CertificateError
from sqft.pipeline.recipe import Recipe
from sqft.progress import Progress
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

    from sqft.data import Splits

__all__ = [
    "StageContext",
    "evaluate",
    "export",
    "merge",
    "quantize",
    "search",
    "sparsify",
    "train",
    "train_dense",
]

ADAPTER = "adapter"
REFERENCE_ITEMS = 4


@dataclass(frozen=True)
class StageContext:
    """What a stage may use: the recipe, the directories of its inputs, and its own directory to fill."""

    recipe: Recipe
    stage: str
    final: Path
    inputs: Mapping[str, Path]
    device: str
    progress: Progress
    directory: Path = Path()

    def working_in(self, directory: Path) -> "StageContext":
        """The same context, with the unfinished directory to fill."""
        return replace(self, directory=directory)

    @property
    def base(self) -> Path:
        """The model directory that the adapters stand on."""
        return self.inputs[self.recipe.base_stage]

    @property
    def adapters(self) -> AdapterSection:
        """The adapters section of a recipe that has a train stage."""
        assert self.recipe.adapters is not None
        return self.recipe.adapters

    def splits(self) -> "Splits":
        """The training, search and test items, tokenized."""
        from sqft.data import load_splits
        from sqft.models import load_tokenizer

        assert self.recipe.data is not None
        tokenizer = load_tokenizer(self.inputs["model"])
        return load_splits(self.recipe.data, tokenizer, seed=self.recipe.seed)

    def calibration(self) -> "Tensor | None":
        """The calibration tokens (num_samples, sequence_length), where a method wants them."""
        if not self.recipe.needs_calibration:
            return None
        from sqft.data import calibration_tokens
        from sqft.models import load_tokenizer

        section = self.recipe.calibration or CalibrationSection()
        tokenizer = load_tokenizer(self.inputs["model"])
        return calibration_tokens(section, self.recipe.data, tokenizer, seed=self.recipe.seed)


def sparsify(context: StageContext) -> dict[str, Any]:
    """model → masks and a sparse 16-bit model."""
    from sqft.compression import sparsify_model
    from sqft.models import CheckpointWriter, open_checkpoint

    section = context.recipe.sparsify or SparsifySection()
    checkpoint = open_checkpoint(context.inputs["model"])
    writer = CheckpointWriter(context.directory, checkpoint)
    layers = sparsify_model(
        checkpoint, section, context.calibration(), writer, device=context.device, progress=context.progress
    )
    writer.close()
    return {"layers": [layer.as_dict() for layer in layers]}


def quantize(context: StageContext) -> dict[str, Any]:
    """The dense model and the masks → a compressed-tensors model, and the weights before rounding."""
    from sqft.compression import quantize_model
    from sqft.models import CheckpointWriter, open_checkpoint, read_masks

    section = context.recipe.quantize or QuantizeSection()
    masks = read_masks(context.inputs["sparsify"]) if context.recipe.sparsify else None
    checkpoint = open_checkpoint(context.inputs["model"])
    writer = CheckpointWriter(context.directory, checkpoint)
    layers = quantize_model(
        checkpoint,
        masks,
        section,
        context.calibration(),
        writer,
        device=context.device,
        progress=context.progress,
    )
    writer.close()
    return {"layers": [layer.as_dict() for layer in layers]}


def train(context: StageContext) -> dict[str, Any]:
    """The base → a super-adapter (or an adapter of one rank)."""
    return _train(context, context.base, context.adapters)


def train_dense(context: StageContext) -> dict[str, Any]:
    """The dense reference: plain LoRA on the model as it came, with the same data and budget."""
    from sqft.pipeline.stages import dense_adapters

    return _train(context, context.inputs["model"], dense_adapters(context.adapters))


def _train(context: StageContext, base: Path, section: AdapterSection) -> dict[str, Any]:
    from sqft.adapters import SearchSpace, attach_adapters, base_identity, codes_digest, set_ranks
    from sqft.data import batches_of
    from sqft.models import load_trainable
    from sqft.training import train_adapters

    model = load_trainable(base, base_precision=section.base_precision, device=context.device)
    adapted = attach_adapters(model, section, base_identity(model, section), seed=context.recipe.seed)
    space = SearchSpace.of(adapted)
    splits = context.splits()
    record = train_adapters(
        adapted,
        splits.train,
        context.recipe.train or TrainSection(),
        loss_on=context.recipe.data.loss_on if context.recipe.data else "answer",
        seed=context.recipe.seed,
        output_dir=context.directory / "checkpoints",
        space=space,
        progress=context.progress,
    )
    digests = {}
    for name, ranks in (
        ("maximal", space.maximal()),
        ("median", space.median()),
        ("minimal", space.minimal()),
    ):
        set_ranks(adapted, ranks)
        digests[name] = codes_digest(adapted)
    set_ranks(adapted, space.maximal())
    adapted.save_pretrained(context.directory / ADAPTER)
    write_json(context.directory / "training.json", record.as_dict())
    shutil.rmtree(context.directory / "checkpoints", ignore_errors=True)
    return {"codes_digest": digests, "data": splits.report, **record.summary()}


def search(context: StageContext) -> dict[str, Any]:
    """The super-adapter → the ranks that do best on the search items, cut out as an adapter of its own."""
    from sqft.adapters import SearchSpace, codes_digest, extract_sub_adapter, set_ranks
    from sqft.evaluation import evaluate_loss
    from sqft.search import search_sub_adapter

    section = context.recipe.search or SearchSection()
    adapted = open_adapted(context, context.base, context.inputs["train"] / ADAPTER)
    space = SearchSpace.of(adapted)
    items = context.splits().search if section.method == "hill_climb" else []

    def objective(sub_adapter: dict[str, int]) -> float:
        set_ranks(adapted, sub_adapter)
        return evaluate_loss(adapted, items).loss

    result = search_sub_adapter(
        space,
        objective,
        section,
        seed=context.recipe.seed,
        storage=context.directory / "trials.log",
        progress=context.progress,
    )
    extract_sub_adapter(adapted, result.best, context.directory / ADAPTER)
    set_ranks(adapted, result.best)
    trials = [{"ranks": trial.ranks, "loss": trial.loss} for trial in result.trials]
    write_json(context.directory / "sub_adapter.json", {"ranks": result.best, "trials": trials})
    return {"ranks": result.best, "codes_digest": codes_digest(adapted), "num_trials": len(trials)}


def merge(context: StageContext) -> dict[str, Any]:
    """The base and the sub-adapter → one model, re-opened and certified before it is called done."""
    from sqft.adapters import merge_adapters
    from sqft.certificate import certify_model
    from sqft.models import load_model, write_merged

    adapter = context.inputs["search"] / ADAPTER
    adapted = open_adapted(context, context.base, adapter).eval()
    write_merged(context.base, context.directory, merge_adapters(adapted))
    tokens = [example.prompt_ids for example in context.splits().test[:REFERENCE_ITEMS]]
    checks = certify_model(
        context.directory,
        base_dir=context.base,
        adapter_dir=adapter,
        adapted=adapted,
        merged=load_model(context.directory, device=context.device),
        token_ids=tokens,
    )
    failed = [f"{check.name} ({check.detail})" for check in checks if not check.passed]
    if failed:
        shutil.rmtree(context.directory)
        raise CertificateError(f"the merged model is not the one that was trained: {'; '.join(failed)}")
    return {"checks": [vars(check) for check in checks]}


def evaluate(context: StageContext) -> dict[str, Any]:
    """One model, measured on the test items."""
    from sqft.artifacts import directory_bytes
    from sqft.evaluation import evaluate_accuracy, evaluate_loss, evaluate_perplexity
    from sqft.pipeline.stages import adapter_stage, model_stage

    name: ReportedModel = context.stage.removeprefix("evaluate-")  # type: ignore[assignment]
    section = context.recipe.evaluate or EvaluateSection()
    directory = context.inputs[model_stage(context.recipe, name)]
    stage = adapter_stage(name)
    adapter = context.inputs[stage] / ADAPTER if stage else None
    model = open_model(context, directory, adapter)
    return {}


def open_model(context: StageContext, directory: Path, adapter: Path | None) -> "PreTrainedModel":
    """A model for inference in float32, with its adapter if it has one."""
    from sqft.models import load_model

    if adapter is not None:
        return open_adapted(context, directory, adapter).eval()
    return load_model(directory, device=context.device).eval()


def open_adapted(context: StageContext, directory: Path, adapter: Path) -> Any:
    """The base as it was trained on, with the adapter from a directory."""
    from peft import PeftModel

    import sqft.adapters  # noqa: F401  enters the method into PEFT's tables
    from sqft.models import load_trainable

    base = load_trainable(directory, base_precision=context.adapters.base_precision, device=context.device)
    return PeftModel.from_pretrained(base, adapter)
