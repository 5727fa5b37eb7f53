"""Climbing the rungs of a merge: write the model of each, measure it, and stop where enough is kept."""

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from torch import Tensor, nn

from sqft.adapters.lora_files import ForeignAdapter
from sqft.foreign.erasure import Weight, adapted_layers, round_update
from sqft.foreign.rungs import polish_weights, walk_rung
from sqft.models import Checkpoint, CheckpointWriter, load_model, open_checkpoint
from sqft.progress import Progress

__all__ = ["Climb", "Measure", "RungResult", "best_rung", "climb_rungs"]

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
    polish_steps: int
    seed: int
    progress: Progress

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
                steps=self.polish_steps,
                seed=self.seed,
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


def climb_rungs(
    climb: Climb,
    rungs: list[str],
    measure: Measure | None,
    base_loss: float | None,
    aim: float | None,
    enough: float,
    on_rung: Callable[[RungResult], None],
) -> list[RungResult]:
    """The rungs that were climbed. aim: the unmerged loss; what it is below that of the base is the gain."""
    results: list[RungResult] = []
    for rung in rungs:
        climb.write(rung, best_rung(results).name if results else _first(climb, rung))
        loss = None if measure is None else measure(load_model(climb.work / rung))
        if loss is not None and not math.isfinite(loss):
            loss = math.inf
        retention = None
        if (
            loss is not None
            and loss < math.inf
            and base_loss is not None
            and aim is not None
            and base_loss > aim
        ):
            retention = (base_loss - loss) / (base_loss - aim)
        results.append(RungResult(rung, loss, retention))
        on_rung(results[-1])
        if measure is None or (retention is not None and retention >= enough):
            break
    return results


def _first(climb: Climb, rung: str) -> str | None:
    """polish alone starts from plain rounding."""
    if rung != "polish":
        return None
    climb.write("round", None)
    return "round"


def best_rung(results: list[RungResult]) -> RungResult:
    """The rung with the smallest loss, the first where none was measured."""
    return min(results, key=lambda result: math.inf if result.loss is None else result.loss)


def _write_rung(
    directory: Path, base: Checkpoint, weights: Iterable[tuple[str, Weight]], masks: Mapping[str, Tensor]
) -> None:
    if directory.exists():
        shutil.rmtree(directory)
    writer = CheckpointWriter(directory, base)
    stored = masks if (base.directory / "sqft_masks.safetensors").is_file() else {}
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
    facts = base.directory / "sqft.json"
    writer.close()
    if facts.is_file():
        shutil.copyfile(facts, directory / facts.name)
