"""The model directory itself: compressed-tensors for transformers and vLLM."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sqft.artifacts import FACTS, MASKS
from sqft.formats.weights import ExportSource, IntegerWeight, open_source
from sqft.models.beside import copy_kept_files

__all__ = ["compressed_refusal", "copy_model", "read_compressed"]

MODEL_FILES = ("config.json", FACTS, MASKS)


def compressed_refusal(source: ExportSource) -> str | None:
    """Why a model cannot be held exactly; None if it can."""
    if source.directory.is_dir() and not any(source.directory.glob("model*.safetensors")):
        return "a packed model (sqft unpack gives it back)"
    return None if source.quantized_names else "weights that are not on an integer grid"


def copy_model(source: ExportSource, directory: Path) -> dict[str, str]:
    """Copy weights, masks, configuration and tokenizer, and not what a merge left beside them.

    The scales of an asymmetric grid are widened to float32, which changes none of them: transformers 5.23
    opens such a model with dequantize=True only, and then multiplies in the type of the scale.
    """
    grid = source.checkpoint.grid
    kinds: dict[str, str] = {}
    for path in sorted(source.directory.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if grid is not None and not grid.symmetric:
            for name in tensors:
                if name.endswith(".weight_scale"):
                    tensors[name] = tensors[name].float()
            save_file(tensors, directory / path.name, metadata={"format": "pt"})
        else:
            shutil.copyfile(path, directory / path.name)
        kinds |= {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    index = source.directory / "model.safetensors.index.json"
    for path in (index, *(source.directory / name for name in MODEL_FILES)):
        if path.is_file():
            shutil.copyfile(path, directory / path.name)
    copy_kept_files(source.directory, directory)
    return kinds


def read_compressed(directory: Path) -> Iterator[tuple[str, IntegerWeight | Tensor]]:
    """The weights of a directory, by tensor name."""
    written = open_source(directory)
    yield from written.integers()
    for name in written.plain_names:
        yield name, written.checkpoint.tensor(name)
