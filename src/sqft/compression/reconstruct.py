"""Reconstruct a compressed model: each block fitted to what the dense model puts out there."""

import logging
import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Integer
from torch import Tensor, nn

from sqft.compression.block_fit import FitResult, Pair, fit_block
from sqft.compression.driver import Task, compress_blocks, digest_of_files
from sqft.compression.fitted import FittedLinear, FittedNorm, FittedPart
from sqft.compression.processes import is_alone
from sqft.compression.walk import BlockWalk
from sqft.errors import CompressionError
from sqft.models import Checkpoint, CheckpointWriter, StoredMasks
from sqft.models.blocks import is_norm
from sqft.models.writer import StoredLatents
from sqft.ops import QuantizedWeight
from sqft.progress import SILENT, Progress
from sqft.sections import ReconstructSection

__all__ = ["BlockReport", "reconstruct_model"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockReport:
    """One reconstructed block.

    loss_before, loss_after: squared error of its output relative to the dense one's, mean over held-out
    tokens. epoch: which one was kept; 0: none was better, the block is as it was. num_tokens: that went
    forward and back, all epochs together.
    """

    name: str
    loss_before: float
    loss_after: float
    epoch: int
    num_tokens: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


def reconstruct_model(
    dense: Checkpoint,
    compressed: Checkpoint,
    section: ReconstructSection,
    calibration: Integer[Tensor, "n length"],
    writer: CheckpointWriter,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = SILENT,
    spill: bool = False,
) -> list[BlockReport]:
    """Write the compressed model with other numbers, a block in memory at a time; close the writer yourself.

    dense: what it was compressed from, whose embedding the calibration runs through. writer: on `compressed`,
    whose masks and latent codes are read beside its weights. The last eighth of the sequences is held out.
    spill: keep the calibration's hidden states in memory-mapped files.

    Raises: CompressionError if the calibration has too few sequences, the two are not of one model, nothing
    is compressed, hidden states are not finite, or several processes share the work.
    """
    rows = len(calibration)
    least = section.least_sequences
    if rows < least:
        raise CompressionError(
            f"reconstruct holds sequences out to measure on, and needs {least} or more, not {rows}; raise "
            "calibration.num_samples"
        )
    if not is_alone():
        raise CompressionError("reconstruct runs in one process; start it without torchrun")
    parts = _Parts(dense, compressed, section, torch.device(device))
    held_out = section.held_out(rows)
    with BlockWalk(
        dense,
        calibration,
        device=device,
        dense_stream=True,
        spill_dir=writer.directory / "activations" if spill else None,
        batch_rows=section.batch_size,
        held_out_rows=held_out,
    ) as walk:
        writer.prepare(
            quantized=compressed.quantized_names,
            grid=compressed.grid,
            masked=sorted(parts.masks),
            latent=sorted(parts.latents),
        )

        def compress(name: str) -> list[BlockReport]:
            started = time.perf_counter()
            found = parts.of(name, walk.blocks[name])
            result = _fit(walk, name, found, section, seed) if found else FitResult(0.0, 0.0, 0)
            for inner, part in found.items():
                parts.write(f"{name}.{inner}", part, writer)
                walk.replace(f"{name}.{inner}", part.value().detach())
            tokens = result.num_epochs * (rows - held_out) * calibration.shape[1]
            seconds = time.perf_counter() - started
            return [BlockReport(name, result.before, result.after, result.epoch, tokens, seconds)]

        key = {
            "reconstruct": section.model_dump(mode="json"),
            "seed": seed,
            "dense": digest_of_files(dense),
        }
        task = Task("reconstruct", compress, key, lambda values: BlockReport(**values))
        return compress_blocks(walk, task, writer, calibration, progress)


class _Parts:
    """What of each block is fitted, read from the compressed model when its turn comes."""

    def __init__(
        self, dense: Checkpoint, compressed: Checkpoint, section: ReconstructSection, device: torch.device
    ) -> None:
        self.compressed, self.device = compressed, device
        self.fits = set(section.rates) - (set() if compressed.grid else {"scales"})
        self.masks, self.latents = StoredMasks(compressed.directory), StoredLatents(compressed.directory)
        self.linears = {*compressed.quantized_names, *self.masks}
        if dense.quantized_names or dense.linears != compressed.linears:
            raise CompressionError(
                f"{compressed.directory} is not made from {dense.directory}; give the dense model that it "
                "was compressed from"
            )
        if not self.linears:
            raise CompressionError(
                f"{compressed.directory} is neither sparse nor quantized; there is nothing to reconstruct"
            )
        if not self.fits or (section.train_scales and not compressed.grid):
            raise CompressionError(
                f"reconstruct.train_scales: {compressed.directory} is not quantized and has no scales; fit "
                "weights or norms"
            )

    def of(self, name: str, block: nn.Module) -> dict[str, FittedPart]:
        """The parts of a block by the name of their parameter in it."""
        found: dict[str, FittedPart] = {}
        for inner, module in block.named_modules():
            whole = f"{name}.{inner}"
            if whole in self.linears:
                found[f"{inner}.weight"] = self._linear(whole)
            elif "norms" in self.fits and is_norm(module):
                found[f"{inner}.weight"] = FittedNorm(
                    self.compressed.tensor(f"{whole}.weight").to(self.device)
                )
        return found

    def write(self, name: str, part: FittedPart, writer: CheckpointWriter) -> None:
        """Write what a part has become, by the full name of its parameter."""
        if isinstance(part, FittedLinear):
            weight, latent = part.stored()
            writer.write_linear(name.removesuffix(".weight"), weight, mask=part.mask, latent=latent)
        else:
            writer.write_tensor(name, part.value().detach())

    def _linear(self, name: str) -> FittedLinear:
        compressed, device = self.compressed, self.device
        mask = self.masks[name].to(device) if name in self.masks else None
        if name not in compressed.quantized_names:
            weight = compressed.tensor(f"{name}.weight")
            return FittedLinear(weight.to(device), mask, None, weight.dtype, self.fits)
        stored = compressed.quantized(name)
        latent = self.latents[name].to(device) if name in self.latents else None
        stored = QuantizedWeight(stored.codes.to(device), stored.qparams.to(device))
        return FittedLinear(stored, mask, latent, compressed.storage_dtype, self.fits)


def _fit(
    walk: BlockWalk, name: str, parts: dict[str, FittedPart], section: ReconstructSection, seed: int
) -> FitResult:
    """Train the parts of a block that is loaded, whose targets the dense model's hidden states become."""
    block = walk.blocks[name]
    for inner, part in parts.items():
        walk.replace(f"{name}.{inner}", part.value().detach())
    walk.advance_dense(name)
    pairs: list[Pair] = list(zip(walk.hidden, walk.dense_hidden, strict=True))
    split = len(pairs) - walk.held_out

    def run(hidden: Tensor, weights: dict[str, Tensor]) -> Tensor:
        return walk.call(name, block, hidden, weights)

    result = fit_block(
        run,
        parts,
        pairs[:split],
        pairs[split:],
        rates=section.rates,
        epochs=section.epochs,
        seed=seed,
    )
    if not math.isfinite(result.before):
        raise CompressionError(
            f"{name} puts out NaN or infinity on the calibration; the model or its compression is damaged, "
            "make it again"
        )
    if result.diverged:
        logger.warning("%s: the loss became NaN while it was fitted; lower reconstruct.learning_rate", name)
    elif not result.epoch:
        logger.warning("%s: no epoch was better on the held-out sequences; it stays as it was", name)
    return result
