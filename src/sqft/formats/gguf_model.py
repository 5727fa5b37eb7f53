"""GGUF files for llama.cpp: the trained codes as Q4_0, Q4_1 or Q8_0 blocks, everything else in 16 bits.

Source: gguf-py and llama.cpp's `convert_hf_to_gguf.py` for names, metadata and the order of rotary rows.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
from gguf.quants import quantize as quantize_blocks
from numpy.typing import NDArray
from torch import Tensor

from sqft.artifacts import FACTS
from sqft.errors import ExportError
from sqft.formats.gguf_blocks import BLOCK, Q4_0, Q4_1, Q8_0, choose_block_type, pack_blocks, unpack_blocks
from sqft.formats.gguf_families import FAMILIES, GgufFamily, head_size, rope_settings
from sqft.formats.gguf_names import gguf_name, norm_offset, row_order, tied_head
from sqft.formats.gguf_tokenizer import write_tokenizer
from sqft.formats.weights import ExportSource, IntegerWeight, exact_in
from sqft.models.gguf_header import open_gguf
from sqft.ops.head_grid import head_codes

__all__ = [
    "HEAD_TYPES",
    "changed_tokenizer_keys",
    "gguf_path",
    "gguf_refusal",
    "head_names",
    "read_gguf",
    "round_head",
    "write_gguf",
]

FILE_TYPES = {
    Q4_0: LlamaFileType.MOSTLY_Q4_0,
    Q4_1: LlamaFileType.MOSTLY_Q4_1,
    Q8_0: LlamaFileType.MOSTLY_Q8_0,
}
PLAIN_TYPES = {
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
    torch.float32: GGMLQuantizationType.F32,
}

ROPES = ("default", "linear", "llama3")
HEADS = {"token_embd.weight", "output.weight"}
HEAD_TYPES = ("auto", "f16", "bf16", "f32", "q8_0")

Array = NDArray[Any]


def gguf_path(directory: Path) -> Path:
    """The GGUF file of an artefact. Raises: ExportError if there is not exactly one."""
    found = sorted(directory.glob("*.gguf"))
    if len(found) != 1:
        raise ExportError(f"{directory} holds {len(found)} GGUF files, not one")
    return found[0]


def gguf_refusal(source: ExportSource) -> str | None:
    """Why a model cannot be held exactly; None if it can."""
    family, config = FAMILIES.get(source.architecture), source.config
    if family is None:
        return f"the architecture {source.architecture} (only {', '.join(FAMILIES)})"
    reason = family.refuse(config)
    if reason is not None:
        return reason
    rope = rope_settings(config).get("rope_type", "default")
    if rope not in ROPES:
        return f"the rotary embedding '{rope}' (only {', '.join(ROPES)})"
    for name in source.quantized_names:
        weight = source.quantized(name)
        if choose_block_type(weight) is None:
            size = weight.qparams.group_size(weight.codes.shape[1])
            kind = "symmetric" if weight.qparams.symmetric else "asymmetric"
            return f"{kind} {weight.qparams.bits}-bit groups of {size} (blocks are of {BLOCK})"
    return None


def write_gguf(source: ExportSource, path: Path, *, head_type: str = "auto") -> dict[str, str]:
    """Write a model as GGUF and return the type of every tensor.

    head_type: type of embedding and output head, auto (the smallest exact one), f16, bf16, f32 or q8_0.

    Raises: ExportError if the tokenizer has no GGUF form.
    """
    family, config = FAMILIES[source.architecture], source.config
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[family.arch])
    _write_metadata(writer, source, family)
    write_tokenizer(writer, source.tokenizer, int(config["vocab_size"]))
    kinds: dict[str, str] = {}
    for name, data, kind in _tensors(source, head_type):
        writer.add_tensor(name, data, raw_dtype=kind)
        kinds[name] = kind.name
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kinds


def read_gguf(source: ExportSource, path: Path) -> Iterator[tuple[str, IntegerWeight | Tensor]]:
    """The weights of a GGUF file under the names and in the row order of transformers.

    Raises: ExportError if a tensor is missing.
    """
    stored = {tensor.name: tensor for tensor in open_gguf(path).tensors}
    tied = tied_head(source)
    for name in source.tensor_names():
        if name == tied:
            continue
        stored_name = gguf_name(source, name)
        if stored_name not in stored:
            raise ExportError(f"{path} lacks {stored_name}")
        tensor = stored[stored_name]
        undo = row_order(source, name, inverse=True)
        data = np.asarray(tensor.data[undo] if undo is not None else tensor.data)
        kind = tensor.tensor_type
        if name.removesuffix(".weight") in source.quantized_names and kind in FILE_TYPES:
            yield name, unpack_blocks(data, kind)
        else:
            yield name, _without_offset(source, name, _unpack_plain(data, kind))


def changed_tokenizer_keys(source: ExportSource, path: Path) -> list[str]:
    """The tokenizer keys of a GGUF file that differ from those that this model's tokenizer gives."""
    writer = GGUFWriter(None, MODEL_ARCH_NAMES[FAMILIES[source.architecture].arch])
    write_tokenizer(writer, source.tokenizer, int(source.config["vocab_size"]))
    expected = {key: value.value for part in writer.kv_data for key, value in part.items()}
    fields = open_gguf(path).fields
    keys = sorted({key for key in (*expected, *fields) if key.startswith("tokenizer.")})
    return [k for k in keys if k not in fields or fields[k].contents() != expected.get(k)]


def head_names(source: ExportSource) -> set[str]:
    """The plain tensors that a head type applies to: embedding and output head, by transformers' names."""
    tied = tied_head(source)
    return {name for name in source.plain_names if name != tied and gguf_name(source, name) in HEADS}


