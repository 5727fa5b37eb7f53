"""The second level of a certificate: the merged weights, computed again from the base and the adapter.

An independent reading of the formula, in NumPy float64, that shares no code with the rest of the package:

    adapted = base + where(mask, (B @ A) * alpha / max_rank, 0)
    code    = clip(rint(adapted / scale) + zero_point, 0, 2^bits - 1)        on an integer grid
    weight  = adapted rounded to the nearest 16-bit number, ties to even     without one

on the base's grid, also where the scale that codes are multiplied with was trained (`in_place`).

The trained model computed this in float32. Float64 and float32 may round to different neighbours where the
exact value is closer to a boundary than float32's own rounding error, at most

    (rank + 4) * 2^-24 * (|base| + (|B| @ |A|) * scaling)

for any order of summation (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). Such a
weight is called *undecided*: both neighbours are accepted for it, their number is stated, and the digest
taken from the trained model decides which one it is. Every other weight must be equal.

What is left undecided is bounded, so that no update, however large, can leave the weights to chance: on a
grid of b bits at most max(1, 2^(b-4)) * max(1, rank / 64) weights in a thousand of a linear, each between
two neighbouring codes; without a grid, whose boundaries lie denser, the error above must stay below a
hundredth of the root mean square of the adapted weights in its row.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sqft.artifacts import CERTIFICATE
from sqft.certificate.adapter import ADAPTER_CONFIG, Adapter, read_adapter
from sqft.certificate.answers import check_files, check_settings
from sqft.certificate.coverage import file_digests
from sqft.certificate.in_place import check_in_place, digest_arrays, merged_digest
from sqft.certificate.stored import StoredModel, read_json
from sqft.checks import Check, run_check
from sqft.errors import CertificateError
from sqft.progress import SILENT, Progress

__all__ = ["check_provenance"]

ROW_BLOCK = 512  # rows checked at a time: float64 copies of a whole projection would not be small
UNIT_ROUNDOFF = 2.0**-24
# significant bits, and the exponent of the smallest step
STORAGE = {"BF16": (8, -133), "F16": (11, -24), "F32": (24, -149)}

SMALLEST_NORMAL = {"BF16": 2.0**-126, "F16": 2.0**-14, "F32": 2.0**-126}
UNDECIDED_SHARE = 1e-3  # share of a linear's codes, at 4 bits and ranks up to 64; up to 2e-4 was measured
FEW_UNDECIDED = 2  # undecided weights that a small linear may have by chance
LARGEST_ERROR = 1e-2  # of the root mean square of a row's adapted weights
STRAY_ZEROS = 0.01  # share of zeros up to which a weight without a stored mask counts as dense
SPARSE_CODES = 0.4  # share of zeros from which codes without a stored mask count as sparse
DOCUMENTS = ("readme", "license", "notice")  # no part of what was merged

Lineage = dict[str, dict[str, str]]
Array = NDArray[Any]
Float64 = NDArray[np.float64]


def check_provenance(
    directory: Path,
    base_dir: Path,
    adapter_dir: Path,
    *,
    trained_digest: str | None = None,
    lineage: Lineage | None = None,
    progress: Progress = SILENT,
) -> list[Check]:
    """Check that a merged model is its base plus its adapter, and nothing else.

    base_dir: the sparsified or quantized model that was trained on. trained_digest: that of the trained
    model's merged weights; lineage: the digests of the files of "base" and "adapter"; default those in the
    certificate.
    """
    opened: list[tuple[StoredModel, StoredModel, Adapter]] = []

    def open_all() -> str:
        opened.append((StoredModel(directory), StoredModel(base_dir), read_adapter(adapter_dir)))
        return ""

    files = run_check("files", open_all)
    if not files.passed:
        return [files]
    ((merged, base, adapter),) = opened
    return [
        run_check("lineage", lambda: _check_lineage(directory, base_dir, adapter_dir, lineage)),
        run_check("identity", lambda: _check_identity(base, adapter)),
        run_check("settings", lambda: check_settings(directory, base_dir)),
        run_check("strangers", lambda: check_files(directory)),
        run_check("grid", lambda: _check_grid(merged, base, adapter)),
        run_check("mask", lambda: _check_masks(merged, base, adapter)),
        run_check("other tensors", lambda: _check_others(merged, base, adapter)),
        run_check("recomputed", lambda: _check_recomputed(merged, base, adapter, progress)),
        run_check("scales and norms", lambda: check_in_place(merged, base, adapter)),
        run_check("trained", lambda: _check_trained(merged, adapter, trained_digest)),
    ]


def _check_lineage(directory: Path, base_dir: Path, adapter_dir: Path, lineage: Lineage | None) -> str:
    """Check that all merged files are there, unchanged, with no weights added; documents may differ."""
    recorded = read_json(directory / CERTIFICATE).get("lineage") if lineage is None else lineage
    problems, count = [], 0
    for part, given in (("base", base_dir), ("adapter", adapter_dir)):
        expected = recorded.get(part) if isinstance(recorded, dict) else None
        if not isinstance(expected, dict) or not expected:
            raise CertificateError(f"the files of the {part} that was merged are not recorded")
        expected = {name: digest for name, digest in expected.items() if not _is_document(name)}
        found = file_digests(given)
        problems += [f"{part}: {name} is missing" for name in sorted(expected.keys() - found.keys())]
        added = sorted(name for name in found.keys() - expected.keys() if ".safetensors" in name)
        problems += [f"{part}: {name} was not there" for name in added]
        shared = sorted(expected.keys() & found.keys())
        problems += [f"{part}: {name} is another" for name in shared if expected[name] != found[name]]
        count += len(expected)
    if problems:
        raise CertificateError(f"not the files that were merged: {', '.join(problems)}")
    return f"{count} files of base and adapter are those that were merged"


def _is_document(name: str) -> bool:
    return name.endswith(".md") or name.lower().startswith(DOCUMENTS)


def _check_identity(base: StoredModel, adapter: Adapter) -> str:
    stated = adapter.config.get("identity") or {}
    if not adapter.masked and not stated:
        return "a stock LoRA states no identity of its base"
    found = _identity(base, adapter)
    missing = [part for part in found if not isinstance(stated, dict) or part not in stated]
    if missing:
        raise CertificateError(
            f"{ADAPTER_CONFIG} does not say on which {' and '.join(missing)} the adapter was trained"
        )
    different = [part for part in found if stated[part] != found[part]]
    if different:
        raise CertificateError(f"the adapter was trained on another {' and '.join(different)}")
    return f"{', '.join(found)} have the digests that the adapter states"


def _identity(base: StoredModel, adapter: Adapter) -> dict[str, str]:
    """The digests of those parts of the base that an adapter depends on."""
    quantized = set(base.quantized)
    names = sorted(adapter.factors)
    weights = [
        (name, _base_weight(base, name, name in quantized, nudged=adapter.masked).astype(np.float32))
        for name in names
    ]
    grid = [
        entry
        for name in sorted({*names, *adapter.scales})
        if name in quantized
        for entry in (
            (f"{name}.scale", base.scale(name).astype(np.float32), "float32"),
            (f"{name}.zero_point", base.zero_point(name).astype(np.uint8), "uint8"),
        )
    ]
    found = {}
    if weights:
        found["base"] = digest_arrays((name, weight, "float32") for name, weight in weights)
        found["mask"] = digest_arrays(
            (name, np.packbits(weight != 0, axis=1, bitorder="little"), "uint8") for name, weight in weights
        )
    found["grid"] = digest_arrays(grid) if grid else "none"
    frozen = sorted(set(adapter.scales) - set(names))
    if frozen:
        found["codes"] = digest_arrays((name, base.codes(name), "uint8") for name in frozen)
    if adapter.norms:
        found["norms"] = digest_arrays(
            (name, base.tensors.values(f"{name}.weight").astype(np.float32), "float32")
            for name in sorted(adapter.norms)
        )
    return found


def _check_grid(merged: StoredModel, base: StoredModel, adapter: Adapter) -> str:
    if merged.quantized != base.quantized:
        raise CertificateError("the merged model and the base quantize different linears")
    if not merged.quantized:
        return "no integer weights"
    if merged.bits != base.bits:
        raise CertificateError(f"the merged model has {merged.bits} bits, the base {base.bits}")
    for name in merged.quantized:
        kept = name in adapter.scales or np.array_equal(merged.scale(name), base.scale(name))
        if not kept or not np.array_equal(merged.zero_point(name), base.zero_point(name)):
            raise CertificateError(f"the grid of {name} is not the base's")
    scales = len(set(merged.quantized) - set(adapter.scales))
    return f"scales of {scales} and zero points of {len(merged.quantized)} linears equal the base's"


def _check_masks(merged: StoredModel, base: StoredModel, adapter: Adapter) -> str:
    expected = {name: base.mask(name) for name in base.masked}
    if adapter.masked:
        expected |= {name: _mask(base, name) for name in adapter.factors}
    expected = {name: mask for name, mask in expected.items() if mask is not None}
    if set(merged.masked) != set(expected):
        raise CertificateError("the merged model and the base have masks for different linears")
    for name, mask in expected.items():
        if not np.array_equal(merged.mask(name), mask):  # type: ignore[arg-type]
            raise CertificateError(f"the mask of {name} is not the base's")
    return f"masks of {len(expected)} linears equal the base's" if expected else "no masks: dense"


def _mask(base: StoredModel, name: str) -> NDArray[np.bool_] | None:
    """The stored mask of a linear, or that of the zeros it came with; None where every weight is kept."""
    mask = base.mask(name)
    if mask is not None:
        return mask
    if name in set(base.quantized):
        return _kept_codes(base, name)
    kept = base.tensors.values(f"{name}.weight") != 0
    return np.asarray(kept) if kept.mean() < 1 - STRAY_ZEROS else None


def _kept_codes(base: StoredModel, name: str) -> NDArray[np.bool_] | None:
    """Which codes are not 0, of a base that holds codes alone and no mask, if so few are that it is sparse.

    Of a dense one some weights round to 0 with 4 bits or more; with fewer the share tells nothing.
    """
    if base.latent is not None or base.bits < 4:
        return None
    kept = _whole_steps(base, name) != 0
    return np.asarray(kept) if kept.mean() <= 1 - SPARSE_CODES else None


def _whole_steps(base: StoredModel, name: str) -> NDArray[np.int64]:
    """code - zero_point of every weight."""
    codes, zero_point = base.codes(name).astype(np.int64), base.zero_point(name)
    return np.asarray(codes - np.repeat(zero_point, codes.shape[1] // zero_point.shape[1], axis=1))


def _check_others(merged: StoredModel, base: StoredModel, adapter: Adapter) -> str:
    adapted = {f"{name}.{part}" for name in adapter.factors for part in ("weight", "weight_packed")}
    adapted |= {f"{name}.weight_scale" for name in adapter.scales}
    adapted |= {f"{name}.weight" for name in adapter.norms}
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
    if not adapter.factors:
        return "no low-rank update"
    with progress.task("recompute", len(adapter.factors)) as advance:
        for name, (factor_a, factor_b) in adapter.factors.items():
            if (factor_b.shape[0], factor_a.shape[1]) != base.shape(name):
                raise CertificateError(
                    f"the adapter of {name} does not fit a weight of shape {base.shape(name)}"
                )
            count = between = 0
            for found, low, high in _intervals(merged, base, name, adapter, name in quantized):
                wrong = int((~((found >= low) & (found <= high))).sum())  # NaN is wrong too
                if wrong:
                    raise CertificateError(f"{wrong} weights of {name} are not what base and adapter give")
                if name in quantized and int((high - low).max()) > 1:
                    raise CertificateError(
                        f"the update of {name} is too large: float32 leaves its codes undecided"
                    )
                count += found.size
                between += int((low != high).sum())
            share = _undecided_share(base.bits, len(factor_a)) if name in quantized else 1.0
            if between > max(FEW_UNDECIDED, share * count):
                raise CertificateError(
                    f"{between} of {count} codes of {name} lie within float32 rounding of a boundary, "
                    f"at most {share:.2%} may: its update is too large to be checked"
                )
            total, undecided = total + count, undecided + between
            advance(1)
    return (
        f"{total} {'codes' if quantized else 'weights'} of {len(adapter.factors)} linears in float64: "
        f"{total - undecided} equal, {undecided} within float32 rounding of a boundary (both count)"
    )


def _undecided_share(bits: int, rank: int) -> float:
    return UNDECIDED_SHARE * max(1, 2 ** (bits - 4)) * max(1, rank / 64)


def _intervals(
    merged: StoredModel, base: StoredModel, name: str, adapter: Adapter, quantized: bool
) -> Iterator[tuple[Array, Array, Array]]:
    """For blocks of rows: the merged numbers, and the smallest and largest that the formula allows."""
    factor_a, factor_b = adapter.factors[name]
    mask = _mask(base, name) if adapter.masked else base.mask(name)
    weight = _base_weight(base, name, quantized, nudged=adapter.masked)
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
        typical = np.sqrt(np.square(adapted).mean(1, keepdims=True))
        if not quantized and not bool((error <= LARGEST_ERROR * typical).all()):
            raise CertificateError(
                f"the terms of {name}'s update are too large: float32 leaves its weights undecided"
            )
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


def _base_weight(base: StoredModel, name: str, quantized: bool, *, nudged: bool) -> Float64:
    """The weight that the update is added to, in float64.

    On an integer grid it is stored as latent codes, code * 16 + fraction + 8, whose value is
    (code + fraction / 16 - zero_point) * scale. A base that was merged before holds codes alone: training
    starts from these, with a kept weight of 0 at a sixteenth of a step.

    nudged: where there is no mask every weight counts as kept, and training reads an exact 0 as the smallest
    number that is not pruned: a sixteenth of a step, or the smallest normal number of the stored type.
    """
    dense = nudged and _mask(base, name) is None
    if not quantized:
        weight = base.tensors.values(f"{name}.weight").astype(np.float64)
        smallest = SMALLEST_NORMAL.get(base.tensors.dtype(f"{name}.weight"), 0.0)
        return np.where(weight == 0, smallest, weight) if dense else weight
    if base.latent is None:
        mask, whole = _mask(base, name), _whole_steps(base, name)
        if mask is not None and whole[~mask].any():
            raise CertificateError(f"{name} has weights that its mask prunes and that are not 0")
        kept = np.ones_like(whole, dtype=bool) if mask is None else mask
        steps = np.where((whole == 0) & kept, 1 / 16, whole)
        scale = base.scale(name)
        return steps * np.repeat(scale, steps.shape[1] // scale.shape[1], axis=1)
    if name not in base.latent:
        raise CertificateError(f"{base.directory} does not hold the weight of {name} before rounding")
    latent = base.latent.values(name).astype(np.int64)
    codes, fraction = latent // 16, latent % 16 - 8
    if not np.array_equal(codes, base.codes(name)):
        raise CertificateError(f"the base's codes of {name} before and after rounding disagree")
    groups = base.scale(name).shape[1]
    width = latent.shape[1] // groups
    steps = codes + fraction / 16 - np.repeat(base.zero_point(name), width, axis=1)
    if dense:
        steps = np.where(steps == 0, 1 / 16, steps)
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
    found = merged_digest(merged, adapter)
    if found != trained_digest:
        raise CertificateError(
            f"the merged weights' digest is {found[:12]}, the trained {trained_digest[:12]}"
        )
    return f"digest {found[:12]} equals that of the trained model"
