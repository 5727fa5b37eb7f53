"""How fast this machine computes, from a second of measuring that is kept until processor or torch change."""

import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from sqft.pipeline.recall import recall

__all__ = ["MachineSpeed", "machine_speed"]

ROWS, WIDTH = 256, 1024  # of a product as a model has them
ELEMENTS = 2**24  # of a stream, more than a core's caches hold
SMALL_CALLS = 500
SECONDS = 0.4  # that each figure is measured for
SCALING = 0.7  # n threads do n ** 0.7 times the work of one: two took 0.62 of a training's time


@dataclass(frozen=True)
class MachineSpeed:
    """flops: float32 products, a second; stream: bytes read and written, a second; call: seconds of a small
    operation. Each is the best of several tries, which other programs slow down least.
    """

    flops: float
    stream: float
    call: float


def machine_speed(threads: int | None) -> MachineSpeed | None:
    """This processor's speed with so many threads (None: torch's own number); None if nothing tells it."""
    chosen = [os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ATEN_CPU_CAPABILITY")]
    try:
        question = [_processor(), len(os.sched_getaffinity(0)), threads, chosen]
        found = recall("speed", question, lambda: asdict(_measure(threads)), module=__name__)
        speed = MachineSpeed(**{name: float(value) for name, value in found.items()})
    except Exception:  # whatever it is, a plan is worth having without times
        return None
    return speed if min(speed.flops, speed.stream, speed.call) > 0 else None


def _measure(threads: int | None) -> MachineSpeed:
    """By one thread and its own clock, which programs beside it stop; more threads are taken to help less."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows, weight = torch.rand(ROWS, WIDTH), torch.rand(WIDTH, WIDTH)
        source, target = torch.rand(ELEMENTS), torch.empty(ELEMENTS)
        small = torch.rand(64)
        with torch.no_grad():
            product = _best(lambda: torch.mm(rows, weight))
            stream = _best(lambda: torch.mul(source, 2.0, out=target))
            calls = _best(lambda: [small.add(1.0) for _ in range(SMALL_CALLS)])
    finally:
        torch.set_num_threads(before)
    several = (threads or before) ** SCALING
    flops, moved = 2.0 * ROWS * WIDTH**2 / product, 8.0 * ELEMENTS / stream
    return MachineSpeed(several * flops, several * moved, calls / SMALL_CALLS)


def _best(work: Callable[[], object]) -> float:
    """The shortest time of one call, in seconds of this thread."""
    work()
    shortest, end = float("inf"), time.thread_time() + SECONDS
    while time.thread_time() < end:
        start = time.thread_time()
        work()
        shortest = min(shortest, time.thread_time() - start)
    return shortest


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "CPU part")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
