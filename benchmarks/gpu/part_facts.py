"""What is there: the card, the versions, the two ceilings, and whether merging is the same on GPU and CPU."""

import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from benchmarks.adapters import pruned_layer
from benchmarks.gpu.rows import Rows

from sqft import __version__
from sqft.ops import adapted_codes, decode_latent
from sqft.ops.kernel_use import device_capability

__all__ = ["measure"]

PACKAGES = ("torch", "transformers", "peft", "accelerate", "triton", "liger-kernel", "numpy")
ROUNDS = 7


def measure(rows: Rows) -> None:
    """The rows of this part."""
    rows.measure("card", lambda: card(rows.device))
    rows.measure("bandwidth", lambda: bandwidth(rows))
    rows.measure("matrix rate", lambda: matrix_rate(rows))
    rows.measure("merged codes", lambda: merged_codes(rows))


def card(device: str) -> dict[str, Any]:
    """Names and versions."""
    found: dict[str, Any] = {"python": platform.python_version(), "sqft": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    found |= {"capability": device_capability(torch.device(device)), "cuda": torch.version.cuda}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"name": properties.name, "memory_bytes": properties.total_memory}
        found["multiprocessors"] = properties.multi_processor_count
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return found


def bandwidth(rows: Rows) -> dict[str, float]:
    """Bytes a second of a copy on the device, those read and those written."""
    source = torch.randn((1 << 12) if rows.dry else (1 << 29), device=rows.device)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), rows)
    return {"bytes_per_second": 2 * source.nbytes / seconds}


def matrix_rate(rows: Rows) -> dict[str, float]:
    """Floating point operations a second of a product in bfloat16, of random numbers."""
    side = 64 if rows.dry else 8192
    left, right = (torch.randn(side, side, device=rows.device, dtype=torch.bfloat16) for _ in range(2))
    return {"flops_per_second": 2 * side**3 / median_seconds(lambda: left @ right, rows)}


def merged_codes(rows: Rows) -> dict[str, int]:
    """How many codes of one merge differ between the device and the CPU."""
    torch.manual_seed(0)
    side = 128 if rows.dry else 4096
    _, grid, latent = pruned_layer(side, side, "cpu")
    base = decode_latent(latent, grid)
    lora_A, lora_B = torch.randn(32, side) * 0.01, torch.randn(side, 32) * 0.05
    found = []
    for device in (rows.device, "cpu"):
        moved = (tensor.to(device) for tensor in (base, lora_A, lora_B))
        codes = adapted_codes(*moved, scaling=2.0, mask=(base != 0).to(device), qparams=grid.to(device))
        found.append(codes.cpu())
    return {"differing": int((found[0] != found[1]).sum()), "of": base.numel()}


def median_seconds(job: Callable[[], Any], rows: Rows) -> float:
    """Of single runs after two to warm up; a dry run's figure means nothing, and is that of one run."""
    seconds = []
    warmup, rounds = (0, 1) if rows.dry else (2, ROUNDS)
    for turn in range(warmup + rounds):
        synchronize(rows.device)
        start = time.perf_counter()
        job()
        synchronize(rows.device)
        if turn >= warmup:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()
