"""The graph of an OpenVINO IR: a stateful decoder, traced from transformers, on the trained codes.

    codes u4 or u8 (i4 where symmetric) → convert f16 → [- zero point] → * scale f16 → f32

The constants are the trained integers; nothing is quantized a second time. The IR has the inputs that
openvino-genai and optimum-intel expect: input_ids, attention_mask, position_ids, beam_idx.
Source: OpenVINO documentation, "stateful models" and "low-precision weights".
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from sqft.errors import ExportError, require
from sqft.formats.weights import ExportSource, exact_in
from sqft.models import load_model
from sqft.ops import QuantizedWeight
from sqft.ops.head_grid import head_codes

__all__ = ["MARK", "attention_windows", "make_stateful", "replace_weights", "trace_model"]

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


def attention_windows(config: Any) -> dict[str, int | None] | None:
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


def trace_model(source: ExportSource) -> tuple[Any, int]:
    """The model as a graph whose cache goes in and out as tensors, and its number of layers."""
    ov = require("openvino", "openvino")
    model = load_model(source.directory, dtype=torch.float32)
    model.config._attn_implementation = "sdpa"
    config = model.config
    windows = attention_windows(config)
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


def make_stateful(graph: Any, layers: int) -> None:
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


def replace_weights(graph: Any, source: ExportSource, keep: list[Array]) -> dict[str, str]:
    """Put the trained codes in place of the traced constants; return the type of every weight.

    keep: takes the arrays that the graph's constants share memory with.

    Raises: ExportError if a projection is not found.
    """
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
    """A plain matrix in the smallest type that keeps its values; with `quantize.head` that is 8 bits."""
    ov, op = require("openvino", "openvino"), require("openvino.opset13", "openvino")
    tensor = torch.from_numpy(values)
    on_grid = head_codes(tensor.half()) if exact_in(tensor, torch.float16) else None
    if on_grid is not None:
        return _integer_constant(name.removesuffix(".weight"), on_grid, keep)
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