def round_head(tensor: Tensor, head_type: str) -> Tensor:
    """An embedding or head as a file of this type holds it."""
    return _unpack_plain(*_plain(tensor, head_type))


def _tensors(source: ExportSource, head_type: str) -> Iterator[tuple[str, Array, GGMLQuantizationType]]:
    tied = tied_head(source)
    for name in source.tensor_names():
        if name == tied:
            continue
        stored_name, order = gguf_name(source, name), row_order(source, name)
        linear = name.removesuffix(".weight")
        if linear in source.quantized_names:
            weight = source.quantized(linear)
            kind = choose_block_type(weight)
            assert kind is not None, name
            data: Array = pack_blocks(weight, kind)
        else:
            tensor, offset = source.tensor(name), norm_offset(source, name)
            tensor = tensor.float() + offset if offset else tensor
            data, kind = _plain(tensor, head_type if stored_name in HEADS else "auto")
        yield stored_name, data if order is None else np.ascontiguousarray(data[order]), kind
    factors = _rope_factors(source.config)
    if factors is not None:
        yield "rope_freqs.weight", factors, GGMLQuantizationType.F32


def _without_offset(source: ExportSource, name: str, stored: Tensor) -> Tensor:
    """A tensor as transformers holds it: the model's own where that gives the stored sum."""
    offset = norm_offset(source, name)
    if not offset:
        return stored
    own = source.tensor(name).float()
    return torch.where(own + offset == stored, own, stored - offset)


def _plain(tensor: Tensor, wanted: str) -> tuple[Array, GGMLQuantizationType]:
    """A tensor as stored numbers: vectors in float32, matrices in the smallest type that is exact.

    An embedding or head that was put on a grid of 8 bits (`quantize.head`) is exact in Q8_0.
    """
    if tensor.ndim == 1:
        return tensor.float().numpy(), GGMLQuantizationType.F32
    on_grid = head_codes(tensor) if wanted == "auto" else None
    if on_grid is not None:
        return pack_blocks(on_grid, Q8_0), Q8_0
    if wanted == "q8_0":
        if tensor.shape[1] % BLOCK:
            raise ExportError(f"q8_0 needs a width divisible by {BLOCK}, not {tensor.shape[1]}; use f16")
        return quantize_blocks(tensor.float().numpy(), Q8_0), Q8_0
    choices = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
    if wanted in choices:
        dtype = choices[wanted]
    elif wanted == "auto":
        dtype = next(d for d in PLAIN_TYPES if exact_in(tensor, d))
    else:
        raise ExportError(f"head type '{wanted}' is unknown; choose from {', '.join(HEAD_TYPES)}")
    if dtype == torch.bfloat16:
        return tensor.bfloat16().view(torch.int16).numpy().view(np.uint8), GGMLQuantizationType.BF16
    return tensor.to(dtype).numpy(), PLAIN_TYPES[dtype]


def _unpack_plain(data: Array, kind: GGMLQuantizationType) -> Tensor:
    if kind == GGMLQuantizationType.BF16:
        return torch.from_numpy(np.array(data).view(np.int16)).view(torch.bfloat16)
    if kind == Q8_0:
        integers = unpack_blocks(data, kind)
        return torch.from_numpy(integers.steps * integers.scale.repeat(BLOCK, axis=1))
    return torch.from_numpy(np.array(data))


def _write_metadata(writer: GGUFWriter, source: ExportSource, family: GgufFamily) -> None:
    config = source.config
    rope = rope_settings(config)
    window = config.get("sliding_window")
    context = int(config["max_position_embeddings"])
    windowless = family.arch in (MODEL_ARCH.LLAMA, MODEL_ARCH.STARCODER2)
    writer.add_type("model")
    writer.add_name(source.directory.name)
    writer.add_vocab_size(config["vocab_size"])
    # llama.cpp's llama has no sliding window: within one window there is no difference.
    writer.add_context_length(min(context, window) if window and windowless else context)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    groups = config.get("num_key_value_heads") if family.grouped else None
    writer.add_head_count_kv(groups or config["num_attention_heads"])
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    add_epsilon = writer.add_layer_norm_eps if family.layer_norm else writer.add_layer_norm_rms_eps
    add_epsilon(config[family.epsilon])
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))
    partial = float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)
    writer.add_rope_dimension_count(int(head_size(config) * partial))
    if rope.get("rope_type", "default") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    family.tell(writer, config)
    writer.add_quantization_version(2)
    first = choose_block_type(source.quantized(source.quantized_names[0])) if source.quantized_names else None
    writer.add_file_type(LlamaFileType.MOSTLY_F16 if first is None else FILE_TYPES[first])
    facts = source.directory / FACTS
    if facts.is_file():
        writer.add_string("sqft.facts", json.dumps(json.loads(facts.read_text(encoding="utf-8"))))


def _rope_factors(config: dict[str, Any]) -> NDArray[np.float32] | None:
    """Llama 3's frequency factors. Source: transformers, `modeling_rope_utils`."""
    rope = rope_settings(config)
    if rope.get("rope_type") != "llama3":
        return None
    size = head_size(config)
    frequency = float(rope["rope_theta"]) ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    wavelength, original = 2 * np.pi / frequency, float(rope["original_max_position_embeddings"])
    low, high, factor = (float(rope[k]) for k in ("low_freq_factor", "high_freq_factor", "factor"))
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    factors: NDArray[np.float64] = 1 / ((1 - smooth) / factor + smooth)
    return factors.astype(np.float32)
