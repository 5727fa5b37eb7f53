"""Climbing the rungs of a merge: write the model of each, measure it, and stop where enough is kept."""

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from torch import Tensor, nn

from sqft.adapters.lora_files import ForeignAdapter
from sqft.artifacts import FACTS, MASKS
from sqft.foreign.erasure import Weight, adapted_layers, round_update
from sqft.foreign.rungs import polish_weights, walk_rung
from sqft.models import Checkpoint, CheckpointWriter, load_model, open_checkpoint
from sqft.progress import Progress
from sqft.sections import MergeSection

__all__ = ["Climb", "Measure", "RungResult", "best_rung"]

Measure = Callable[[nn.Module], float]


@dataclass(frozen=True)
class RungResult:
    """One rung: the loss, and the share of the adapter's gain that survives (None: no gain)."""

    name: str
    loss: float | None
    retention: float | None


@dataclass
class Climb:
    """What all rungs need, and the best weights so far for the last one to start from."""

    checkpoint: Checkpoint
    adapter: ForeignAdapter
    masks: Mapping[str, Tensor]
    work: Path
    calibration: Tensor | None
    section: MergeSection
    progress: Progress

    def rungs(
        self,
        rungs: Sequence[str],
        measure: Measure | None,
        base_loss: float | None,
        aim: float | None,
        on_rung: Callable[[RungResult], None],
    ) -> list[RungResult]:
        """Climb until a rung retains enough; returns those that were climbed.

        aim: the loss of the unmerged adapter; what it is below base_loss is the gain.
        """
        results: list[RungResult] = []
        for rung in rungs:
            self.write(rung, best_rung(results).name if results else self._first(rung))
            loss = None if measure is None else measure(load_model(self.work / rung))
            if loss is not None and not math.isfinite(loss):
                loss = math.inf
            retention = None
            if loss is not None and loss < math.inf:
                retention = _retention(loss, base_loss, aim)
            results.append(RungResult(rung, loss, retention))
            on_rung(results[-1])
            if measure is None or (retention is not None and retention >= self.section.enough):
                break
        return results

    def _first(self, rung: str) -> str | None:
        """The weights that polish starts from when it is the first rung: those of plain rounding."""
        if rung != "polish":
            return None
        self.write("round", None)
        return "round"

    def write(self, rung: str, start: str | None) -> None:
        """Write the model of a rung to its directory."""
        directory = self.work / rung
        base = self.checkpoint
        plain = [name for name in self.adapter.names if name not in base.quantized_names]
        if rung == "round":
            weights: Iterable[tuple[str, Weight]] = self._rounded(self.adapter.names)
        elif rung == "polish":
            assert self.calibration is not None
            assert start is not None
            before = open_checkpoint(self.work / start)
            first: dict[str, Weight] = {name: before.quantized(name) for name in base.quantized_names}
            first |= {name: before.weight(name) for name in plain}
            weights = polish_weights(
                self.work / start,
                load_model(self.work / "adapted"),
                first,
                self.masks,
                self.calibration,
                steps=self.section.polish_steps,
                seed=self.section.seed,
                progress=self.progress,
            ).items()
        else:
            assert self.calibration is not None
            walked = walk_rung(
                rung,
                base,
                open_checkpoint(self.work / "adapted"),
                self.masks,
                self.adapter.names,
                self.calibration,
                self.progress,
            )
            weights = chain(walked, self._rounded(plain))  # what has no grid is rounded to its dtype
        _write_rung(directory, base, weights, self.masks)

    def _rounded(self, names: list[str]) -> Iterator[tuple[str, Weight]]:
        """Linears with the update rounded to what the base stores."""
        for name, old, adapted, mask in adapted_layers(self.checkpoint, self.adapter, self.masks, names):
            yield name, round_update(old, adapted, mask)


def _retention(loss: float, base_loss: float | None, aim: float | None) -> float | None:
    """The share of the gain that a loss keeps; None where there was no gain."""
    if base_loss is None or aim is None or base_loss <= aim:
        return None
    return (base_loss - loss) / (base_loss - aim)


def best_rung(results: list[RungResult]) -> RungResult:
    """The rung with the smallest loss, the first where none was measured."""
    return min(results, key=lambda result: math.inf if result.loss is None else result.loss)


def _write_rung(
    directory: Path, base: Checkpoint, weights: Iterable[tuple[str, Weight]], masks: Mapping[str, Tensor]
) -> None:
    if directory.exists():
        shutil.rmtree(directory)
    writer = CheckpointWriter(directory, base)
    stored = masks if (base.directory / MASKS).is_file() else {}
    writer.prepare(quantized=base.quantized_names, grid=base.grid, masked=stored)
    written = set()
    for name, weight in weights:
        writer.write_linear(name, weight, mask=stored.get(name))
        written.add(name)
    for name in base.quantized_names:
        if name not in written:
            writer.write_linear(name, base.quantized(name), mask=stored.get(name))
            written.add(name)
    for name in set(stored) - written:
        writer.write_mask(name, stored[name])
    facts = base.directory / FACTS
    writer.close()
    if facts.is_file():
        shutil.copyfile(facts, directory / facts.name)
