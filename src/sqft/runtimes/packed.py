"""Packed directories in transformers: linears that decode straight from mask and kept codes, on the CPU.

    import sqft.runtimes.packed
    model = AutoModelForCausalLM.from_pretrained("runs/demo/merged-packed")

Importing this module enters the form into transformers' tables of quantizers. A product rounds activations
to 8 bits, as llama.cpp does (`kernels.reference`); where there are no compiled kernels, weights are
dequantized when they are loaded, and the products are torch's.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Integer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sqft.errors import ModelError
from sqft.kernels.packed_matrix import HugePages, Layout, PackedMatrix, kernel_library
from sqft.models.checkpoint import CODES_ENDS, INDEX, KEPT, SINGLE, SPARSE_FILE, WEIGHT
from sqft.models.packing import PACKED_METHOD, read_grid, unpack_qparams, unpack_weight
from sqft.models.sparse_packing import STEPS, unpack_codes, unpack_head
from sqft.ops import GridSpec, QuantizedWeight

__all__ = ["PackedLinear", "SqftPackedConfig", "SqftPackedQuantizer"]

logger = logging.getLogger(__name__)

STORED = (
    "weight_mask", "weight_kept", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape",
    "byte_steps", "byte_scale",
)  # fmt: skip


class PackedLinear(nn.Module):
    """y = x @ weight.T + bias with a weight of packed codes; for inference on a CPU.

    stored: the tensors of the weight as the file has them, by the end of their name; after `prepare` there is
    `matrix` instead, or `weight` where the kernels cannot hold the grid. Without any it is a head that is
    tied to its embedding, and waits for `share`.
    """

    def __init__(
        self, in_features: int, out_features: int, stored: dict[str, Tensor], bias: Tensor | None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.is_tied = not stored
        for end, tensor in stored.items():
            self.register_buffer(end, tensor)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.matrix: PackedMatrix | None = None
        self.weight: Tensor

    def prepare(self, name: str, grid: GridSpec, memory: HugePages, dtype: torch.dtype) -> None:
        """Turn the stored tensors into what a product reads.

        Raises: ModelError if they do not fit each other.
        """
        stored = {f"{name}.{end}": self._buffers.pop(end) for end in STORED if end in self._buffers}

        def tensor(key: str) -> Tensor:
            value = stored[key]
            assert value is not None
            return value

        if f"{name}{STEPS}" in stored:
            head = unpack_head(name, tensor)
            codes, qparams = head.codes, head.qparams
        else:
            qparams = unpack_qparams(name, tensor, grid)
            if f"{name}{KEPT}" in stored:
                codes, _ = unpack_codes(name, tensor, self.in_features, grid.bits, qparams.zero_point)
            else:
                codes = unpack_weight(name, tensor, grid).codes
        zero = qparams.zero_point.repeat_interleave(self.in_features // qparams.zero_point.shape[1], dim=1)
        try:
            steps = codes.to(torch.int16) - zero.to(torch.int16)
            layout: Layout | None = None if qparams.bits <= 4 else "bytes"
            self.matrix = PackedMatrix.pack(_as_int8(steps), qparams.scale, layout, memory)
        except (ValueError, RuntimeError) as error:
            logger.info("%s is dequantized: %s", name, error)
            weight = QuantizedWeight(codes, qparams).dequantize().to(dtype)
            self.register_buffer("weight", weight, persistent=False)

    def share(self, other: "PackedLinear") -> None:
        """Multiply with the weight of another, as a head does that is tied to its embedding."""
        self.matrix = other.matrix
        if other.matrix is None:
            self.register_buffer("weight", other.weight, persistent=False)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The product, in the dtype of x."""
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("a packed model has no gradient; `sqft unpack` gives one that can be trained")
        if self.matrix is None:
            return nn.functional.linear(x, self.weight, self.bias)
        if x.device.type != "cpu":
            raise RuntimeError("packed weights are multiplied on the CPU; move model and inputs there")
        y = self.matrix.multiply(x.reshape(-1, self.in_features), threads=torch.get_num_threads())
        y = y if self.bias is None else y.add_(self.bias)
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        kind = "dequantized" if self.matrix is None else self.matrix.layout
        return f"{self.in_features}, {self.out_features}, layout={kind}"


