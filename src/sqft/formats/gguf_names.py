"""What llama.cpp calls the tensors of a model, and in which order it wants their rows.

Source: gguf-py and llama.cpp's `convert_hf_to_gguf.py`.
"""

import numpy as np
from gguf import get_tensor_name_map as tensor_name_map
from gguf.constants import MODEL_ARCH_NAMES
from numpy.typing import NDArray

from sqft.errors import ExportError
from sqft.formats.gguf_families import FAMILIES, head_size
from sqft.formats.weights import ExportSource

__all__ = ["gguf_name", "norm_offset", "row_order", "tied_head"]


def tied_head(source: ExportSource) -> str | None:
    """The head's weight where it is the embedding's, and so is not stored; else None."""
    return "lm_head.weight" if source.config.get("tie_word_embeddings") else None


def gguf_name(source: ExportSource, name: str) -> str:
    """llama.cpp's name of a tensor. Raises: ExportError if it has none."""
    arch = FAMILIES[source.architecture].arch
    names = tensor_name_map(arch, len(source.checkpoint.block_names))
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ExportError(f"llama.cpp's {MODEL_ARCH_NAMES[arch]} has no place for {name}")
    return str(found)


def norm_offset(source: ExportSource, name: str) -> int:
    """What llama.cpp's file has added to a tensor: 1 to Gemma's norms, which multiply with 1 + weight."""
    return FAMILIES[source.architecture].norm_offset if name.endswith("norm.weight") else 0


def row_order(source: ExportSource, name: str, *, inverse: bool = False) -> NDArray[np.int64] | None:
    """The rows of a tensor in llama.cpp's order; None where it is transformers' own.

    Of interleaved q and k the two halves of a head alternate; GPT-NeoX's q, k and v, which alternate head by
    head, come one after the other.
    """
    linear = name.rsplit(".", 2)[-2] if name.count(".") > 1 else ""
    config = source.config
    heads = int(config["num_attention_heads"])
    if linear == "query_key_value":
        order = np.arange(3 * heads * head_size(config)).reshape(heads, 3, -1).swapaxes(0, 1).reshape(-1)
    elif FAMILIES[source.architecture].interleaved and linear in {"q_proj", "k_proj"}:
        if linear == "k_proj":
            heads = int(config.get("num_key_value_heads") or heads)
        rows = heads * head_size(config)
        order = np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(rows)
    else:
        return None
    return np.argsort(order) if inverse else order
