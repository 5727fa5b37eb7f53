"""Several processes sharing a walk through torch.distributed: each runs its share of the calibration.

Statistics are summed over processes, so that all of them come to the same weights; give each a writer on a
directory of its own, and keep the first. Such a walk starts over when it is interrupted. Without an
initialised process group there is one process, and nothing here does anything.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["is_alone", "share_of_rows", "sum_over_processes", "working_alone"]

_ALONE = ContextVar("alone", default=False)


@contextmanager
def working_alone() -> Iterator[None]:
    """Walk in this process alone, though there is a process group: the others wait for something else."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def is_alone() -> bool:
    """Whether there is one process only."""
    return not _active()


def share_of_rows(rows: Tensor) -> Tensor:
    """The rows that are this process's own."""
    return rows[dist.get_rank() :: dist.get_world_size()] if _active() else rows


def sum_over_processes(*tensors: Tensor, count: int) -> int:
    """Sum tensors in place over all processes; returns the sum of `count`."""
    if not _active():
        return count
    for tensor in tensors:
        dist.all_reduce(tensor)
    total = torch.tensor([count], device=tensors[0].device)
    dist.all_reduce(total)
    return int(total)


def _active() -> bool:
    return not _ALONE.get() and dist.is_available() and dist.is_initialized()
