"""A plain LoRA in GGUF, which llama.cpp applies at run time."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from gguf.constants import MODEL_ARCH_NAMES
from numpy.typing import NDArray
from torch import Tensor

from sqft.errors import ExportError
from sqft.formats.gguf_families import FAMILIES
from sqft.formats.gguf_names import gguf_name, row_order
from sqft.formats.weights import ExportSource
from sqft.models.gguf_header import open_gguf

__all__ = ["read_gguf_adapter", "write_gguf_adapter"]

Array = NDArray[Any]


def write_gguf_adapter(source: ExportSource, factors: dict[str, tuple[Tensor, Tensor]], path: Path) -> None:
    """Write a plain LoRA in float16, A (rank, in) and B (out, rank) by linear, for llama.cpp: it adds B A x.

    llama.cpp scales by alpha / rank, and by 1 where alpha is 0: B holds the scaling. float16 is what its own
    converter writes; float32 would be twice as much to read for every token.

    Raises: ExportError if a number is too large for float16.
    """
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[FAMILIES[source.architecture].arch])
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    for name, (lora_A, lora_B) in factors.items():
        stored_name = gguf_name(source, f"{name}.weight")
        rows = row_order(source, f"{name}.weight")
        low, high = _half(name, lora_A), _half(name, lora_B)
        writer.add_tensor(f"{stored_name}.lora_a", low)
        writer.add_tensor(f"{stored_name}.lora_b", high if rows is None else np.ascontiguousarray(high[rows]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf_adapter(source: ExportSource, names: list[str], path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by linear, as `write_gguf_adapter` took them, rounded to float16.

    Raises: ExportError if one is missing.
    """
    stored = {tensor.name: tensor.data for tensor in open_gguf(path).tensors}
    factors = {}
    for name in names:
        stored_name = gguf_name(source, f"{name}.weight")
        rows = row_order(source, f"{name}.weight", inverse=True)
        low, high = stored.get(f"{stored_name}.lora_a"), stored.get(f"{stored_name}.lora_b")
        if low is None or high is None:
            raise ExportError(f"{path} lacks the update of {name}")
        high = high if rows is None else high[rows]
        factors[name] = torch.from_numpy(np.array(low)), torch.from_numpy(np.array(high))
    return factors


def _half(name: str, factor: Tensor) -> Array:
    rounded = factor.half()
    if not bool(rounded.isfinite().all()):
        raise ExportError(f"the adapter's update of {name} does not fit float16; merge it instead")
    return rounded.contiguous().numpy()
