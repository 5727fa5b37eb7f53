"""Weights of 4-bit steps in the form that the compiled CPU kernels multiply with.

native/sqft_cpu.h states the product, native/layouts.h what lies where. A layout is a matter of memory and
speed: which steps a weight has is unchanged by it, and `PackedMatrix.unpack` gives them back.
"""

import contextlib
import ctypes
import functools
import logging
import mmap
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int8, Integer
from torch import Tensor

from sqft.kernels.native_build import library_path

__all__ = [
    "LAYOUTS",
    "HugePages",
    "Layout",
    "PackedMatrix",
    "instruction_set",
    "kernel_library",
    "use_instruction_set",
]

logger = logging.getLogger(__name__)

ABI = 1
BEHIND = 64  # bytes behind a packed weight that kernels may read
HUGE_PAGE = 2 << 20
CHUNK = 64 << 20  # bytes taken from the system at once; untouched pages cost nothing
Layout = Literal["dense", "window2", "window3", "window332", "index4", "mask8", "mask", "bytes"]
# In the order of `enum sqft_layout`: what each can hold.
LAYOUTS: dict[Layout, str] = {
    "dense": "any steps",
    "window2": "16:32 window 2",
    "window3": "16:32 window 3",
    "window332": "12:32 window 3-3-2",
    "index4": "4:16",
    "mask8": "8:16",
    "mask": "any steps, zeros left out",
    "bytes": "8-bit steps",
}
# Fastest first, as measured by benchmarks/sparse_decode.py. Arbitrary masks are smaller than dense steps,
# not faster.
BY_SPEED: tuple[Layout, ...] = ("index4", "window332", "window2", "window3", "mask8", "dense")
INSTRUCTIONS = ("plain", "avx2", "avx512", "neon", "dotprod")  # in the order of `enum sqft_isa`


