"""What llama.cpp calls the tensors of a model, and in which order it wants rotary rows.

Source: gguf-py and llama.cpp's `convert_hf_to_gguf.py`.
"""

from typing import Any

import numpy as np
from gguf import get_tensor_name_map as tensor_name_map
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
from numpy.typing import NDArray

from sqft.errors import ExportError
from sqft.formats.weights import ExportSource

__all__ = ["ARCHITECTURES", "gguf_name", "head_size", "rotary_order", "tied_head"]

# transformers' model type → llama.cpp's architecture, and whether it wants rotary rows interleaved.
ARCHITECTURES: dict[str, tuple[MODEL_ARCH, bool]] = {
    "llama": (MODEL_ARCH.LLAMA, True),
    "mistral": (MODEL_ARCH.LLAMA, True),
    "phi3": (MODEL_ARCH.PHI3, False),
    "qwen2": (MODEL_ARCH.QWEN2, False),
    "qwen3": (MODEL_ARCH.QWEN3, False),
}


def tied_head(source: ExportSource) -> str | None:
    """The head's weight where it is the embedding's, and so is not stored; else None."""
    return "lm_head.weight" if source.config.get("tie_word_embeddings") else None


def gguf_name(source: ExportSource, name: str) -> str:
    """llama.cpp's name of a tensor. Raises: ExportError if it has none."""
    arch, _ = ARCHITECTURES[source.architecture]
    names = tensor_name_map(arch, len(source.checkpoint.block_names))
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ExportError(f"llama.cpp's {MODEL_ARCH_NAMES[arch]} has no place for {name}")
    return str(found)


def rotary_order(source: ExportSource, name: str, *, inverse: bool = False) -> NDArray[np.int64] | None:
    """The rows of a q or k projection in llama.cpp's order: the two halves of a head interleaved."""
    linear = name.rsplit(".", 2)[-2] if name.count(".") > 1 else ""
    if not ARCHITECTURES[source.architecture][1] or linear not in {"q_proj", "k_proj"}:
        return None
    config = source.config
    heads = int(config["num_attention_heads"])
    if linear == "k_proj":
        heads = int(config.get("num_key_value_heads") or heads)
    rows = heads * head_size(config)
    order = np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(rows)
    return np.argsort(order) if inverse else order


def head_size(config: dict[str, Any]) -> int:
    """The width of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
