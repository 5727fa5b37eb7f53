"""Merging an adapter that was trained elsewhere, rung by rung, and telling what each rung keeps."""

import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sqft.adapters.lora_files import ForeignAdapter, open_foreign_adapter
from sqft.artifacts import MERGE_RECORD, digest_file, write_json
from sqft.directories import check_destination, new_directory
from sqft.errors import ExportError
from sqft.foreign.base import convert_base, convert_training_base
from sqft.foreign.climb import Climb, Measure, RungResult, best_rung
from sqft.foreign.erasure import (
    LayerErasure,
    VisibleMasks,
    adapted_layers,
    layer_erasure,
)
from sqft.foreign.fit import check_fit
from sqft.models import Checkpoint, load_model, open_checkpoint
from sqft.models.files import write_directory
from sqft.models.tensorfile import TensorSpec
from sqft.models.writer import StoredMasks
from sqft.progress import SILENT, Progress
from sqft.sections import MergeSection

__all__ = ["SAME_ITEMS", "MergeObserver", "MergeResult", "merge_foreign"]

NEEDS_GRID = {"feedback", "rescale"}
SAME_ITEMS = (
    "the rung was chosen on the items that its retention was measured on, so it is reported slightly "
    "optimistically"
)


@dataclass(frozen=True)
class MergeResult:
    """What a merge found. erasure: of plain rounding; losses: None where nothing was given to measure on.

    unmerged_loss: of the adapter on the dequantized base; trained_on_loss: of the adapter on the base that it
    was trained on, where another one was named. skipped: rungs that were asked for and not tried, and why.
    sources: the sha256 of the files of base and adapter. The rung is chosen by the very loss that is
    reported, which is therefore slightly optimistic.
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


class MergeObserver:
    """Told what a merge finds as it finds it, so that all is known where the merge is then refused."""

    def on_erasure(self, layers: list[LayerErasure]) -> None:
        """What plain rounding would erase of every layer; before the first rung."""

    def on_losses(self, base: float, unmerged: float, trained_on: float | None) -> None:
        """The losses that rungs are compared with, where they are measured; before the first rung."""

    def on_rung(self, rung: RungResult) -> None:
        """A rung that was climbed."""

    def on_skipped(self, rung: str, reason: str) -> None:
        """A rung that was asked for and left out."""


@dataclass(frozen=True)
class _Pair:
    """A base and an adapter that fit together: as they were given, and opened."""

    base_dir: Path
    adapter_dir: Path
    checkpoint: Checkpoint
    adapter: ForeignAdapter
    masks: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Losses:
    """The losses that rungs are compared with; all None where nothing is measured."""

    base: float | None = None
    unmerged: float | None = None
    trained_on: float | None = None

    @property
    def aim(self) -> float | None:
        """The loss of the adapter on the base it was trained on, where that is known, else on this base."""
        return self.unmerged if self.trained_on is None else self.trained_on


def merge_foreign(
    base_dir: Path,
    adapter_dir: Path,
    output_dir: Path,
    section: MergeSection | None = None,
    *,
    calibration: Int[Tensor, "n length"] | None = None,
    measure: Measure | None = None,
    observer: MergeObserver | None = None,
    progress: Progress = SILENT,
) -> MergeResult:
    """Merge a LoRA, rsLoRA or DoRA adapter into a GPTQ, AWQ, compressed-tensors or 16-bit (sparse) base.

    calibration: token ids for feedback, rescale and polish. measure: the loss of a model, lower is better;
    without it only the first rung is climbed, and refused where plain rounding keeps less than `least` of
    the update itself, as it does of an ordinary adapter on an integer grid. The ladder ends at the first rung
    that retains `enough` of the adapter's gain, which is measured on `trained_on` where that is another base;
    the best rung is written, unless it retains less than `least`.
    Converting, round and writing hold one linear in memory, feedback and rescale one block; polish and
    measuring hold whole models.

    Raises: AdapterError if the adapter does not fit; ModelError if a base is not understood or its grid
    cannot be kept; ExportError if a rung lacks what it needs, or too little would survive.
    """
    section, observer = section or MergeSection(), observer or MergeObserver()
    skipped = _without_data(section, calibration, measure)
    check_destination(output_dir, base_dir, adapter_dir, section.trained_on)
    with new_directory(output_dir) as partial:
        work = partial / "work"
        work.mkdir()
        pair = _open_pair(base_dir, adapter_dir, work, dequantize=section.dequantize, progress=progress)
        if pair.checkpoint.grid is None:
            skipped |= {rung: "the base has no grid" for rung in section.rungs if rung in NEEDS_GRID}
        rungs = [rung for rung in section.rungs if rung not in skipped]
        if not rungs:
            raise ExportError("no rung fits a base without a grid; ask for round or polish")
        erasure = _survey(pair, observer, progress)
        if measure is None:
            _check_kept(erasure, section.least)
        _write_adapted(pair.checkpoint, pair.adapter, work / "adapted")
        losses = _measure_around(pair, section.trained_on, work, measure, progress)
        if losses.base is not None and losses.unmerged is not None:
            observer.on_losses(losses.base, losses.unmerged, losses.trained_on)
        for rung, reason in skipped.items():
            observer.on_skipped(rung, reason)
        climb = Climb(pair.checkpoint, pair.adapter, pair.masks, work, calibration, section, progress)
        results = climb.rungs(rungs, measure, losses.base, losses.aim, observer.on_rung)
        why = "nothing to measure on" if measure is None else f"{results[-1].name} retains enough"
        for rung in rungs[len(results) :]:
            skipped[rung] = why
            observer.on_skipped(rung, why)
        best = best_rung(results)
        _check_best(best, section.least)
        _move(work / best.name, partial)
        shutil.rmtree(work)
        result = MergeResult(
            output_dir,
            erasure,
            losses.base,
            losses.unmerged,
            losses.trained_on,
            results,
            best.name,
            skipped,
            {"base": _digests(base_dir), "adapter": _digests(adapter_dir)},
        )
        write_json(partial / MERGE_RECORD, result.as_dict())
    return result


def _without_data(
    section: MergeSection, calibration: Tensor | None, measure: Measure | None
) -> dict[str, str]:
    """The rungs that cannot be climbed without calibration data, and why.

    Raises: ExportError if none is left, or a base to measure on is there and no data.
    """
    if section.trained_on is not None and measure is None:
        raise ExportError("the base that the adapter was trained on is there to measure on; give data too")
    if calibration is not None:
        return {}
    skipped: dict[str, str] = {rung: "needs calibration data" for rung in section.rungs if rung != "round"}
    if "round" not in section.rungs:
        raise ExportError(f"{', '.join(skipped)}: calibration data is needed (--data); without it only round")
    return skipped


def _open_pair(
    base_dir: Path, adapter_dir: Path, work: Path, *, dequantize: bool, progress: Progress
) -> _Pair:
    """Open both, the base converted where another tool quantized it.

    Raises: AdapterError, ModelError.
    """
    adapter = open_foreign_adapter(adapter_dir)
    source = convert_base(base_dir, work / "base", dequantize=dequantize, progress=progress)
    checkpoint = open_checkpoint(source)
    check_fit(checkpoint, adapter)
    masks: Mapping[str, Tensor] = StoredMasks(source)
    if source == base_dir and not masks:  # the zeros of a converted base may come from rounding
        masks = VisibleMasks(checkpoint, adapter.names)
    return _Pair(base_dir, adapter_dir, checkpoint, adapter, masks)


def _survey(pair: _Pair, observer: MergeObserver, progress: Progress) -> list[LayerErasure]:
    """What plain rounding would erase, layer by layer."""
    erasure = []
    with progress.task("update", len(pair.adapter.names)) as advance:
        for layer in adapted_layers(pair.checkpoint, pair.adapter, pair.masks):
            erasure.append(layer_erasure(*layer))
            advance(1)
    observer.on_erasure(erasure)
    return erasure


def _measure_around(
    pair: _Pair, trained_on: str | None, work: Path, measure: Measure | None, progress: Progress
) -> _Losses:
    """The losses of the base, of the unmerged model, and of the adapter where it was trained.

    Raises: ExportError if one of them is not finite.
    """
    if measure is None:
        return _Losses()
    base = _finite_loss(measure, pair.checkpoint.directory, "the base")
    unmerged = _finite_loss(measure, work / "adapted", "the unmerged model")
    if trained_on is None:
        return _Losses(base, unmerged)
    home = _write_trained_on(trained_on, pair.adapter, work, progress)
    return _Losses(base, unmerged, _finite_loss(measure, home, "the base that the adapter was trained on"))


def _check_best(best: RungResult, least: float) -> None:
    """Raises: ExportError if the best rung has no loss that is finite, or keeps too little of the gain."""
    if best.loss is not None and not math.isfinite(best.loss):
        raise ExportError("no rung gives a finite loss; serve the adapter unmerged")
    if best.retention is not None and best.retention < least:
        raise ExportError(
            f"merging would lose the adapter: the best rung, {best.name}, retains "
            f"{best.retention:.0%} of its gain (at least {least:.0%} is asked); "
            "serve it unmerged, or train it on this grid"
        )


def _check_kept(layers: list[LayerErasure], least: float) -> None:
    """Refuse a merge that is not measured and would write hardly more than the base.

    What is kept of a layer is 1 - erased; layers count alike, as in the mean that is told.

    Raises: ExportError.
    """
    kept = 1 - sum(layer.erased for layer in layers) / max(len(layers), 1)
    if kept < least:
        raise ExportError(
            f"plain rounding keeps {max(kept, 0):.1%} of the update (at least {least:.0%} is asked), so that "
            "little but the base would be written; give items to measure on (--data), so that more rungs can "
            "be tried, or serve the adapter unmerged"
        )


def _digests(directory: Path) -> dict[str, str]:
    """The sha256 of the weights and configurations in a directory."""
    files = (path for path in sorted(directory.iterdir()) if path.suffix in {".safetensors", ".json"})
    return {path.name: digest_file(path) for path in files}


def _finite_loss(measure: Measure, directory: Path, what: str) -> float:
    """Raises: ExportError if the loss of a model that is compared with is not finite."""
    loss = measure(load_model(directory))
    if not math.isfinite(loss):
        raise ExportError(f"the loss of {what} is not finite; look at the model and the data")
    return loss


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


def _write_trained_on(base: str, adapter: ForeignAdapter, work: Path, progress: Progress) -> Path:
    """The adapter on the base that it was trained on, unmerged."""
    source = convert_training_base(base, work / "trained_on_base", progress=progress)
    checkpoint = open_checkpoint(source)
    check_fit(checkpoint, adapter)
    _write_adapted(checkpoint, adapter, work / "trained_on")
    return work / "trained_on"


def _move(source: Path, target: Path) -> None:
    for path in source.iterdir():
        shutil.move(path, target / path.name)
