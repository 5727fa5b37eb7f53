"""The header of a GGUF file, read within bounds: no count or length in it may reach past the end of the file.

Libraries that read GGUF trust its counts and lengths; a file of 49 bytes can keep them busy for ever.
Source: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader

from sqft.errors import ModelError
from sqft.untrusted import check_regular

__all__ = ["GgufHeader", "open_gguf", "read_gguf_header"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ENTRIES = 1 << 16  # metadata keys, and tensors
ELEMENTS = 1 << 23  # of all arrays together: vocabularies have some hundred thousand
DIMENSIONS = 4
NESTING = 4
ALIGNMENT = 32
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class GgufHeader:
    """The single values of a GGUF file by key, and the shape of each tensor by name."""

    values: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]

    @property
    def num_blocks(self) -> int:
        """The number of decoder blocks; 0 if it is not stated."""
        found = self.values.get(f"{self.values.get('general.architecture')}.block_count", 0)
        return found if isinstance(found, int) else 0


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check a header: every count, length and offset lies within the file.

    Raises: ModelError if one does not, or the file is no GGUF.
    """
    try:
        check_regular(path)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Reader(content).header()
    except (OSError, ValueError, struct.error, OverflowError) as error:
        raise ModelError(f"{path} cannot be read as GGUF ({error}); fetch or write it again") from error


def open_gguf(path: Path) -> GGUFReader:
    """gguf's own reader of a file, once its header is checked. Raises: ModelError."""
    read_gguf_header(path)
    return GGUFReader(path)


class _Reader:
    """A place in the file that moves on with each value read."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.size, self.place, self.elements = content, len(content), 0, 0

    def header(self) -> GgufHeader:
        if self.bytes(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self.scalar("I")
        if version not in VERSIONS:
            raise ValueError(f"its version is {version}, not {' or '.join(map(str, VERSIONS))}")
        num_tensors, num_values = self.count("tensors"), self.count("values")
        values: dict[str, Any] = {}
        for _ in range(num_values):
            key = self.text()
            if key in values:
                raise ValueError(f"it gives {key!r} twice")
            values[key] = self.value(self.scalar("I"))
        places = dict(self.tensor() for _ in range(num_tensors))
        if len(places) < num_tensors:
            raise ValueError("it gives a tensor twice")
        self.check_places(values, places)
        return GgufHeader(
            {key: value for key, value in values.items() if value is not None},
            {name: shape for name, (shape, _, _) in places.items()},
        )

    def tensor(self) -> tuple[str, tuple[tuple[int, ...], int, int]]:
        """Name, shape, bytes and offset of the next tensor."""
        name, num_dimensions = self.text(), self.scalar("I")
        if num_dimensions > DIMENSIONS:
            raise ValueError(f"{name!r} has {num_dimensions} dimensions")
        shape = tuple(self.scalar("Q") for _ in range(num_dimensions))
        kind, offset = GGMLQuantizationType(self.scalar("I")), self.scalar("Q")
        block_size, block_bytes = GGML_QUANT_SIZES[kind]
        if shape and shape[0] % block_size:
            raise ValueError(f"{name!r} is not of whole blocks")
        return name, (shape, math.prod(shape) // block_size * block_bytes, offset)

    def check_places(
        self, values: dict[str, Any], places: dict[str, tuple[tuple[int, ...], int, int]]
    ) -> None:
        """Refuse tensors that lie beyond the end of the file."""
        alignment = values.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= self.size:
            raise ValueError(f"its alignment is {alignment!r}")
        start = -(-self.place // alignment) * alignment
        for name, (_, size, offset) in places.items():
            if start + offset + size > self.size:
                raise ValueError(f"{name!r} ends beyond the end of the file")

    def value(self, kind: int, depth: int = 0) -> Any:
        """A value; None for an array, whose elements are passed over."""
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.scalar(_format(kind))
        kind, length = self.scalar("I"), self.scalar("Q")
        self.elements += length
        if self.elements > ELEMENTS or depth > NESTING:
            raise ValueError(f"an array has {length:,} elements")
        if kind in (STRING, ARRAY):
            for _ in range(length):
                self.value(kind, depth + 1)
        else:
            self.bytes(length * struct.calcsize(f"<{_format(kind)}"))
        return None

    def count(self, what: str) -> int:
        number = int(self.scalar("Q"))
        if number > ENTRIES:
            raise ValueError(f"it claims {number:,} {what}")
        return number

    def text(self) -> str:
        return self.bytes(self.scalar("Q")).decode("utf-8", errors="replace")

    def scalar(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.bytes(struct.calcsize(f"<{form}")))[0]

    def bytes(self, length: int) -> bytes:
        """The next bytes, if the file has so many."""
        if length > self.size - self.place:
            raise ValueError(f"it ends {length - (self.size - self.place):,} bytes too early")
        self.place += length
        return self.content[self.place - length : self.place]


def _format(kind: int) -> str:
    if kind not in SCALARS:
        raise ValueError(f"a value is of the unknown type {kind}")
    return SCALARS[kind]
