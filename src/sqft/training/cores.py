"""Whether the cores that torch wants are free: threads that wait for each other crawl on a busy machine."""

import logging
import os
import time
from pathlib import Path

import torch

__all__ = ["idle_cores", "warn_of_busy_cores"]

logger = logging.getLogger(__name__)
SAMPLE_SECONDS = 0.2
STAT = Path("/proc/stat")


def idle_cores(seconds: float = SAMPLE_SECONDS) -> float | None:
    """How many of this process's cores nothing ran on while it slept; None where the system does not tell."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    before = _idle_and_total(cores)
    time.sleep(seconds)
    after = _idle_and_total(cores)
    if before is None or after is None or after[1] == before[1]:
        return None
    return len(cores) * (after[0] - before[0]) / (after[1] - before[1])


def warn_of_busy_cores(device: torch.device) -> None:
    """Say so if torch has more threads on the CPU than there are idle cores."""
    threads = torch.get_num_threads()
    idle = idle_cores() if device.type == "cpu" and threads > 1 else None
    if idle is not None and threads > round(idle) and threads > idle + 0.5:
        logger.warning(
            "torch computes on %d threads, but only %.1f cores are idle; with other work beside it, "
            "runtime.threads: %d may be faster",
            threads,
            idle,
            max(1, round(idle)),
        )


def _idle_and_total(cores: set[int]) -> tuple[int, int] | None:
    """Ticks that these cores were idle, and all of their ticks, since the machine started."""
    try:
        lines = STAT.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    names = {f"cpu{core}" for core in cores}
    rows = [[int(ticks) for ticks in line.split()[1:9]] for line in lines if line.split(" ", 1)[0] in names]
    return (sum(row[3] + row[4] for row in rows), sum(map(sum, rows))) if rows else None
