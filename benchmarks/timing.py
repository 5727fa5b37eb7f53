"""Timing things side by side: interleaved rounds, medians, spread, and ratios taken inside a round."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

__all__ = ["check", "environment", "interleave", "ratio", "summarize"]


def interleave(
    jobs: dict[str, Callable[[], None]], rounds: int, *, clock: str = "wall", warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each job in each round; every round runs every job once, so drift hits all alike.

    clock: wall, or cpu for the process's own time, which other programs on the machine disturb less.
    """
    now = time.perf_counter if clock == "wall" else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(warmup + rounds):
        for name, job in jobs.items():
            _synchronize()
            start = now()
            job()
            _synchronize()
            if turn >= warmup:
                seconds[name].append(now() - start)
    return seconds


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summarize(values: list[float]) -> dict[str, float]:
    """Median, and half the distance between the quartiles, in milliseconds."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    spread = (ordered[-1 - quarter] - ordered[quarter]) / 2
    return {"median_ms": 1e3 * statistics.median(ordered), "spread_ms": 1e3 * spread}


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median over rounds of the ratio inside a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def check(name: str, value: float | None, at_most: float, **more: Any) -> dict[str, Any]:
    """One aim; a value of None was not measured."""
    met = None if value is None else value <= at_most
    return {"name": name, "value": value, "at_most": at_most, "met": met} | more


def environment(clock: str) -> dict[str, str]:
    """What the figures rest on."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return {
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "clock": clock,
        "load average at the start": load,
    } | {name: version(name) for name in ("torch", "transformers", "peft")}
