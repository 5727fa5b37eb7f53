"""OpenVINO IR whose weights are the trained codes: a stateful decoder, traced from transformers.

    codes u4 or u8 (i4 where symmetric) → convert f16 → [- zero point] → * scale f16 → f32

The constants are the trained integers; nothing is quantized a second time. The IR has the inputs that
openvino-genai and optimum-intel expect: input_ids, attention_mask, position_ids, beam_idx.
Source: OpenVINO documentation, "stateful models" and "low-precision weights".
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from sqft.errors import ExportError, require
from sqft.formats.weights import ExportSource, IntegerWeight, exact_in
from sqft.models import QuantizedWeight, load_model

__all__ = ["OpenVinoModel", "openvino_refusal", "read_openvino", "write_openvino"]

XML = "openvino_model.xml"
MARK = "sqft."  # prefix of the constants that hold codes, scales and zero points
EXAMPLE_PAST, EXAMPLE_NEW = 2, 3
ONE_WINDOW = {"mistral", "mixtral", "phi3", "starcoder2"}  # in every layer, if there is one
LAYER_WINDOWS = {"qwen2", "qwen3"}  # in some layers, which take a mask for each kind

Array = NDArray[Any]


class _Traced(nn.Module):
    """A decoder whose cache goes in and out as tensors, and whose mask is plain arithmetic."""

    def __init__(self, model: nn.Module, windows: dict[str, int | None]) -> None:
        super().__init__()
        self.model = model
        self.windows = windows

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, ...]:
        cache = DynamicCache()
        for keys, values in past:
            layer = DynamicLayer()
            layer.dtype, layer.device = keys.dtype, keys.device
            layer.keys, layer.values, layer.is_initialized = keys, values, True
            cache.layers.append(layer)
        end = attention_mask.shape[1]
        keys = torch.arange(end)
        behind = keys[end - input_ids.shape[1] :, None] - keys  # tokens from a key to a query after it
        masks = {}
        for kind, window in self.windows.items():
            allowed = behind >= 0 if window is None else (behind >= 0) & (behind < window)
            allowed = allowed & (attention_mask[:, None, None, :] > 0)
            masks[kind] = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
        out = self.model(
            input_ids=input_ids,
            attention_mask=masks.get("", masks),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = [tensor for layer in out.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return (out.logits, *present)


def openvino_refusal(source: ExportSource) -> str | None:
    """Why a model cannot be held exactly; None if it can."""
    for name in source.quantized_names:
        if not exact_in(source.quantized(name).qparams.scale, torch.float16):
            return f"scales of {name} that are not exact in float16"
    if _windows(source.checkpoint.config) is None:
        return f"the attention windows of {source.architecture}"
    if source.config.get("attn_logit_softcapping"):
        return f"the soft cap on the attention logits of {source.architecture}"
    return None


def _windows(config: Any) -> dict[str, int | None] | None:
    """The attention window of every kind of layer, None without one; "" stands for all layers.

    None where it is not known how transformers would apply them.
    """
    window, kinds = getattr(config, "sliding_window", None), set(getattr(config, "layer_types", None) or ())
    if config.model_type in ONE_WINDOW:
        return {"": window}
    if kinds <= {"full_attention"} and (window is None or kinds):
        return {"": None}
    if kinds <= {"full_attention", "sliding_attention"}:
        if kinds and config.model_type in LAYER_WINDOWS:
            return {"full_attention": None, "sliding_attention": window}
        if window is None or window >= config.max_position_embeddings:
            return {"": None}
    return None


def write_openvino(source: ExportSource, directory: Path) -> dict[str, str]:
    """Write the IR, the tokenizer and the configuration; return the type of every weight.

    Raises: ExportError if a projection is not found in the traced graph; MissingExtraError.
    """
    ov = require("openvino", "openvino")
    graph, layers = _convert(source)
    _make_stateful(graph, layers)
    keep: list[Array] = []  # OpenVINO constants share memory with these until the IR is on disk
    kinds = _replace_weights(graph, source, keep)
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
    """The weights of an IR on disk: integers by the name of their linear, plain ones by their full name.

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
        parts = {part: constants.get(f"{MARK}{name}.{part}") for part in ("codes", "scale", "zero_point")}
        if parts["codes"] is None or parts["scale"] is None:
            raise ExportError(f"{directory / XML} lacks the codes of {name}")
        codes = _integers(parts["codes"])
        zero_point = 0 if parts["zero_point"] is None else _integers(parts["zero_point"])
        steps = (codes - zero_point).reshape(len(codes), -1).astype(np.int16)
        scale = np.array(parts["scale"].data, dtype=np.float32).reshape(len(codes), -1)
        yield name, IntegerWeight(steps, scale)
    plain, tied = set(source.plain_names), source.checkpoint.tied_weights
    for key, node in constants.items():
        name = key.removeprefix(MARK)
        name = name if name in plain else tied.get(name, name)
        if name in plain:
            yield name, _floats(node)


