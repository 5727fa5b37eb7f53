"""Which kernels and which compute dtype fit the device at hand."""

import logging
import os
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal

import torch

from sqft.kernels.choices import TORCH, Choice, choose_kernels

__all__ = ["KERNELS", "computes_in_bfloat16", "device_capability", "kernels_for"]

KERNELS = ("auto", "torch", "triton")

logger = logging.getLogger(__name__)


def kernels_for(
    wanted: Literal["auto", "torch", "triton"] | Choice,
    device: torch.device,
    shape: torch.Size,
    *,
    quantized: bool,
) -> Choice:
    """The kernels for a weight (out, in) on a device.

    wanted: torch; triton, where it can run (an NVIDIA GPU, or Triton's interpreter), else torch and a warning
    once; auto: what the table in `kernels.choices` says is faster on this kind of card; a Choice is itself.
    """
    if isinstance(wanted, Choice):
        return wanted
    if wanted == "torch" or (wanted == "auto" and device.type != "cuda"):
        return TORCH
    reason = _missing(device.type, os.environ.get("TRITON_INTERPRET", ""))
    if reason is not None:
        if wanted == "triton":
            _warn(reason)
        return TORCH
    rows, columns = shape
    return choose_kernels(device_capability(device), (rows, columns), quantized=quantized, wanted=wanted)


@lru_cache
def device_capability(device: torch.device) -> str:
    """The compute capability of an NVIDIA GPU, such as "9.0"; the kind of device of anything else."""
    if device.type != "cuda":
        return device.type
    return ".".join(str(part) for part in torch.cuda.get_device_capability(device))


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether products run in bfloat16 by default: on a GPU that has it. A CPU is fast in float32."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


@lru_cache
def _missing(device: str, interpreter: str) -> str | None:
    """Why the kernels cannot run here, or None if they can."""
    if find_spec("triton") is None:
        return "Triton is not installed (pip install 'sqft[triton]')"
    if device != "cuda" and interpreter in ("", "0"):
        return f"they need an NVIDIA GPU, and tensors are on {device}"
    return None


@lru_cache
def _warn(reason: str) -> None:
    """Log a warning, each text once."""
    logger.warning("kernels: triton is left out, torch computes the same: %s", reason)
