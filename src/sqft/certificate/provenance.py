"""The second level of a certificate: the merged weights, computed again from the base and the adapter.

An independent reading of the formula, in NumPy float64, that shares no code with the rest of the package:

    adapted = base + where(mask, (B @ A) * alpha / max_rank, 0)
    code    = clip(rint(adapted / scale) + zero_point, 0, 2^bits - 1)        on an integer grid
    weight  = adapted rounded to the nearest 16-bit number, ties to even     without one

The trained model computed this in float32. Float64 and float32 may round to different neighbours where the
exact value is closer to a boundary than float32's own rounding error, at most

    (rank + 4) * 2^-24 * (|base| + (|B| @ |A|) * scaling)

for any order of summation (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). Such a
weight is called *undecided*: both neighbours are accepted for it, their number is stated, and the digest
taken from the trained model decides which one it is. Every other weight must be equal.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sqft.certificate.checks import Check
from sqft.certificate.integrity import CERTIFICATE, run_check
from sqft.certificate.stored import StoredModel, StoredTensors, read_json
from sqft.errors import CertificateError
from sqft.progress import SILENT, Progress

__all__ = ["Adapter", "check_provenance", "merged_digest", "read_adapter"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
FACTOR = re.compile(r"^(?:base_model\.model\.)?(?P<name>.+)\.(?:sqft|lora)_(?P<factor>[AB])(?:\.weight)?$")
ROW_BLOCK = 512  # rows checked at a time: float64 copies of a whole projection would not be small
UNIT_ROUNDOFF = 2.0**-24
# significant bits, and the exponent of the smallest step
STORAGE = {"BF16": (8, -133), "F16": (11, -24), "F32": (24, -149)}

DIGEST_TYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

Array = NDArray[Any]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Adapter:
    """An adapter as its files state it: low-rank factors by the full name of the linear."""

    config: dict[str, Any]
    factors: dict[str, tuple[Float64, Float64]]

    def scaling(self, name: str) -> float:
        """alpha / max_rank, the same for every sub-adapter.

        A stock LoRA states it module by module, as PEFT reads it: alpha_pattern / rank_pattern.
        """
        config = self.config
        try:
            if config.get("peft_type") == "SQFT":
                return float(config["alpha"]) / max(config["ranks"])
            if config.get("use_rslora") or config.get("use_dora"):
                raise CertificateError(
                    f"{ADAPTER_CONFIG} states rsLoRA or DoRA, whose merge has no certificate"
                )
            rank = (config.get("rank_pattern") or {}).get(name, config["r"])
            alpha = (config.get("alpha_pattern") or {}).get(name, config["lora_alpha"])
            return float(alpha) / float(rank)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise CertificateError(f"{ADAPTER_CONFIG} does not state the scaling ({error!r})") from None


def read_adapter(directory: Path) -> Adapter:
    """The adapter of a PEFT directory.

    Raises: CertificateError if a file is missing or damaged, or a factor has no partner.
    """
    config = read_json(directory / ADAPTER_CONFIG)
    stored = StoredTensors([directory / ADAPTER_WEIGHTS])
    halves: dict[str, dict[str, Float64]] = {}
    for key in stored:
        match = FACTOR.match(key)
        if match is None:
            raise CertificateError(f"{directory / ADAPTER_WEIGHTS}: {key} is not understood")
        halves.setdefault(match["name"], {})[match["factor"]] = stored.values(key).astype(np.float64)
    for name, factors in halves.items():
        if set(factors) != {"A", "B"} or factors["B"].shape[1] != factors["A"].shape[0]:
            raise CertificateError(f"{directory / ADAPTER_WEIGHTS}: A and B of {name} do not fit each other")
    return Adapter(config, {name: (factors["A"], factors["B"]) for name, factors in sorted(halves.items())})


def check_provenance(
    directory: Path,
    base_dir: Path,
    adapter_dir: Path,
    *,
    trained_digest: str | None = None,
    progress: Progress = SILENT,
) -> list[Check]:
    """Check that a merged model is its base plus its adapter, and nothing else.

    base_dir: the sparsified or quantized model that was trained on. trained_digest: that of the trained
    model's merged weights; default the one in the certificate.
    """
    try:
        merged, base, adapter = StoredModel(directory), StoredModel(base_dir), read_adapter(adapter_dir)
    except (CertificateError, OSError) as error:
        return [Check("files", False, str(error))]
    return [
        run_check("identity", lambda: _check_identity(base, adapter)),
        run_check("grid", lambda: _check_grid(merged, base)),
        run_check("mask", lambda: _check_masks(merged, base)),
        run_check("other tensors", lambda: _check_others(merged, base, adapter)),
        run_check("recomputed", lambda: _check_recomputed(merged, base, adapter, progress)),
        run_check("trained", lambda: _check_trained(merged, adapter, trained_digest)),
    ]


def merged_digest(model: StoredModel, names: list[str]) -> str:
    """The digest of merged weights: codes, one byte each, or weights as stored, by sorted name."""
    quantized = set(model.quantized)
    named = (
        (name, model.codes(name), "uint8")
        if name in quantized
        else (name, model.tensors.raw(f"{name}.weight"), model.tensors.dtype(f"{name}.weight"))
        for name in sorted(names)
    )
    return _digest(named)


def _digest(named: Iterable[tuple[str, Array, str]]) -> str:
    """sha256 over `name\\0type\\0shape\\0` and the little endian bytes, row by row, of every array."""
    digest = hashlib.sha256()
    for name, values, dtype in named:
        digest.update(f"{name}\0{DIGEST_TYPES.get(dtype, dtype)}\0{values.shape}\0".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def _check_identity(base: StoredModel, adapter: Adapter) -> str:
    stated = adapter.config.get("identity")
    if not stated:
        return "the adapter states no identity of its base"
    quantized = set(base.quantized)
    names = sorted(adapter.factors)
    weights = [(name, _base_weight(base, name, name in quantized).astype(np.float32)) for name in names]
    grid = [
        entry
        for name in names
        if name in quantized
        for entry in (
            (f"{name}.scale", base.scale(name).astype(np.float32), "float32"),
            (f"{name}.zero_point", base.zero_point(name).astype(np.uint8), "uint8"),
        )
    ]
    found = {
        "base": _digest((name, weight, "float32") for name, weight in weights),
        "mask": _digest(
            (name, np.packbits(weight != 0, axis=1, bitorder="little"), "uint8") for name, weight in weights
        ),
        "grid": _digest(grid) if grid else "none",
    }
    different = [part for part in found if part in stated and stated[part] != found[part]]
    if different:
        raise CertificateError(f"the adapter was trained on another {' and '.join(different)}")
    return "base, mask and grid have the digests that the adapter states"


def _check_grid(merged: StoredModel, base: StoredModel) -> str:
    if merged.quantized != base.quantized:
        raise CertificateError("the merged model and the base quantize different linears")
    if not merged.quantized:
        return "no integer weights"
    if merged.bits != base.bits:
        raise CertificateError(f"the merged model has {merged.bits} bits, the base {base.bits}")
    for name in merged.quantized:
        for part, other in (
            (merged.scale(name), base.scale(name)),
            (merged.zero_point(name), base.zero_point(name)),
        ):
            if not np.array_equal(part, other):
                raise CertificateError(f"the grid of {name} is not the base's")
    return f"scales and zero points of {len(merged.quantized)} linears equal the base's"


def _check_masks(merged: StoredModel, base: StoredModel) -> str:
    if merged.masked != base.masked:
        raise CertificateError("the merged model and the base have masks for different linears")
    for name in base.masked:
        if not np.array_equal(merged.mask(name), base.mask(name)):  # type: ignore[arg-type]
            raise CertificateError(f"the mask of {name} is not the base's")
    return f"masks of {len(base.masked)} linears equal the base's" if base.masked else "no masks: dense"


def _check_others(merged: StoredModel, base: StoredModel, adapter: Adapter) -> str:
    adapted = {f"{name}.{part}" for name in adapter.factors for part in ("weight", "weight_packed")}
    if set(merged.tensors) != set(base.tensors):
        different = sorted(set(merged.tensors) ^ set(base.tensors))
        raise CertificateError(f"{different[0]} stands in only one of the merged model and the base")
    others = [name for name in base.tensors if name not in adapted]
    for name in others:
        same = merged.tensors.dtype(name) == base.tensors.dtype(name)
        if not same or not np.array_equal(merged.tensors.raw(name), base.tensors.raw(name)):
            raise CertificateError(f"{name} has no adapter, but is not the base's")
    return f"{len(others)} tensors without an adapter equal the base's"


def _check_recomputed(merged: StoredModel, base: StoredModel, adapter: Adapter, progress: Progress) -> str:
    quantized = set(base.quantized)
    total = undecided = 0
    with progress.task("recompute", len(adapter.factors)) as advance:
        for name, (factor_a, factor_b) in adapter.factors.items():
            if (factor_b.shape[0], factor_a.shape[1]) != base.shape(name):
                raise CertificateError(
                    f"the adapter of {name} does not fit a weight of shape {base.shape(name)}"
                )
            for found, low, high in _intervals(merged, base, name, adapter, name in quantized):
                wrong = int(((found < low) | (found > high)).sum())
                if wrong:
                    raise CertificateError(f"{wrong} weights of {name} are not what base and adapter give")
                total += found.size
                undecided += int((low != high).sum())
            advance(1)
    return (
        f"{total} {'codes' if quantized else 'weights'} of {len(adapter.factors)} linears in float64: "
        f"{total - undecided} equal, {undecided} within float32 rounding of a boundary (both count)"
    )


def _intervals(
    merged: StoredModel, base: StoredModel, name: str, adapter: Adapter, quantized: bool
) -> Iterator[tuple[Array, Array, Array]]:
    """For blocks of rows: the merged numbers, and the smallest and largest that the formula allows."""
    factor_a, factor_b = adapter.factors[name]
    mask = base.mask(name)
    weight = _base_weight(base, name, quantized)
    if quantized:
        found: Array = merged.codes(name)
        columns = weight.shape[1]
        scale = base.scale(name)
        scale = np.repeat(scale, columns // scale.shape[1], axis=1)
        zero_point = np.repeat(base.zero_point(name), columns // base.zero_point(name).shape[1], axis=1)
    else:
        found = merged.tensors.values(f"{name}.weight")
        dtype = merged.tensors.dtype(f"{name}.weight")
    for start in range(0, len(weight), ROW_BLOCK):
        rows = slice(start, start + ROW_BLOCK)
        delta = (factor_b[rows] @ factor_a) * adapter.scaling(name)
        size = (np.abs(factor_b[rows]) @ np.abs(factor_a)) * abs(adapter.scaling(name))
        if mask is not None:
            delta, size = np.where(mask[rows], delta, 0.0), np.where(mask[rows], size, 0.0)
        adapted = weight[rows] + delta
        error = (len(factor_a) + 4) * UNIT_ROUNDOFF * (np.abs(weight[rows]) + size)
        low: Array = adapted - error
        high: Array = adapted + error
        if quantized:
            low, high = (
                np.clip(np.rint(end / scale[rows]) + zero_point[rows], 0, (1 << base.bits) - 1)
                for end in (low, high)
            )
        else:
            low, high = _round_storage(low, dtype), _round_storage(high, dtype)
        yield found[rows], low, high


def _base_weight(base: StoredModel, name: str, quantized: bool) -> Float64:
    """The weight that the update is added to, in float64.

    On an integer grid it is stored as latent codes, code * 16 + fraction + 8, whose value is
    (code + fraction / 16 - zero_point) * scale; or as float32 weights.
    """
    if not quantized:
        return base.tensors.values(f"{name}.weight").astype(np.float64)
    if base.latent is None or name not in base.latent:
        raise CertificateError(f"{base.directory} does not hold the weight of {name} before rounding")
    stored = base.latent.values(name)
    if stored.dtype.kind == "f":
        return stored.astype(np.float64)
    latent = stored.astype(np.int64)
    codes, fraction = latent // 16, latent % 16 - 8
    if not np.array_equal(codes, base.codes(name)):
        raise CertificateError(f"the base's codes of {name} before and after rounding disagree")
    groups = base.scale(name).shape[1]
    width = latent.shape[1] // groups
    steps = codes + fraction / 16 - np.repeat(base.zero_point(name), width, axis=1)
    return steps * np.repeat(base.scale(name), width, axis=1)


def _round_storage(value: Float64, dtype: str) -> Float64:
    """The nearest number of a storage type, ties to even, in one rounding from float64."""
    if dtype not in STORAGE:
        raise CertificateError(f"weights of the type {dtype} are not understood")
    bits, smallest = STORAGE[dtype]
    _, exponent = np.frexp(value)
    step = np.ldexp(1.0, np.maximum(exponent - bits, smallest))
    return np.rint(value / step) * step


def _check_trained(merged: StoredModel, adapter: Adapter, trained_digest: str | None) -> str:
    if trained_digest is None:
        recorded = merged.directory / CERTIFICATE
        trained_digest = read_json(recorded).get("trained_digest") if recorded.exists() else None
    if trained_digest is None:
        raise CertificateError("the digest of the trained model's weights is not recorded")
    found = merged_digest(merged, list(adapter.factors))
    if found != trained_digest:
        raise CertificateError(
            f"the merged weights' digest is {found[:12]}, the trained {trained_digest[:12]}"
        )
    return f"digest {found[:12]} equals that of the trained model"
