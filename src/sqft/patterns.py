"""The patterns that zeros can lie in: their names and their geometry. No torch.

    2:4                     2 kept of every 4 neighbours of a row
    16:32 window 2          16 kept of every 32; the j-th lies in one of 2^2 columns from a fixed start on
    12:32 window 3-3-2      the same; 2^3 columns for the first and second third of the kept, 2^2 for the last

With N kept of M, and W_j columns for the j-th, windows stand evenly, each centred on its share of the block:

    start_j = clamp(floor(((2j + 1) M - W_j N) / 2N), 0, M - W_j)

A decoder then needs the few bits of an offset and one addition for a column, where an arbitrary mask costs
it a bit for every column and a count of bits. 2:4 lies in "16:32 window 2", and 4:8 in "16:32 window 3".
"""

import re
from dataclasses import dataclass
from functools import cached_property

__all__ = ["CPU_DECODED", "CPU_PATTERNS", "Pattern"]

FORM = re.compile(r"([0-9]{1,6}):([0-9]{1,6})(?: +window +([0-9](?:-[0-9])*))?")
HOW = "write N:M with 0 < N <= M, for instance '2:4', or 'N:M window B', for instance '16:32 window 2'"


@dataclass(frozen=True)
class Pattern:
    """N:M, with or without windows; read one with `Pattern.parse`, and write it with `str`.

    kept: N. block: M. window_bits: of the offsets, for equal shares of the kept weights in order; empty
    without windows.

    Raises: ValueError if there is no such pattern.
    """

    kept: int
    block: int
    window_bits: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.kept <= self.block:
            raise ValueError(HOW)
        if not self.window_bits:
            return
        if self.kept % len(self.window_bits):
            raise ValueError(f"{len(self.window_bits)} windows cannot share {self.kept} kept weights evenly")
        if any(bits < 1 or 1 << bits > self.block for bits in self.window_bits):
            raise ValueError(f"windows have 1 bit or more, and at most the {self.block} columns of a block")

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Raises: ValueError with what can be written."""
        match = FORM.fullmatch(text.strip())
        if match is None:
            raise ValueError(HOW)
        bits = tuple(int(part) for part in match[3].split("-")) if match[3] else ()
        return cls(int(match[1]), int(match[2]), bits)

    def __str__(self) -> str:
        window = f" window {'-'.join(map(str, self.window_bits))}" if self.window_bits else ""
        return f"{self.kept}:{self.block}{window}"

    @property
    def sparsity(self) -> float:
        """The fraction of zeros."""
        return 1 - self.kept / self.block

    @cached_property
    def bits(self) -> tuple[int, ...]:
        """Of the offset of the j-th kept weight of a block; empty without windows."""
        share = self.kept // max(len(self.window_bits), 1)
        return tuple(bits for bits in self.window_bits for _ in range(share))

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Columns of the j-th window; empty without windows."""
        return tuple(1 << bits for bits in self.bits)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First column of the j-th window; empty without windows."""
        kept, block = self.kept, self.block
        return tuple(
            min(max(((2 * j + 1) * block - width * kept) // (2 * kept), 0), block - width)
            for j, width in enumerate(self.widths)
        )


# What `sparsify.target: cpu` chooses at a sparsity: the fastest pattern that the kernels for CPUs decode.
CPU_PATTERNS = {0.5: "16:32 window 2", 0.625: "12:32 window 3-3-2", 0.75: "4:16"}
# What the kernels for CPUs decode faster than a dense weight.
CPU_DECODED = ("2:4", "4:8", "8:16", "4:16", "16:32 window 2", "16:32 window 3", "12:32 window 3-3-2")