class _Weight(ctypes.Structure):
    _fields_ = (
        ("layout", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("data", ctypes.c_void_p),
    )


@functools.cache
def kernel_library() -> ctypes.CDLL | None:
    """The compiled kernels; None, with a warning if something went wrong, where there are none."""
    try:
        path = library_path()
        if path is None:
            return None
        library = ctypes.CDLL(str(path))
    except OSError as error:
        logger.warning("the CPU kernels are not used: %s", str(error).splitlines()[0])
        return None
    pointer, whole, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.sqft_packed_bytes.restype = library.sqft_pack.restype = long
    library.sqft_packed_bytes.argtypes = [whole, whole, long, long, pointer]
    library.sqft_pack.argtypes = [whole, whole, long, long, pointer, pointer, pointer]
    library.sqft_multiply.argtypes = [pointer, pointer, long, long, pointer, whole]
    library.sqft_unpack_row.argtypes = [pointer, long, pointer, pointer]
    library.sqft_unpack_row.restype = None
    assert library.sqft_abi() == ABI, path
    return library


def instruction_set() -> str | None:
    """What the kernels use on this machine; None without kernels."""
    library = kernel_library()
    return None if library is None else INSTRUCTIONS[library.sqft_isa()]


def use_instruction_set(name: str) -> str:
    """Use at most these instructions from now on, in the whole process; returns what is used."""
    library = kernel_library()
    assert library is not None
    return INSTRUCTIONS[library.sqft_use_isa(INSTRUCTIONS.index(name))]


@dataclass(frozen=True)
class PackedMatrix:
    """A weight (out, in) packed in a layout. data: uint8, with 64 bytes behind what is counted by
    `num_bytes`."""

    layout: Layout
    group_size: int
    out_features: int
    in_features: int
    data: Tensor

    @classmethod
    def pack(
        cls,
        steps: Int8[Tensor, "out in"],
        scale: Float[Tensor, "out groups"],
        layout: Layout | None = None,
        memory: "HugePages | None" = None,
    ) -> "PackedMatrix":
        """Pack steps -8..7 (or -127..127 for "bytes") and scales that are exact in float16.

        Groups are of a multiple of 32 columns, or one a row. layout: by default the fastest that holds the
        steps. memory: where to put it, shared by the weights of a model.

        Raises: ValueError if they do not fit; RuntimeError where there are no kernels.
        """
        library = kernel_library()
        if library is None:
            raise RuntimeError("the CPU kernels are not compiled here")
        rows, columns = steps.shape
        scale, group_size = kernel_scales(scale, columns)
        steps = steps.contiguous()
        for name in BY_SPEED if layout is None else (layout,):
            number = list(LAYOUTS).index(name)
            shape = (number, group_size, rows, columns)
            size = library.sqft_packed_bytes(*shape, steps.data_ptr())
            if size < 0:
                raise ValueError(f"a weight of {rows} x {columns} cannot be packed")
            data = torch.empty(size + BEHIND, dtype=torch.uint8)
            wrong = library.sqft_pack(*shape, steps.data_ptr(), scale.data_ptr(), data.data_ptr())
            if not wrong:
                data = data if memory is None else memory.keep(data)
                return cls(name, group_size, rows, columns, data)
        raise ValueError(f"row {wrong - 1} does not fit the layout {name} ({LAYOUTS[name]})")

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weight."""
        return self.data.numel() - BEHIND

    def multiply(self, x: Float[Tensor, "batch in"], *, threads: int = 1) -> Float[Tensor, "batch out"]:
        """x times the transposed weight, in float32; `kernels.reference` states the formula."""
        library = kernel_library()
        assert library is not None
        x = x.to(torch.float32).contiguous()
        assert x.ndim == 2, x.shape
        assert x.shape[1] == self.in_features, x.shape
        y = torch.empty(x.shape[0], self.out_features)
        weight = ctypes.byref(self._weight)
        if library.sqft_multiply(weight, x.data_ptr(), self.in_features, len(x), y.data_ptr(), threads):
            raise MemoryError("there is not enough memory for the activations of a product")
        return y

    def unpack(self) -> tuple[Int8[Tensor, "out in"], Float[Tensor, "out groups"]]:
        """The steps, and the scales of 32 or 64 columns each."""
        parts = [self._unpack_row(row) for row in range(self.out_features)]
        steps, scale = (torch.stack(part) for part in zip(*parts, strict=True))
        return steps[:, : self.in_features].contiguous(), scale

    def take_rows(self, rows: Integer[Tensor, " n"]) -> Float[Tensor, "n in"]:
        """Rows of the weight in float32: what an embedding looks up.

        Raises: IndexError for one that is not there.
        """
        wanted, places = rows.unique(return_inverse=True)
        if len(wanted) and not 0 <= int(wanted[0]) <= int(wanted[-1]) < self.out_features:
            raise IndexError(f"there are rows 0 to {self.out_features - 1}")
        parts = [self._unpack_row(row) for row in wanted.tolist()]
        if not parts:
            return torch.empty(0, self.in_features)
        steps, scale = (torch.stack(part) for part in zip(*parts, strict=True))
        values = steps.unflatten(1, (scale.shape[1], -1)).float() * scale[..., None]
        return values.flatten(1)[places, : self.in_features]

    def _unpack_row(self, row: int) -> tuple[Tensor, Tensor]:
        library = kernel_library()
        assert library is not None
        padded = self._weight.columns
        steps = torch.empty(padded, dtype=torch.int8)
        scale = torch.empty(padded // self.group_size)
        library.sqft_unpack_row(ctypes.byref(self._weight), row, steps.data_ptr(), scale.data_ptr())
        return steps, scale

    @functools.cached_property
    def _weight(self) -> _Weight:
        padded = -(-self.in_features // self.group_size) * self.group_size
        number = list(LAYOUTS).index(self.layout)
        return _Weight(number, self.group_size, self.out_features, padded, self.data.data_ptr())


def kernel_scales(scale: Float[Tensor, "out groups"], columns: int) -> tuple[Tensor, int]:
    """Scales as the kernels take them, float16 for every 32 or 64 columns, and which of the two.

    Raises: ValueError for groups that are neither a multiple of 32 columns nor a whole row, or for scales
    that float16 does not hold.
    """
    groups = scale.shape[1]
    size = -(-columns // groups)
    if groups > 1 and (columns % groups or size % 32):
        raise ValueError(f"groups of {size} columns are not a multiple of 32")
    kernel_size = 64 if groups == 1 or size % 64 == 0 else 32
    half = scale.to(torch.float16)
    if not torch.equal(half.float(), scale.float()):
        raise ValueError("a scale is not exact in float16")
    repeats = -(-size // kernel_size)
    return half.repeat_interleave(repeats, dim=1).contiguous(), kernel_size


class HugePages:
    """Memory for the weights of a model, side by side in pages of 2 MB where the system has such.

    A token reads all weights, and with pages of 4 KB looking these up takes half of the time: one thread of
    an AMD EPYC (Zen 4) read 16 GB/s, and 30 GB/s with pages of 2 MB.
    """

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def keep(self, data: Tensor) -> Tensor:
        """A copy of these bytes."""
        size = -(-data.numel() // BEHIND) * BEHIND
        if size > self._free.numel():
            self._free = _map_pages(max(size, CHUNK))
        place, self._free = self._free[: data.numel()], self._free[size:]
        return place.copy_(data)


def _map_pages(size: int) -> Tensor:
    """Bytes from the system, at the start of a huge page."""
    if hasattr(mmap, "MAP_PRIVATE"):  # shared memory, which is the default, mostly comes in small pages
        memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        memory = mmap.mmap(-1, size + HUGE_PAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # small pages do as well
            memory.madvise(mmap.MADV_HUGEPAGE)
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + size]
