"""A safetensors file that is filled tensor by tensor, so that no more than one need be in memory.

The header needs names, dtypes and shapes only, and these are known before any value is.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sqft.artifacts import sync_path

__all__ = ["TensorFile", "TensorSpec"]

TensorSpec = tuple[torch.dtype, tuple[int, ...]]

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class TensorFile:
    """Writes tensors into their places in a safetensors file whose contents are declared first.

    Opening an existing file of the same declaration keeps what it holds, for work that resumes: what of it is
    whole, `holds` tells by digest.

    digests: the sha256 of each tensor written, which is what `holds` asks for.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> None:
        self.path = path
        self.specs = dict(specs)
        self.digests: dict[str, str] = {}
        self._offsets: dict[str, int] = {}
        entries: dict[str, object] = {"__metadata__": dict(metadata)}
        end = 0
        # Wide dtypes first, so that every tensor starts at a multiple of its item size.
        for name in sorted(self.specs, key=lambda n: (-self.specs[n][0].itemsize, n)):
            dtype, shape = self.specs[name]
            size = math.prod(shape) * dtype.itemsize
            entries[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
            self._offsets[name] = end
            end += size
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        prefix = len(header).to_bytes(8, "little") + header
        self._start = len(prefix)
        if not (path.exists() and path.stat().st_size == self._start + end and _begins(path, prefix)):
            with path.open("wb") as file:
                file.write(prefix)
                file.truncate(self._start + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor into its place. Its dtype and shape must be the declared ones."""
        dtype, shape = self.specs[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), (name, tensor.dtype, tensor.shape)
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        with self.path.open("r+b") as file:
            file.seek(self._start + self._offsets[name])
            file.write(data)
        self.digests[name] = hashlib.sha256(data).hexdigest()

    def read(self, name: str) -> Tensor:
        """A tensor as the file holds it: zeros, if it was never written."""
        dtype, shape = self.specs[name]
        data = torch.from_numpy(np.frombuffer(self._bytes(name), dtype=np.uint8).copy())
        return data.view(dtype).reshape(shape)

    def holds(self, name: str, digest: str) -> bool:
        """Whether the file has the bytes of this sha256 in a tensor's place; they then count as written."""
        same = name in self.specs and hashlib.sha256(self._bytes(name)).hexdigest() == digest
        if same:
            self.digests[name] = digest
        return same

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        sync_path(self.path)

    def _bytes(self, name: str) -> bytes:
        dtype, shape = self.specs[name]
        with self.path.open("rb") as file:
            file.seek(self._start + self._offsets[name])
            return file.read(math.prod(shape) * dtype.itemsize)


def _begins(path: Path, prefix: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(prefix)) == prefix
