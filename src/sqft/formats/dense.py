"""Plain safetensors: the dequantized weights, for whatever opens a Hugging Face model."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sqft.artifacts import write_json
from sqft.formats.weights import ExportSource, exact_in
from sqft.models import open_checkpoint
from sqft.models.beside import copy_kept_files

__all__ = [
    "half_dtype",
    "plain_refusal",
    "read_plain",
    "rounding_dtype",
    "write_plain",
]


def plain_refusal(source: ExportSource) -> str | None:
    """Why 16 bits cannot hold a model exactly; None if they can."""
    for name in source.tensor_names():
        if half_dtype(source, name) is None:
            return f"{name}, which is exact in neither float16 nor bfloat16"
    return None


def half_dtype(source: ExportSource, name: str) -> torch.dtype | None:
    """The 16-bit type that holds a weight exactly, the model's own first; None if neither does."""
    weight, stored = source.tensor(name), source.checkpoint.storage_dtype
    own = [stored] if stored.itemsize == 2 else []
    return next((d for d in (*own, torch.float16, torch.bfloat16) if exact_in(weight, d)), None)


def write_plain(source: ExportSource, directory: Path, dtype: torch.dtype | None) -> dict[str, str]:
    """Write every weight in one type and return the type of every tensor.

    dtype None: each in the 16-bit type that holds it: linears from integer codes need float16, embeddings
    with tiny numbers bfloat16. Opened in float32 that is exact; in one 16-bit type the others are rounded.
    """
    tensors = {}
    for name in source.tensor_names():
        kind = dtype or half_dtype(source, name) or rounding_dtype(source)
        tensors[name] = source.tensor(name).to(kind).contiguous()
    if source.config.get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    kinds = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    in_blocks = next(
        name for name in kinds if name.startswith(source.checkpoint.block_names) and "norm" not in name
    )
    write_json(directory / "config.json", source.config | {"dtype": kinds[in_blocks]})
    copy_kept_files(source.directory, directory)
    return kinds


def rounding_dtype(source: ExportSource) -> torch.dtype:
    """The 16-bit type that weights are rounded to where neither is exact."""
    stored = source.checkpoint.storage_dtype
    return stored if stored.itemsize == 2 else torch.bfloat16


def read_plain(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a plain checkpoint."""
    checkpoint = open_checkpoint(directory)
    for name in checkpoint.names:
        yield name, checkpoint.tensor(name)
