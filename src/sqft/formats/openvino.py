"""OpenVINO IR whose weights are the trained codes: what it holds, writing it, reading it back."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sqft.errors import ExportError, require
from sqft.formats.openvino_graph import MARK, attention_windows, make_stateful, replace_weights, trace_model
from sqft.formats.weights import ExportSource, IntegerWeight, exact_in

__all__ = ["XML", "openvino_refusal", "read_openvino", "write_openvino"]

XML = "openvino_model.xml"
Array = NDArray[Any]


def openvino_refusal(source: ExportSource) -> str | None:
    """Why a model cannot be held exactly; None if it can."""
    for name in source.quantized_names:
        if not exact_in(source.quantized(name).qparams.scale, torch.float16):
            return f"scales of {name} that are not exact in float16"
    if attention_windows(source.checkpoint.config) is None:
        return f"the attention windows of {source.architecture}"
    if source.config.get("attn_logit_softcapping"):
        return f"the soft cap on the attention logits of {source.architecture}"
    return None


def write_openvino(source: ExportSource, directory: Path) -> dict[str, str]:
    """Write the IR, the tokenizer and the configuration; return the type of every weight.

    Raises: ExportError if a projection is not found in the traced graph; MissingExtraError.
    """
    ov = require("openvino", "openvino")
    graph, layers = trace_model(source)
    make_stateful(graph, layers)
    keep: list[Array] = []  # OpenVINO constants share memory with these until the IR is on disk
    kinds = replace_weights(graph, source, keep)
    ov.save_model(graph, directory / XML, compress_to_fp16=False)
    tokenizer = source.tokenizer
    tokenizer.save_pretrained(directory)
    converted = require("openvino_tokenizers", "openvino").convert_tokenizer(tokenizer, with_detokenizer=True)
    for part, name in zip(converted, ("openvino_tokenizer.xml", "openvino_detokenizer.xml"), strict=True):
        ov.save_model(part, directory / name)
    config = source.config | {"use_cache": True}
    (directory / "config.json").write_text(json.dumps(config, indent=1, default=str), encoding="utf-8")
    generation = source.directory / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, directory / generation.name)
    return kinds


def read_openvino(source: ExportSource, directory: Path) -> Iterator[tuple[str, IntegerWeight | Tensor]]:
    """The weights of an IR on disk, by tensor name.

    Raises: ExportError if one is missing.
    """
    ov = require("openvino", "openvino")
    graph = ov.Core().read_model(directory / XML)
    constants = {
        node.get_friendly_name(): node
        for node in graph.get_ops()
        if node.get_type_name() == "Constant" and node.get_friendly_name().startswith(MARK)
    }
    for name in source.quantized_names:
        found = _integer_weight(constants, name)
        if found is None:
            raise ExportError(f"{directory / XML} lacks the codes of {name}")
        yield f"{name}.weight", found
    for name in source.plain_names:
        found = _integer_weight(constants, name.removesuffix(".weight"))
        if found is not None:  # an embedding or head on a grid of 8 bits
            yield name, torch.from_numpy(found.steps * found.scale.repeat(found.group_size, axis=1))
    plain, tied = set(source.plain_names), source.checkpoint.tied_weights
    for key, node in constants.items():
        name = key.removeprefix(MARK)
        name = name if name in plain else tied.get(name, name)
        if name in plain:
            yield name, _floats(node)


def _integer_weight(constants: dict[str, Any], name: str) -> IntegerWeight | None:
    """The codes and scales of a linear or embedding; None if the graph has none for it."""
    parts = [constants.get(f"{MARK}{name}.{part}") for part in ("codes", "scale", "zero_point")]
    if parts[0] is None or parts[1] is None:
        return None
    codes = _integers(parts[0])
    zero_point = 0 if parts[2] is None else _integers(parts[2])
    steps = (codes - zero_point).reshape(len(codes), -1).astype(np.int16)
    return IntegerWeight(steps, np.array(parts[1].data, dtype=np.float32).reshape(len(codes), -1))


def _floats(node: Any) -> Tensor:
    """The values of a constant of 16 or 32 bits, float32, in its shape."""
    if node.get_element_type().get_type_name() == "bf16":
        halves = np.array(node.data).view(np.int16)
        return torch.from_numpy(halves).view(torch.bfloat16).float()
    return torch.from_numpy(np.array(node.data, dtype=np.float32))


def _integers(node: Any) -> NDArray[np.int16]:
    """The integers of a constant of 4 or 8 bits, in its shape."""
    shape = list(node.get_output_shape(0))
    kind = node.get_element_type().get_type_name()
    packed = np.array(node.data)
    if kind in {"i4", "u4"}:
        packed = packed.reshape(-1).view(np.uint8)
        if packed.size != int(np.prod(shape)):
            packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)[: int(np.prod(shape))]
    values = packed.reshape(shape).astype(np.int16)
    if kind == "i4":
        values = np.where(values > 7, values - 16, values)
    return values.astype(np.int16)
