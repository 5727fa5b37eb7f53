"""Model directories that other tools wrote: read, and written anew, one tensor at a time."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sqft.artifacts import write_json
from sqft.errors import ModelError
from sqft.models.beside import copy_kept_files
from sqft.models.checkpoint import INDEX, SINGLE
from sqft.models.tensorfile import TensorFile, TensorSpec

__all__ = ["ForeignFiles", "write_directory"]


class ForeignFiles:
    """The tensors of a directory's safetensors files by name, whatever layout they are in."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._handles: dict[str, Any] = {}
        for path in _weight_files(directory):
            try:
                handle = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} is truncated or damaged ({error}); fetch it again") from error
            self._handles |= dict.fromkeys(handle.keys(), handle)

    @property
    def names(self) -> list[str]:
        """Every stored tensor."""
        return sorted(self._handles)

    def tensor(self, name: str) -> Tensor:
        """One tensor. Raises: ModelError if it is not there."""
        if name not in self._handles:
            raise ModelError(f"{self.directory} lacks the tensor {name}")
        value: Tensor = self._handles[name].get_tensor(name)
        return value

    def spec(self, name: str) -> TensorSpec:
        """dtype and shape of one tensor; the memory-mapped values are not read."""
        value = self.tensor(name)
        return value.dtype, tuple(value.shape)


def write_directory(
    directory: Path,
    source_dir: Path,
    config: Mapping[str, Any],
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Write a model directory: the tensors as they come, this config, and the source's tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    file = TensorFile(directory / SINGLE, specs, {"format": "pt"})
    for name, tensor in tensors:
        file.write(name, tensor)
    copy_kept_files(source_dir, directory)
    write_json(directory / "config.json", dict(config))


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            return [directory / name for name in names]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} is damaged ({error}); fetch the model again") from None
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{directory} has no safetensors files; only these are read")
    return files