class OpenVinoModel:
    """An IR on this CPU. exact: float32 arithmetic throughout; else the runtime's own choice."""

    def __init__(self, directory: Path, *, exact: bool = True, threads: int | None = None) -> None:
        ov = require("openvino", "openvino")
        options: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads or torch.get_num_threads()}
        if exact:
            options |= {
                "INFERENCE_PRECISION_HINT": "f32",
                "KV_CACHE_PRECISION": "f32",
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
            }
        self._request = ov.Core().compile_model(directory / XML, "CPU", options).create_infer_request()
        self._length = 0

    def reset(self) -> None:
        """Forget the context."""
        self._request.reset_state()
        self._length = 0

    def logits(self, token_ids: list[int]) -> Tensor:
        """(tokens, vocabulary) float32 logits of tokens that continue the context."""
        end = self._length + len(token_ids)
        result = self._request.infer(
            {
                "input_ids": np.array([token_ids], np.int64),
                "attention_mask": np.ones((1, end), np.int64),
                "position_ids": np.arange(self._length, end, dtype=np.int64)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
        )
        self._length = end
        return torch.from_numpy(result["logits"][0].copy())


def _convert(source: ExportSource) -> tuple[Any, int]:
    ov = require("openvino", "openvino")
    model = load_model(source.directory, dtype=torch.float32)
    model.config._attn_implementation = "sdpa"
    config = model.config
    windows = _windows(config)
    assert windows is not None
    layers = int(config.num_hidden_layers)
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    total = EXAMPLE_PAST + EXAMPLE_NEW
    example = {
        "input_ids": torch.ones(1, EXAMPLE_NEW, dtype=torch.long),
        "attention_mask": torch.ones(1, total, dtype=torch.long),
        "position_ids": torch.arange(EXAMPLE_PAST, total)[None],
        "past": [tuple(torch.randn(1, heads, EXAMPLE_PAST, size) for _ in range(2)) for _ in range(layers)],
    }
    with torch.no_grad():
        graph = _trace(_Traced(model, windows), example)
    names = ["input_ids", "attention_mask", "position_ids"]
    for index, port in enumerate(graph.inputs):
        name = names[index] if index < 3 else _cache_name("past_key_values", index - 3)
        port.get_tensor().set_names({name})
        shape = [-1, heads, -1, size] if index >= 3 else [-1, -1]
        port.get_node().set_partial_shape(ov.PartialShape(shape))
        port.get_node().set_friendly_name(name)
    for index, port in enumerate(graph.outputs):
        port.get_tensor().set_names({_cache_name("present", index - 1) if index else "logits"})
    graph.validate_nodes_and_infer_types()
    return graph, layers


def _trace(model: _Traced, example: dict[str, Any]) -> Any:
    """What `openvino.convert_model` does, without the usage report that it sends over the network."""
    frontends = require("openvino.frontend", "openvino")
    decoders = require("openvino.frontend.pytorch.ts_decoder", "openvino")
    decoder = decoders.TorchScriptPythonDecoder(model, example_input=example)
    frontend = frontends.FrontEndManager().load_by_framework("pytorch")
    return frontend.convert(frontend.load(decoder))


def _cache_name(prefix: str, index: int) -> str:
    return f"{prefix}.{index // 2}.{'value' if index % 2 else 'key'}"


def _make_stateful(graph: Any, layers: int) -> None:
    """Keep keys and values inside the runtime, reordered by beam_idx, empty at the start."""
    ov = require("openvino", "openvino")
    transformations = require("openvino._offline_transformations", "openvino")
    op = require("openvino.opset13", "openvino")
    beams = op.parameter([-1], dtype=np.int32, name="beam_idx")
    beams.output(0).get_tensor().set_names({"beam_idx"})
    graph.add_parameters([beams])
    for port in list(graph.inputs)[3 : 3 + 2 * layers]:
        users = list(port.get_target_inputs())
        gathered = op.gather(port, beams, op.constant(0, dtype=np.int64))
        for user in users:
            user.replace_source_output(gathered.output(0))
    graph.validate_nodes_and_infer_types()
    names = [_cache_name("past_key_values", index) for index in range(2 * layers)]
    presents = [_cache_name("present", index) for index in range(2 * layers)]
    transformations.apply_make_stateful_transformation(graph, dict(zip(names, presents, strict=True)))
    ids = next(port for port in graph.inputs if "input_ids" in port.get_names())
    batch = op.gather(
        op.shape_of(ids, output_type="i64"), op.constant([0], dtype=np.int64), op.constant(0, dtype=np.int64)
    )
    for node in graph.get_ops():
        if node.get_type_name() != "ReadValue":
            continue
        shape = node.get_output_partial_shape(0)
        ends = [
            batch if axis == 0 else op.constant([0 if axis == 2 else size.get_length()], dtype=np.int64)
            for axis, size in enumerate(shape)
        ]
        empty = op.broadcast(op.constant(0.0, dtype=np.float32), op.concat(ends, 0))
        node.set_arguments([empty])
    graph.validate_nodes_and_infer_types()
    assert isinstance(graph, ov.Model)


def _replace_weights(graph: Any, source: ExportSource, keep: list[Array]) -> dict[str, str]:
    kinds: dict[str, str] = {}
    plain = set(source.plain_names)
    for node in list(graph.get_ops()):
        if node.get_type_name() != "Constant":
            continue
        name = node.get_friendly_name().removeprefix("self.model.")
        if len(node.get_output_shape(0)) < 2:  # norms and biases stay as they are
            if name in plain:
                node.set_friendly_name(f"{MARK}{name}")
            continue
        users = list(node.output(0).get_target_inputs())
        if name.removesuffix(".weight") in source.quantized_names:
            linear = name.removesuffix(".weight")
            decoded, kind = _integer_constant(linear, source.quantized(linear), keep)
        elif node.get_friendly_name().startswith("self."):
            decoded, kind = _half_constant(name, np.array(node.data), keep)
        else:
            continue
        kinds[name] = kind
        for user in users:
            user.replace_source_output(decoded)
    lost = [name for name in source.quantized_names if f"{name}.weight" not in kinds]
    if lost:
        raise ExportError(f"OpenVINO's graph has no constant for {lost[0]}")
    return kinds


def _integer_constant(name: str, weight: QuantizedWeight, keep: list[Array]) -> tuple[Any, str]:
    ov, op = require("openvino", "openvino"), require("openvino.opset13", "openvino")
    qparams = weight.qparams
    rows, columns = weight.codes.shape
    groups = qparams.scale.shape[1]
    shape = [rows, groups, columns // groups]
    codes = weight.codes.numpy()
    wide = qparams.bits > 4
    if qparams.symmetric:
        middle = 1 << (qparams.bits - 1)
        kind = ov.Type.i8 if wide else ov.Type.i4
        codes = (codes.astype(np.int16) - middle).astype(np.int8).view(np.uint8)
    else:
        kind = ov.Type.u8 if wide else ov.Type.u4
    node = op.convert(_constant(f"{name}.codes", codes, shape, kind, keep), "f16")
    if not qparams.symmetric:
        zeros = qparams.zero_point.numpy()
        stored = _constant(f"{name}.zero_point", zeros, [rows, groups, 1], kind, keep)
        node = op.subtract(node, op.convert(stored, "f16"))
    scale = qparams.scale.numpy().astype(np.float16)
    stored = _constant(f"{name}.scale", scale, [rows, groups, 1], ov.Type.f16, keep)
    node = op.convert(op.reshape(op.multiply(node, stored), np.array([rows, columns]), False), "f32")
    return node.output(0), kind.get_type_name()


def _half_constant(name: str, values: Array, keep: list[Array]) -> tuple[Any, str]:
    """A plain matrix in the smallest type that keeps its values."""
    ov, op = require("openvino", "openvino"), require("openvino.opset13", "openvino")
    tensor = torch.from_numpy(values)
    if exact_in(tensor, torch.float16):
        stored = _constant(name, values.astype(np.float16), list(values.shape), ov.Type.f16, keep)
    elif exact_in(tensor, torch.bfloat16):
        halves = tensor.bfloat16().view(torch.int16).numpy()
        stored = _constant(name, halves, list(values.shape), ov.Type.bf16, keep)
    else:
        stored = _constant(name, values, list(values.shape), ov.Type.f32, keep)
        return stored.output(0), "f32"
    return op.convert(stored, "f32").output(0), stored.get_element_type().get_type_name()


def _constant(name: str, values: Array, shape: list[int], kind: Any, keep: list[Array]) -> Any:
    ov = require("openvino", "openvino")
    flat = np.ascontiguousarray(values).reshape(-1)
    if kind in (ov.Type.i4, ov.Type.u4):
        flat = np.append(flat, np.zeros(flat.size % 2, flat.dtype)) & 15
        flat = (flat[0::2] | (flat[1::2] << 4)).astype(np.uint8)
    keep.append(flat)
    constant = ov.op.Constant(ov.Tensor(flat, ov.Shape(shape), kind))
    constant.set_friendly_name(f"{MARK}{name}")
    return constant


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
