"""Merging an adapter that was trained elsewhere, rung by rung, and telling what each rung keeps."""

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sqft.adapters.lora_files import ForeignAdapter, open_foreign_adapter
from sqft.artifacts import digest_file, write_json
from sqft.directories import check_destination, new_directory
from sqft.errors import AdapterError, ExportError
from sqft.foreign.base import convert_base, convert_training_base
from sqft.foreign.climb import Climb, Measure, RungResult, best_rung, climb_rungs
from sqft.foreign.erasure import (
    LayerErasure,
    VisibleMasks,
    adapted_layers,
    layer_erasure,
)
from sqft.models import Checkpoint, load_model, open_checkpoint
from sqft.models.files import write_directory
from sqft.models.tensorfile import TensorSpec
from sqft.models.writer import StoredMasks
from sqft.progress import SILENT, Progress

__all__ = ["RUNGS", "SAME_ITEMS", "MergeResult", "merge_foreign"]

RUNGS = ("round", "feedback", "refit", "polish")
MERGE = "sqft_merge.json"
SAME_ITEMS = (
    "the rung was chosen on the items that its retention was measured on, so it is told slightly too well"
)


@dataclass(frozen=True)
class MergeResult:
    """What a merge found. erasure: of plain rounding; losses: None where nothing was given to measure on.

    unmerged_loss: of the adapter on the dequantized base; trained_on_loss: of the adapter on the base that it
    was trained on, where another one was named. skipped: rungs that were asked for and not tried, and why.
    sources: the sha256 of the files of base and adapter. The rung is chosen by the loss that is told.
    """

    directory: Path
    erasure: list[LayerErasure]
    base_loss: float | None
    unmerged_loss: float | None
    trained_on_loss: float | None = None
    rungs: list[RungResult] = field(default_factory=list)
    chosen: str = ""
    skipped: dict[str, str] = field(default_factory=dict)
    sources: dict[str, dict[str, str]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = asdict(self) | {"directory": self.directory.name}
        for rung in values["rungs"]:
            if rung["loss"] is not None and not math.isfinite(rung["loss"]):
                rung["loss"] = None  # JSON has no infinity
        return values | {"note": None if self.base_loss is None else SAME_ITEMS}


def merge_foreign(
    base_dir: Path,
    adapter_dir: Path,
    output_dir: Path,
    *,
    calibration: Int[Tensor, "n length"] | None = None,
    measure: Measure | None = None,
    trained_on: str | Path | None = None,
    dequantize: bool = False,
    rungs: Iterable[str] = RUNGS,
    enough: float = 0.95,
    least: float = 0.5,
    polish_steps: int = 60,
    seed: int = 0,
    on_erasure: Callable[[list[LayerErasure]], None] = lambda layers: None,
    on_losses: Callable[[float, float, float | None], None] = lambda base, unmerged, trained_on: None,
    on_rung: Callable[[RungResult], None] = lambda rung: None,
    on_skipped: Callable[[str, str], None] = lambda rung, reason: None,
    progress: Progress = SILENT,
) -> MergeResult:
    """Merge a LoRA, rsLoRA or DoRA adapter into a GPTQ, AWQ, compressed-tensors or 16-bit (sparse) base.

    calibration: token ids for feedback, refit and polish. measure: the loss of a model, lower is better;
    without it only the first rung is climbed, and refused where plain rounding keeps less than `least` of
    the update itself, as it does of an ordinary adapter on an integer grid. trained_on: the base that the
    adapter was trained on, if it is another one, as `convert_training_base` takes it: the adapter's gain
    is measured there. dequantize: take a GPTQ, AWQ or NF4 base as 16-bit weights. The ladder ends at the
    first rung that retains `enough` of the adapter's gain; the best rung is written, unless it retains
    less than `least`. on_erasure and on_losses (base, unmerged, trained_on) are called before the first
    rung, on_rung after each and on_skipped (rung, reason) for those left out, so that all is known where
    the merge is then refused.
    Converting, round and writing hold one linear in memory, feedback and refit one block; polish and
    measuring hold whole models.

    Raises: AdapterError if the adapter does not fit; ModelError if a base is not understood or its grid
    cannot be kept; ExportError if a rung is unknown or lacks what it needs, or too little would survive.
    """
    rungs = list(rungs)
    unknown = [rung for rung in rungs if rung not in RUNGS]
    if unknown or not rungs:
        raise ExportError(f"rung {', '.join(unknown) or '(none)'} is unknown; choose from {', '.join(RUNGS)}")
    if trained_on is not None and measure is None:
        raise ExportError("the base that the adapter was trained on is there to measure on; give data too")
    skipped = {rung: "needs calibration data" for rung in rungs if calibration is None and rung != "round"}
    rungs = [rung for rung in rungs if rung not in skipped]
    if not rungs:
        raise ExportError(f"{', '.join(skipped)}: calibration data is needed (--data); without it only round")
    check_destination(output_dir, base_dir, adapter_dir, trained_on)
    with new_directory(output_dir) as partial:
        work = partial / "work"
        work.mkdir()
        adapter = open_foreign_adapter(adapter_dir)
        source = convert_base(base_dir, work / "base", dequantize=dequantize, progress=progress)
        checkpoint = open_checkpoint(source)
        _check_fit(checkpoint, adapter)
        if checkpoint.grid is None:
            skipped |= {rung: "the base has no grid" for rung in rungs if rung in {"feedback", "refit"}}
            rungs = [rung for rung in rungs if rung not in skipped]
            if not rungs:
                raise ExportError("no rung fits a base without a grid; ask for round or polish")
        masks: Mapping[str, Tensor] = StoredMasks(source)
        if source == base_dir and not masks:  # the zeros of a converted base may come from rounding
            masks = VisibleMasks(checkpoint, adapter.names)
        erasure = []
        with progress.task("update", len(adapter.names)) as advance:
            for layer in adapted_layers(checkpoint, adapter, masks):
                erasure.append(layer_erasure(*layer))
                advance(1)
        on_erasure(erasure)
        if measure is None:
            _check_kept(erasure, least)
        _write_adapted(checkpoint, adapter, work / "adapted")
        climb = Climb(checkpoint, adapter, masks, work, calibration, polish_steps, seed, progress)
        base_loss = _finite_loss(measure, source, "the base")
        unmerged_loss = _finite_loss(measure, work / "adapted", "the unmerged model")
        trained_on_loss = None
        if trained_on is not None and measure is not None:
            home = _write_trained_on(trained_on, adapter, work, progress)
            trained_on_loss = _finite_loss(measure, home, "the base that the adapter was trained on")
        if base_loss is not None and unmerged_loss is not None:
            on_losses(base_loss, unmerged_loss, trained_on_loss)
        for rung, reason in skipped.items():
            on_skipped(rung, reason)
        aim = unmerged_loss if trained_on is None else trained_on_loss
        results = climb_rungs(climb, rungs, measure, base_loss, aim, enough, on_rung)
        why = "nothing to measure on" if measure is None else f"{results[-1].name} retains enough"
        for rung in rungs[len(results) :]:
            skipped[rung] = why
            on_skipped(rung, why)
        best = best_rung(results)
        if best.loss is not None and not math.isfinite(best.loss):
            raise ExportError("no rung gives a finite loss; serve the adapter unmerged")
        if best.retention is not None and best.retention < least:
            raise ExportError(
                f"merging would lose the adapter: the best rung, {best.name}, retains "
                f"{best.retention:.0%} of its gain (at least {least:.0%} is asked); "
                "serve it unmerged, or train it on this grid"
            )
        _move(work / best.name, partial)
        shutil.rmtree(work)
        result = MergeResult(
            output_dir,
            erasure,
            base_loss,
            unmerged_loss,
            trained_on_loss,
            results,
            best.name,
            skipped,
            {"base": _digests(base_dir), "adapter": _digests(adapter_dir)},
        )
        write_json(partial / MERGE, result.as_dict())
    return result


def _check_kept(layers: list[LayerErasure], least: float) -> None:
    """Refuse a merge that nobody measures and that would all but ship the base.

    What is kept of a layer is 1 - erased; layers count alike, as in the mean that is told.

    Raises: ExportError.
    """
    kept = 1 - sum(layer.erased for layer in layers) / max(len(layers), 1)
    if kept < least:
        raise ExportError(
            f"plain rounding keeps {max(kept, 0):.1%} of the update (at least {least:.0%} is asked), so that "
            "the base would be written; give items to measure on (--data), with which further rungs are "
            "climbed, or serve the adapter unmerged"
        )


def _digests(directory: Path) -> dict[str, str]:
    """The sha256 of the weights and configurations in a directory."""
    files = (path for path in sorted(directory.iterdir()) if path.suffix in {".safetensors", ".json"})
    return {path.name: digest_file(path) for path in files}


def _finite_loss(measure: Measure | None, directory: Path, what: str) -> float | None:
    """Raises: ExportError if the loss of a model that is compared with is not finite."""
    if measure is None:
        return None
    loss = measure(load_model(directory))
    if not math.isfinite(loss):
        raise ExportError(f"the loss of {what} is not finite; look at the model and the data")
    return loss


def _check_fit(checkpoint: Checkpoint, adapter: ForeignAdapter) -> None:
    for name in adapter.names:
        if name not in checkpoint.linears:
            raise AdapterError(f"the adapter is for {name}, which the base does not have")
        key = f"{name}.weight"
        if name not in checkpoint.quantized_names and (
            key in checkpoint.tied_weights or key not in checkpoint.names
        ):
            raise AdapterError(
                f"the adapter is for {name}, which the base ties to its embedding; one weight cannot serve "
                "both: train without it, or merge onto a copy with tie_word_embeddings false and its own head"
            )
    for name, stored in adapter.copies():
        if name not in checkpoint.names or not _same(checkpoint.tensor(name), stored):
            raise AdapterError(
                f"the adapter brings its own {name}, another one than the base's; save it with "
                "save_embedding_layers=False if it was not trained"
            )


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, or become so when one is rounded to the dtype of the other."""
    if one.shape != other.shape:
        return False
    return torch.equal(one.to(other.dtype), other) or torch.equal(other.to(one.dtype), one)


def _write_adapted(checkpoint: Checkpoint, adapter: ForeignAdapter, directory: Path) -> None:
    """The unmerged model as a dense float32 one, written a tensor at a time."""
    quantized, adapted = set(checkpoint.quantized_names), set(adapter.names)
    shapes = checkpoint.linears
    specs: dict[str, TensorSpec] = {f"{name}.weight": (torch.float32, shapes[name]) for name in quantized}
    for name in checkpoint.names:
        linear, _, end = name.rpartition(".")
        if linear not in quantized or end == "bias":
            specs[name] = (torch.float32, checkpoint.shape(name))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in specs:
            linear = name.removesuffix(".weight")
            value = checkpoint.weight(linear) if linear in quantized else checkpoint.tensor(name)
            if linear in adapted and name.endswith(".weight"):
                value = adapter.adapted(linear, value)
            yield name, value.float()

    config = checkpoint.config.to_dict()
    config.pop("quantization_config", None)
    write_directory(directory, checkpoint.directory, config | {"dtype": "float32"}, specs, tensors())


def _write_trained_on(base: str | Path, adapter: ForeignAdapter, work: Path, progress: Progress) -> Path:
    """The adapter on the base that it was trained on, unmerged."""
    source = convert_training_base(str(base), work / "trained_on_base", progress=progress)
    checkpoint = open_checkpoint(source)
    _check_fit(checkpoint, adapter)
    _write_adapted(checkpoint, adapter, work / "trained_on")
    return work / "trained_on"


def _move(source: Path, target: Path) -> None:
    for path in source.iterdir():
        shutil.move(path, target / path.name)
