"""Tiny merged models on disk, written without the package's own writers: a base, an adapter, the result."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sqft.adapters.identity import base_identity
from sqft.models import load_trainable
from sqft.models.packing import pack_weight, quantization_config
from sqft.ops import (
    GridSpec,
    QuantizedWeight,
    adapted_codes,
    adapted_weight,
    compute_qparams,
    decode_latent,
    encode_latent,
    keep_nonzero,
    mask_pattern,
    mask_rows,
    pack_mask,
    quantize,
)
from sqft.ops.head_grid import round_head

ALPHA, RANKS = 16.0, [8, 4]


@dataclass
class MergedDirectories:
    """The three directories of a merge."""

    base: Path
    adapter: Path
    merged: Path


def write_merge(
    dense_dir: Path,
    root: Path,
    *,
    quantized: bool = True,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = True,
    scale_bits: int = 8,
    sparsity: float = 0.5,
    pattern: str | None = None,
    stored_masks: bool = True,
    head: bool = False,
) -> MergedDirectories:
    """Sparsify (and quantize) the linears of a tiny dense model, adapt all but the output ones, merge.

    stored_masks: False = a base as others write it, 16-bit and dense, with three zeros in one row. head:
    embedding and head on a grid of 8 bits.
    """
    state = load_file(dense_dir / "model.safetensors")
    for key in ("model.embed_tokens.weight", "lm_head.weight") if head else ():
        if key in state:
            state[key] = round_head(state[key])
    names = [key.removesuffix(".weight") for key in state if "_proj" in key]
    adapted = [name for name in names if not name.endswith("o_proj")]
    generator = torch.Generator().manual_seed(7)
    base, merged = dict(state), dict(state)
    masks: dict[str, Tensor] = {}
    latents: dict[str, Tensor] = {}
    factors: dict[str, Tensor] = {}
    half = torch.float16 if scale_bits > 8 else torch.bfloat16
    grid = GridSpec(bits, group_size, symmetric, scale_bits, stored_dtype=half)
    for name in names:
        weight = state[f"{name}.weight"]
        rows, columns = weight.shape
        scores = torch.rand(rows, columns, generator=generator)
        mask = (
            mask_pattern(scores, pattern) if pattern else mask_rows(scores, sparsity if stored_masks else 0)
        )
        if stored_masks:
            masks[name] = mask
        elif name == adapted[0]:
            weight[2, 5:8] = 0
        rank = RANKS[adapted.index(name) % 2] if name in adapted else RANKS[0]
        low = torch.randn(rank, columns, generator=generator) * 0.1
        high = torch.randn(rows, rank, generator=generator) * 0.1
        update = low, high, ALPHA / max(RANKS)
        if name in adapted:
            factors[f"base_model.model.{name}.sqft_A"] = low
            factors[f"base_model.model.{name}.sqft_B"] = high
        if quantized:
            codes, latent, result = _quantized(weight, mask, update, grid)
            latents[name] = latent
            for tensors, value in ((base, codes), (merged, result if name in adapted else codes)):
                del tensors[f"{name}.weight"]
                tensors.update(pack_weight(name, value, grid.scale_dtype))
        else:
            sparse = keep_nonzero(weight, mask)
            base[f"{name}.weight"] = merged[f"{name}.weight"] = sparse if stored_masks else weight
            if name in adapted:
                tuned = adapted_weight(
                    sparse.float(), low, high, scaling=update[2], mask=mask, storage_dtype=weight.dtype
                )
                merged[f"{name}.weight"] = tuned.to(weight.dtype)
    config = quantization_config(grid, ["lm_head"]) if quantized else None
    directories = MergedDirectories(root / "base", root / "adapter", root / "merged")
    for directory, tensors in ((directories.base, base), (directories.merged, merged)):
        _write_model(dense_dir, directory, tensors, config)
        shapes = {name: f"{mask.shape[0]},{mask.shape[1]}" for name, mask in masks.items()}
        packed = {name: pack_mask(mask) for name, mask in masks.items()}
        if stored_masks:
            save_file(packed, directory / "sqft_masks.safetensors", metadata=shapes)
    if quantized:
        save_file(latents, directories.base / "sqft_latent.safetensors")
    directories.adapter.mkdir()
    save_file(factors, directories.adapter / "adapter_model.safetensors")
    adapter_config = {
        "peft_type": "SQFT",
        "method": "qa_sparse_peft" if quantized else "sparse_peft",
        "alpha": ALPHA,
        "ranks": RANKS,
        "rank_pattern": {name: RANKS[index % 2] for index, name in enumerate(adapted)},
        "target_modules": adapted,
        "storage_dtype": None if quantized else "bfloat16",
        "identity": base_identity(load_trainable(directories.base), adapted),
    }
    (directories.adapter / "adapter_config.json").write_text(json.dumps(adapter_config))
    return directories


def _quantized(
    weight: Tensor, mask: Tensor, update: tuple[Tensor, Tensor, float], grid: GridSpec
) -> tuple[QuantizedWeight, Tensor, QuantizedWeight]:
    pruned = weight.float() * mask
    qparams = compute_qparams(pruned, grid)
    codes = quantize(pruned, qparams)
    latent = encode_latent(pruned, codes, mask, qparams)
    low, high, scaling = update
    merged = adapted_codes(
        decode_latent(latent, qparams), low, high, scaling=scaling, mask=mask, qparams=qparams
    )
    return QuantizedWeight(codes, qparams), latent, QuantizedWeight(merged, qparams)


def _write_model(dense_dir: Path, directory: Path, tensors: dict[str, Tensor], quantization: object) -> None:
    shutil.copytree(dense_dir, directory)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    if quantization:
        config["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config))
