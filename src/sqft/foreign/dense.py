"""A LoRA merged into the dense model that it stands on, as anybody does before compressing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqft.adapters.lora_files import open_foreign_adapter
from sqft.errors import AdapterError, ModelError
from sqft.foreign.erasure import adapted_layers, round_update
from sqft.foreign.fit import check_fit
from sqft.models import Checkpoint, CheckpointWriter, ExistingMasks
from sqft.progress import SILENT, Progress

__all__ = ["check_dense", "merge_dense"]


def check_dense(base: Checkpoint) -> None:
    """Raises: ModelError or AdapterError if a merge would lose what a model came with: its grid, or zeros."""
    if base.grid is not None:
        raise ModelError(
            f"{base.directory} is quantized, and tune merges into 16 bits; start from the dense model, or "
            "train adapters on this one"
        )
    sparse = len(ExistingMasks(base))
    if sparse:
        raise AdapterError(
            f"{sparse} linears of {base.directory} are sparse, and tune would fill their zeros; leave tune "
            "out, and train by adapters.method sparse_peft"
        )


def merge_dense(
    base: Checkpoint,
    adapter_dir: Path,
    directory: Path,
    *,
    facts: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
) -> None:
    """Write a model directory: the base with a LoRA, rsLoRA or DoRA added to its weights, in their own dtype.

    One linear is in memory at a time. facts: what `sqft.json` says of it.

    Raises: ModelError, AdapterError, as `check_dense` and if the adapter does not fit the base.
    """
    check_dense(base)
    adapter = open_foreign_adapter(adapter_dir)
    check_fit(base, adapter)
    writer = CheckpointWriter(directory, base)
    with progress.task("merge", len(adapter.names)) as advance:
        for name, weight, adapted, mask in adapted_layers(base, adapter, {}):
            writer.write_linear(name, round_update(weight, adapted, mask))
            advance(1)
    writer.close(facts)
