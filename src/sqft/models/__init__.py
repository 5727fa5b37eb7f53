"""Model directories: finding, opening, loading and writing them."""

from typing import TYPE_CHECKING

from sqft.deferred import deferred_names

if TYPE_CHECKING:
    from sqft.models.blocks import (
        decoder_blocks,
        fused_weights,
        head_weights,
        target_linears,
    )
    from sqft.models.checkpoint import Checkpoint, open_checkpoint
    from sqft.models.existing import ExistingMasks
    from sqft.models.loading import (
        build_trainable,
        load_model,
        load_trainable,
        read_quantized,
        training_dtype,
    )
    from sqft.models.location import model_identity, source_bytes
    from sqft.models.names import check_fused_groups, matches_name
    from sqft.models.outline import model_outline, outline_skeleton
    from sqft.models.quantized_linear import PackedLinear, QuantizedLinear
    from sqft.models.shapes import ModelOutline
    from sqft.models.source import resolve_model
    from sqft.models.tokenizer import load_tokenizer
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
    "outline_skeleton",
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

__getattr__ = deferred_names(__name__, __file__)
