"""Whole models in memory: to run, and to train adapters on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sqft.errors import ModelError
from sqft.models.checkpoint import Checkpoint, open_checkpoint, read_generation
from sqft.models.quantized_linear import GridLinear, PackedLinear, QuantizedLinear
from sqft.models.saving import save_as_packed
from sqft.models.writer import StoredMasks, read_latents
from sqft.ops import QuantizedWeight, decode_latent, encode_latent, keep_nonzero, latent_codes
from sqft.ops.kernel_use import computes_in_bfloat16
from sqft.ops.mask import existing_mask

__all__ = [
    "build_trainable",
    "load_model",
    "load_trainable",
    "read_quantized",
    "training_dtype",
]

# Share of zeros from which integer weights without a mask count as sparse. Of dense weights, 12 to 22 % round
# to 0 with 4 bits (normal ones in groups of 32 to whole rows), fewer with 8; with 2 or 3 bits the share tells
# nothing.
SPARSE_CODES = 0.4


def load_model(
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of a directory, dense, sparse or quantized, with plain `nn.Linear` layers, in eval mode.

    Quantized weights are dequantized exactly, then cast to `dtype`.

    Raises: ModelError if the directory is not a whole model.
    """
    checkpoint = open_checkpoint(directory, trust_remote_code=trust_remote_code)
    model = checkpoint.skeleton()
    quantized = set(checkpoint.quantized_names)
    for name, _ in list(model.named_parameters()):
        linear, _, end = name.rpartition(".")
        stored = (
            checkpoint.weight(linear) if linear in quantized and end == "weight" else checkpoint.tensor(name)
        )
        _set_parameter(model, name, stored.to(device=device, dtype=dtype))
    return _finish(model, checkpoint, dtype, device)


