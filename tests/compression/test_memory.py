"""Memory does not grow with the number of blocks."""

import multiprocessing
import weakref
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.compression.tiny_runs import quantize, sparsify, tokens
from tests.memory import Watch

from sqft.compression import quantize_model
from sqft.models import CheckpointWriter, StoredMasks, open_checkpoint, read_masks, writer
from sqft.ops import unpack_mask
from sqft.pipeline import parse_recipe
from sqft.pipeline.context import StageContext
from sqft.pipeline.step_quantize import quantize as quantize_stage
from sqft.sections import QuantizeSection

Maker = Callable[..., Path]


def _quantize_watched(directory: Path, sparse: Path, out: Path) -> list[int]:
    watch = Watch()
    writer = CheckpointWriter(out, open_checkpoint(directory))
    section = QuantizeSection(group_size=32)
    quantize_model(writer.source, StoredMasks(sparse), section, tokens(), writer, progress=watch)
    return watch.seen


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_quantizing_takes_no_more_for_later_blocks(
    tiny_model_dir: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_model_dir("llama", num_hidden_layers=12, hidden_size=128, intermediate_size=512)
    sparsify(directory, tmp_path / "sparse", method="magnitude")
    # In a process of its own that gives freed tensors back at once; else the allocator makes figures jump.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "32768")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
        seen = alone.submit(_quantize_watched, directory, tmp_path / "sparse", tmp_path / "out").result()
    block_masks = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 512  # bytes
    assert len(seen) == 12
    assert max(seen[3:]) - seen[2] < 9 * block_masks / 2  # nine blocks later, half of what masks would take


def test_one_mask_at_a_time_is_in_memory(
    tiny_model_dir: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_model_dir("llama")
    sparsify(directory, tmp_path / "sparse", method="magnitude")
    masks = read_masks(tmp_path / "sparse")
    quantize(directory, tmp_path / "whole", masks, method="rtn")
    opened: list[weakref.ref[Any]] = []
    unpack = unpack_mask

    def note(packed: Any, width: int) -> Any:
        mask = unpack(packed, width)
        opened.append(weakref.ref(mask))
        return mask

    monkeypatch.setattr(writer, "unpack_mask", note)
    watch = Watch(lambda: sum(mask() is not None for mask in opened))
    sections = {"sparsify": {"method": "magnitude"}, "quantize": {"method": "rtn", "group_size": 32}}
    recipe = parse_recipe({"model": str(directory), **sections})
    inputs = {"model": directory, "sparsify": tmp_path / "sparse"}
    quantize_stage(StageContext(recipe, "", tmp_path, inputs, "cpu", watch, tmp_path / "streamed"))
    assert len(opened) >= len(masks)
    assert len(watch.seen) == 2
    assert max(watch.seen) <= 1
    for name in ("model.safetensors", "sqft_masks.safetensors", "sqft_latent.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes()
