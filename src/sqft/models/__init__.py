"""Model directories: finding, opening, loading and writing them."""

from sqft.models.blocks import (
    check_fused_groups,
    decoder_blocks,
    fused_weights,
    head_weights,
    matches_name,
    target_linears,
)
from sqft.models.checkpoint import Checkpoint, open_checkpoint
from sqft.models.existing import ExistingMasks
from sqft.models.loading import (
    build_trainable,
    load_model,
    load_tokenizer,
    load_trainable,
    read_quantized,
    training_dtype,
)
from sqft.models.outline import ModelOutline, model_identity, model_outline, source_bytes
from sqft.models.quantized_linear import PackedLinear, QuantizedLinear
from sqft.models.source import resolve_model
from sqft.models.writer import (
    CheckpointWriter,
    StoredMasks,
    read_latents,
    read_masks,
    write_masks,
    write_model,
)

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "ExistingMasks",
    "ModelOutline",
    "PackedLinear",
    "QuantizedLinear",
    "StoredMasks",
    "build_trainable",
    "check_fused_groups",
    "decoder_blocks",
    "fused_weights",
    "head_weights",
    "load_model",
    "load_tokenizer",
    "load_trainable",
    "matches_name",
    "model_identity",
    "model_outline",
    "open_checkpoint",
    "read_latents",
    "read_masks",
    "read_quantized",
    "resolve_model",
    "source_bytes",
    "target_linears",
    "training_dtype",
    "write_masks",
    "write_model",
]