def load_trainable(
    directory: Path,
    *,
    base_precision: Literal["latent", "float32", "packed"] = "latent",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The frozen base for adapters: quantized linears are `QuantizedLinear`, others `nn.Linear`.

    base_precision packed: quantized linears are `PackedLinear`, which hold codes alone, for trained scales
    and for running a quantized model in little memory; what the codes were rounded from is not read.

    Linears in the blocks keep the dtype they are stored in; everything else (embeddings, norms, head) is in
    `dtype`. Where masks are stored, a weight is non-zero exactly where its mask says kept, which is checked.
    A linear without a stored mask keeps its zeros if it is sparse (`ops.mask.existing_mask`). Else it is
    dense, and a stray exact 0 becomes the smallest normal number of its dtype, so that adapters, whose mask
    is `base != 0`, may change it. On a grid, where weights round to 0 by themselves, it is sparse from
    SPARSE_CODES zeros on; below, a code of 0 becomes 1/16 step.

    Raises: ModelError if the directory is not a whole model, or weights and masks disagree.
    """
    checkpoint = open_checkpoint(directory, trust_remote_code=trust_remote_code)
    latents = {} if base_precision == "packed" else read_latents(directory)
    return build_trainable(
        checkpoint,
        StoredMasks(directory),
        latents,
        base_precision=base_precision,
        dtype=dtype,
        device=device,
    )


def training_dtype(checkpoint: Checkpoint, device: torch.device | str) -> torch.dtype:
    """The dtype of what `load_trainable` does not leave as it is stored, for training on a device.

    bfloat16 on a GPU that computes in it, where all of it is stored in it, so that no bit is lost; else
    float32.
    """
    blocks = tuple(f"{name}." for name in checkpoint.block_names)
    stored = {checkpoint.dtype(name) for name in checkpoint.names if not name.startswith(blocks)}
    if stored == {torch.bfloat16} and computes_in_bfloat16(torch.device(device)):
        return torch.bfloat16
    return torch.float32


def build_trainable(
    checkpoint: Checkpoint,
    masks: Mapping[str, Tensor],
    latents: Mapping[str, Tensor],
    *,
    base_precision: Literal["latent", "float32", "packed"] = "latent",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """`load_trainable` of an opened checkpoint, its masks and its latent codes, by linear."""
    model = checkpoint.skeleton()
    for name in checkpoint.quantized_names:
        bias = f"{name}.bias"
        layer = _quantized_layer(
            name, checkpoint.quantized(name), latents.get(name), masks.get(name), base_precision, dtype,
            checkpoint.tensor(bias) if bias in checkpoint.names else None, torch.device(device),
        )  # fmt: skip
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.to(device))
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, parameter in list(model.named_parameters()):
        if parameter.device.type != "meta":
            continue
        linear = name.rpartition(".")[0]
        value = checkpoint.tensor(name).to(device)
        masked = name == f"{linear}.weight" and linear in masks
        if masked and not torch.equal(value != 0, masks[linear].to(device)):
            raise ModelError(
                f"{checkpoint.directory}: the zeros of {linear} are not where its stored mask has them; "
                "make the model again"
            )
        in_block = linear in linears and any(linear.startswith(b + ".") for b in checkpoint.block_names)
        dense = linear not in masks and in_block and name == f"{linear}.weight"
        if dense and existing_mask(value) is None:
            value = keep_nonzero(value, torch.ones_like(value, dtype=torch.bool))
        if not in_block:  # so that a trained norm is rounded to what is stored
            model.get_submodule(linear).stored_dtype = value.dtype
        _set_parameter(model, name, value if in_block else value.to(dtype))
    if checkpoint.quantized_names:
        save_as_packed(model)
    return _finish(model, checkpoint, dtype, device)


def read_quantized(directory: Path) -> dict[str, QuantizedWeight]:
    """Codes and grid of every quantized linear; empty for a model that is not quantized.

    Raises: ModelError if the directory is not a whole model.
    """
    checkpoint = open_checkpoint(directory)
    return {name: checkpoint.quantized(name) for name in checkpoint.quantized_names}


def _quantized_layer(
    name: str,
    weight: QuantizedWeight,
    latent: Tensor | None,
    mask: Tensor | None,
    base_precision: str,
    dtype: torch.dtype,
    bias: Tensor | None,
    device: torch.device,
) -> GridLinear:
    weight = QuantizedWeight(weight.codes.to(device), weight.qparams.to(device))
    latent, mask, bias = (None if t is None else t.to(device) for t in (latent, mask, bias))
    if base_precision == "packed":
        layer = PackedLinear.pack(weight.codes, weight.qparams, bias, dtype=dtype)
        if mask is not None and bool((layer.quantized_weight()[~mask] != 0).any()):
            raise ModelError(f"{name}: a weight that its stored mask prunes is not 0; quantize it again")
        return layer
    if latent is None:
        if mask is None and weight.qparams.bits >= 4:
            kept = weight.dequantize() != 0
            mask = kept if (~kept).float().mean() >= SPARSE_CODES else None
        latent = encode_latent(weight.dequantize(), weight.codes, mask, weight.qparams)
    base = decode_latent(latent, weight.qparams)
    if not torch.equal(latent_codes(latent), weight.codes):
        raise ModelError(f"{name}: the latent codes are not those of the weights; quantize the model again")
    if mask is not None and not torch.equal(base != 0, mask):
        raise ModelError(f"{name}: the zeros of the base are not those of its stored mask; quantize it again")
    return QuantizedLinear(base if base_precision == "float32" else latent, weight.qparams, bias, dtype=dtype)


def _set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Parameter(value, requires_grad=False))


def _finish(
    model: PreTrainedModel, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str
) -> PreTrainedModel:
    model.tie_weights()
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)
    model.config.dtype = dtype
    model.config._name_or_path = str(checkpoint.directory)
    model.name_or_path = str(checkpoint.directory)
    generation = read_generation(checkpoint.directory)
    if generation is not None:
        model.generation_config = generation
    return model.eval()
