"""A second, slow reading of model files in NumPy, for checking what the rest of the package wrote.

It parses safetensors, bfloat16, packed integers and packed masks by itself and shares no code with
`sqft.ops`, `sqft.models` or `sqft.adapters`: an error there must not hide itself here.
"""

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sqft.errors import CertificateError

__all__ = ["StoredModel", "StoredTensors", "read_json"]

NUMPY_TYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U8": "|u1",
    "BOOL": "|u1",
}
MASKS = "sqft_masks.safetensors"
LATENT = "sqft_latent.safetensors"
NOT_WEIGHTS = "sqft_"

Array = NDArray[Any]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises: CertificateError if the file is missing or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CertificateError(f"{path} is missing") from None
    except OSError as error:
        raise CertificateError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CertificateError(f"{path} is damaged ({error})") from None
    if not isinstance(value, dict):
        raise CertificateError(f"{path} is damaged (not a JSON object)")
    return value


@dataclass(frozen=True)
class _Entry:
    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _parse_entry(path: Path, name: str, fields: Any, start: int) -> _Entry:
    """An entry of a safetensors header; start: where the tensors begin in the file."""
    fields = fields if isinstance(fields, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    whole = (
        isinstance(dtype, str)
        and all(isinstance(part, list) for part in (shape, offsets))
        and all(type(number) is int and number >= 0 for number in (*shape, *offsets))
        and len(offsets) == 2
        and offsets[0] <= offsets[1]
    )
    if not whole:
        raise CertificateError(f"{path} is damaged: its header does not say where {name} is")
    return _Entry(path, dtype, tuple(shape), start + offsets[0], start + offsets[1])


class StoredTensors:
    """The tensors of one or more safetensors files, read from the bytes.

    Raises: CertificateError if a file is missing, truncated or not safetensors.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.metadata: dict[str, str] = {}
        self._entries: dict[str, _Entry] = {}
        for path in paths:
            self._read_header(path)

    def _read_header(self, path: Path) -> None:
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if 8 + length > size:
                    raise ValueError("longer than the file")
                header = json.loads(file.read(length))
        except FileNotFoundError:
            raise CertificateError(f"{path} is missing") from None
        except OSError as error:
            raise CertificateError(f"{path} cannot be read ({error.strerror})") from None
        except (struct.error, ValueError, MemoryError, RecursionError):
            raise CertificateError(f"{path} is damaged: its header cannot be read") from None
        if not isinstance(header, dict):
            raise CertificateError(f"{path} is damaged: its header is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise CertificateError(f"{path} is damaged: its metadata is not a JSON object")
        self.metadata.update(metadata)
        for name, fields in header.items():
            entry = _parse_entry(path, name, fields, 8 + length)
            if entry.end > size:
                raise CertificateError(f"{path} is truncated: {size} bytes, {name} ends at {entry.end}")
            self._entries[name] = entry

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def dtype(self, name: str) -> str:
        """The stored type as safetensors calls it, for instance BF16."""
        return self._entry(name).dtype

    def raw(self, name: str) -> Array:
        """The stored values; bfloat16 as uint16."""
        entry = self._entry(name)
        if entry.dtype not in NUMPY_TYPES:
            raise CertificateError(
                f"{entry.path}: {name} has the type {entry.dtype}, which is not understood"
            )
        dtype = np.dtype(NUMPY_TYPES[entry.dtype])
        count = math.prod(entry.shape)
        if count * dtype.itemsize != entry.end - entry.begin:
            raise CertificateError(f"{entry.path} is damaged: the size of {name} does not fit its shape")
        if count == 0:
            return np.zeros(entry.shape, dtype)
        return np.memmap(entry.path, dtype, "r", entry.begin, entry.shape)

    def values(self, name: str) -> Array:
        """The stored numbers; bfloat16 widened to float32."""
        raw = self.raw(name)
        if self.dtype(name) == "BF16":
            return (raw.astype(np.uint32) << 16).view(np.float32)
        return raw

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise CertificateError(f"the tensor {name} is missing")
        return self._entries[name]


class StoredModel:
    """A model directory: its tensors, integer grids and masks.

    Raises: CertificateError if a file is missing or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = read_json(directory / "config.json")
        self.weight_files = self._weight_files()
        self.tensors = StoredTensors(self.weight_files)
        masks = directory / MASKS
        self._masks = StoredTensors([masks]) if masks.exists() else None
        latent = directory / LATENT
        self.latent = StoredTensors([latent]) if latent.exists() else None

    def _weight_files(self) -> list[Path]:
        index = self.directory / "model.safetensors.index.json"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
                raise CertificateError(f"{index} is damaged: it does not say which file holds which tensor")
            names = sorted(set(weight_map.values()))
        else:
            names = [path.name for path in sorted(self.directory.glob("*.safetensors"))]
            names = [name for name in names if not name.startswith(NOT_WEIGHTS)]
        if not names:
            raise CertificateError(f"{self.directory} holds no weights")
        return [self.directory / name for name in names]

    @property
    def quantized(self) -> list[str]:
        """Names of the linears that hold codes."""
        return [name.removesuffix(".weight_packed") for name in self.tensors if name.endswith("_packed")]

    @property
    def masked(self) -> list[str]:
        """Names of the linears that have a mask."""
        return [] if self._masks is None else list(self._masks)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        bits = self._weight_scheme().get("num_bits")
        if type(bits) is not int or not 1 <= bits <= 8:
            raise CertificateError(f"{self.directory}/config.json does not say how many bits a code has")
        return bits

    def _weight_scheme(self) -> dict[str, Any]:
        try:
            groups = self.config["quantization_config"]["config_groups"]
            schemes = [dict(group["weights"]) for group in groups.values()]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise CertificateError(f"{self.directory}/config.json does not state its quantization") from None
        if not schemes:
            raise CertificateError(f"{self.directory}/config.json does not state its quantization")
        if any(scheme != schemes[0] for scheme in schemes):
            raise CertificateError(
                f"{self.directory} has more than one integer grid, which cannot be checked"
            )
        return schemes[0]

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in) of a linear."""
        if f"{name}.weight_shape" in self.tensors:
            shape = tuple(int(value) for value in self.tensors.raw(f"{name}.weight_shape").reshape(-1))
        else:
            shape = self.tensors.raw(f"{name}.weight").shape
        if len(shape) != 2:
            raise CertificateError(f"the weight of {name} has the shape {shape}, not that of a linear")
        return shape

    def codes(self, name: str) -> NDArray[np.uint8]:
        """(out, in) codes 0..2^bits-1 from a compressed-tensors packed weight.

        compressed-tensors stores code i of a row in the bits [i * bits, (i + 1) * bits) of the row's little
        endian int32 words.
        """
        _, columns = self.shape(name)
        return _unpack_rows(self.tensors.raw(f"{name}.weight_packed"), columns, self.bits)

    def scale(self, name: str) -> NDArray[np.float64]:
        """(out, groups) scales."""
        return np.atleast_2d(self.tensors.values(f"{name}.weight_scale")).astype(np.float64)

    def zero_point(self, name: str) -> NDArray[np.int64]:
        """(out, groups) zero points as integers of the code range."""
        rows, groups = self.scale(name).shape
        if f"{name}.weight_zero_point" not in self.tensors:
            return np.full((rows, groups), 1 << (self.bits - 1), np.int64)
        packed = self.tensors.raw(f"{name}.weight_zero_point")
        return _unpack_rows(np.ascontiguousarray(packed.T), rows, self.bits).T.astype(np.int64)

    def mask(self, name: str) -> NDArray[np.bool_] | None:
        """(out, in), True = kept; None if the linear has no mask.

        Raises: CertificateError if the mask's shape is not the weight's.
        """
        if self._masks is None or name not in self._masks:
            return None
        rows, columns = self.shape(name)
        stated = self._masks.metadata.get(name)
        packed = self._masks.raw(name)
        if stated != f"{rows},{columns}" or packed.shape != (rows, (columns + 7) // 8):
            raise CertificateError(f"the mask of {name} is of shape {stated}, the weight {rows},{columns}")
        return np.unpackbits(packed, axis=1, bitorder="little")[:, :columns].astype(bool)


def _unpack_rows(words: Array, columns: int, bits: int) -> NDArray[np.uint8]:
    """(rows, columns) integers of `bits` bits from (rows, words) int32."""
    if words.dtype != np.dtype("<i4") or words.shape[1] != (columns * bits + 31) // 32:
        raise CertificateError(
            f"packed codes of shape {words.shape} do not fit {columns} columns of {bits} bits"
        )
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    stream = stream[:, : columns * bits].reshape(len(words), columns, bits)
    return (stream << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)
