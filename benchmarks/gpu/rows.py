"""What a part of the GPU benchmark writes, row by row, such that a crash loses the row at work alone."""

import gc
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["Rows"]


class Rows:
    """The finished rows of one part: each a line of a file, written when it is measured.

    skip: rows that an earlier child of the part has finished, or crashed in. dry: tiny sizes on a CPU.
    """

    def __init__(self, path: Path, *, skip: frozenset[str] = frozenset(), dry: bool = False) -> None:
        self.path, self.skip, self.dry = path, skip, dry
        self.device = "cpu" if dry else "cuda"

    def measure(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """Run one measurement and write what it returns; of an error, out of memory among them, its text.

        Returns None for a row that failed or is to be skipped.
        """
        if name in self.skip:
            return None
        self._write({"begin": name})
        started, failure = time.perf_counter(), ""
        values: dict[str, Any] | None = None
        try:
            values = work()
        except Exception as error:  # whatever it was, the next row starts
            failure = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
            traceback.print_exc()
        row = {"row": name, "seconds": round(time.perf_counter() - started, 2)}
        self._write(row | ({"error": failure} if values is None else {"values": values}))
        self.free()
        return values

    def free(self) -> None:
        """Give memory back that the next row is to start without."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
