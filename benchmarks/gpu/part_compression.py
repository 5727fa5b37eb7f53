"""Compressing four blocks of Llama-3-8B, random weights, as the stages `sparsify` and `quantize` do it.

128 x 2048 calibration tokens. The model of four blocks is written to a directory first, which is not timed;
minutes for the whole model are those of a block times 32, embeddings and the reading of files left out. Its
blocks in INT4 are what `part_decoding` runs.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu.random_model import random_checkpoint
from benchmarks.gpu.rows import Rows
from safetensors.torch import save_file

from sqft.compression import quantize_model, sparsify_model
from sqft.models import CheckpointWriter, StoredMasks, open_checkpoint
from sqft.progress import Advance
from sqft.sections import QuantizeSection, SparsifySection

__all__ = ["compress", "measure", "write_blocks"]

BLOCKS, WHOLE = 4, 32
SAMPLES, LENGTH = 128, 2048
RECIPES: dict[str, dict[str, Any]] = {
    "wanda + gptq": {"group_size": 128},
    "best recipe": {
        "group_size": 128,
        "refit": 10,
        "scale_search": True,
        "scale_fit": True,
        "descent": 2,
    },
}


def measure(rows: Rows) -> None:
    """A row for each recipe."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        rows.measure("blocks", partial(write_blocks, directory / "dense", rows))
        for recipe, settings in RECIPES.items():
            rows.measure(recipe, partial(compress, directory, recipe.replace(" ", "-"), settings, rows))


def write_blocks(directory: Path, rows: Rows) -> dict[str, Any]:
    """A dense model of four blocks in a directory."""
    blocks = 1 if rows.dry else BLOCKS
    checkpoint, _ = random_checkpoint(rows.device, quantized=False, sparse=False, dry=rows.dry, blocks=blocks)
    directory.mkdir(parents=True)
    tensors = {name: checkpoint.tensor(name).cpu() for name in checkpoint.names}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    checkpoint.config.architectures = ["LlamaForCausalLM"]
    checkpoint.config.save_pretrained(directory)
    return {"disk_bytes": sum(tensor.nbytes for tensor in tensors.values()), "blocks": blocks}


def compress(
    directory: Path, name: str, quantize: dict[str, Any], rows: Rows, sparsify: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Both stages of one recipe; seconds of each block, peak memory."""
    dense = open_checkpoint(directory / "dense")
    generator = torch.Generator().manual_seed(0)
    shape = (8, 32) if rows.dry else (SAMPLES, LENGTH)
    tokens = torch.randint(5, dense.config.vocab_size, shape, generator=generator)
    if rows.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found: dict[str, Any] = {}
    sparse, quantized = directory / f"{name}-sparse", directory / f"{name}-int4"
    watch = BlockClock()
    writer = CheckpointWriter(sparse, dense)
    sparsify_model(
        dense, SparsifySection(**(sparsify or {})), tokens, writer, device=rows.device, progress=watch
    )
    writer.close()
    found["sparsify_block_seconds"] = watch.seconds()
    watch = BlockClock()
    writer = CheckpointWriter(quantized, dense)
    section = QuantizeSection(**quantize)
    quantize_model(dense, StoredMasks(sparse), section, tokens, writer, device=rows.device, progress=watch)
    writer.close()
    found["quantize_block_seconds"] = watch.seconds()
    block = sum(_typical(found[key]) for key in ("sparsify_block_seconds", "quantize_block_seconds"))
    found["whole_model_minutes"] = WHOLE * block / 60
    if rows.device == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def _typical(seconds: list[float]) -> float:
    """Of a block; the first one also warms up."""
    return sum(seconds[1:]) / len(seconds[1:]) if len(seconds) > 1 else seconds[0]


class BlockClock:
    """A Progress that notes when each block is done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        """Note the time now, and at every advance."""
        self.times = [time.perf_counter()]
        yield lambda done, note="": self.times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """The seconds of each block."""
        return [after - before for before, after in pairwise(self.times)]