class PackedEmbedding(PackedLinear):
    """Rows of a weight in steps of 8 bits, looked up one by one; a tied head shares the weight."""

    def __init__(self, embedding: nn.Embedding, stored: dict[str, Tensor]) -> None:
        super().__init__(embedding.embedding_dim, embedding.num_embeddings, stored, None)
        self.dtype = torch.float32

    def prepare(self, name: str, grid: GridSpec, memory: HugePages, dtype: torch.dtype) -> None:
        """Turn the stored tensors into what rows are read from; rows come in `dtype`."""
        super().prepare(name, grid, memory, dtype)
        self.dtype = dtype

    def forward(self, ids: Integer[Tensor, "*batch"]) -> Float[Tensor, "*batch width"]:
        """The rows of these tokens."""
        if self.matrix is None:
            return nn.functional.embedding(ids, self.weight)
        return self.matrix.take_rows(ids.flatten()).to(self.dtype).view(*ids.shape, self.in_features)


@register_quantization_config(PACKED_METHOD)
class SqftPackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a packed model, as config.json has it."""

    def __init__(self, **values: Any) -> None:
        self.quant_method = PACKED_METHOD
        self.values = {key: value for key, value in values.items() if key != "quant_method"}

    @property
    def grid(self) -> GridSpec:
        """Raises: ModelError if the model is packed in another version of the format."""
        return read_grid(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """What was read."""
        return {"quant_method": self.quant_method, **self.values}


@register_quantizer(PACKED_METHOD)
class SqftPackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Opens packed models for transformers."""

    requires_calibration = True  # only what sqft packed can be opened

    def validate_environment(self, *args: Any, device_map: Any = None, **options: Any) -> None:
        """Raises: ModelError for another device than the CPU, or another version of the format."""
        _ = self.quantization_config.grid
        devices = device_map.values() if isinstance(device_map, dict) else [device_map]
        if any(device not in (None, "auto", "cpu", torch.device("cpu")) for device in devices):
            raise ModelError("a packed model runs on the CPU; leave device_map out, or unpack the model")
        if kernel_library() is None:
            logger.warning("no CPU kernels here (a C compiler makes them): packed weights are dequantized")

    def update_device_map(self, device_map: Any) -> Any:
        """Everything is on the CPU."""
        return None if device_map is None else {"": "cpu"}

    def update_attn_implementation(self, config: Any) -> Any:
        """The first that is seen of the configuration: it learns what the weights are called.

        config.json does not say it, so that transformers without this module finds no weights, rather than
        opening a quantizer it does not know as a model of random ones.
        """
        index = Path(config.name_or_path) / INDEX.replace("model", SPARSE_FILE)
        config.transformers_weights = index.name if index.is_file() else SINGLE.replace("model", SPARSE_FILE)
        return config

    update_tp_plan = update_attn_implementation  # transformers 5.17 shows it here first

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str], **options: Any
    ) -> None:
        for path in checkpoint_files:
            try:
                opened = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} is truncated or was changed; fetch the model again") from error
            with opened as file:
                keys = set(file.keys())
                ends = (*CODES_ENDS, STEPS)
                names = [key.removesuffix(end) for key in keys for end in ends if key.endswith(end)]
                for name in names:
                    slices = {end: f"{name}.{end}" for end in STORED if f"{name}.{end}" in keys}
                    stored = {end: _empty_like(file.get_slice(key)) for end, key in slices.items()}
                    _replace(model, name, stored)
        if isinstance(model.get_input_embeddings(), PackedEmbedding) and model.all_tied_weights_keys:
            for name in model.all_tied_weights_keys:  # tied to what transformers cannot tie any more
                _replace(model, name.removesuffix(WEIGHT), {})
            model.config.tie_word_embeddings, model.all_tied_weights_keys = False, {}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **options: Any) -> PreTrainedModel:
        memory, grid = HugePages(), self.quantization_config.grid
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear):
                if module.is_tied:
                    module.share(model.get_input_embeddings())
                else:
                    module.prepare(name, grid, memory, model.dtype)
        return model

    def is_serializable(self) -> bool:
        """A packed directory is copied, not saved."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradients."""
        return False


def _replace(model: PreTrainedModel, name: str, stored: dict[str, Tensor]) -> None:
    old = model.get_submodule(name)
    new: PackedLinear
    if isinstance(old, nn.Embedding):
        new = PackedEmbedding(old, stored)
    else:
        new = PackedLinear(old.in_features, old.out_features, stored, old.bias)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _as_int8(steps: Tensor) -> Tensor:
    lowest, highest = steps.aminmax()
    if lowest < -127 or highest > 127:
        raise ValueError("a step does not fit 8 bits")
    return steps.to(torch.int8)


def _empty_like(stored: Any) -> Tensor:
    dtypes = {
        "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64,
        "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    }  # fmt: skip
    return torch.empty(stored.get_shape(), dtype=dtypes[stored.get_dtype()], device="meta")
