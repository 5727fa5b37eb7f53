"""The maths on tensors: masks, the integer grid, the adapted weight. No modules, no files."""

from sqft.ops.adapted import adapted_codes, adapted_weight
from sqft.ops.grid import (
    GridSpec,
    QParams,
    QuantizedWeight,
    compute_qparams,
    dequantize,
    fake_quantize,
    quantize,
)
from sqft.ops.latent import decode_latent, encode_latent, latent_codes
from sqft.ops.mask import keep_nonzero, mask_rows, pack_mask, unpack_mask
from sqft.ops.pattern import mask_pattern

__all__ = [
    "GridSpec",
    "QParams",
    "QuantizedWeight",
    "adapted_codes",
    "adapted_weight",
    "compute_qparams",
    "decode_latent",
    "dequantize",
    "encode_latent",
    "fake_quantize",
    "keep_nonzero",
    "latent_codes",
    "mask_pattern",
    "mask_rows",
    "pack_mask",
    "quantize",
    "unpack_mask",
]
