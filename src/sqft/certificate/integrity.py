"""The first level of a certificate: what can be checked from a model's own files.

record       the certificate is as it was written, and says that every check passed then
digests      every certified file is there, unchanged, and no file was added
tensors      the weight files hold every tensor, whole, and every number is finite
codes        every code and zero point is in its range, and every scale is positive; an embedding or head
             that was put on a grid of 8 bits lies on one
zeros        every pruned weight is exactly 0, and the pattern holds
logits       the model, opened from these files, says what it said when it was certified
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sqft.artifacts import CERTIFICATE, FACTS, SEAL, unseal
from sqft.certificate.answers import hidden_names
from sqft.certificate.coverage import file_digests
from sqft.certificate.reference import compute_logits, largest_difference, read_reference
from sqft.certificate.stored import StoredModel, read_json
from sqft.checks import Check, require_unchanged, run_check
from sqft.errors import CertificateError
from sqft.models import load_model
from sqft.progress import SILENT, Progress

__all__ = ["LOGIT_TOLERANCE", "check_integrity", "run_check"]

HEAD_ROWS = 8192  # checked at a time: whole numbers of 64 bits take four times the memory
LOGIT_TOLERANCE = 1e-5  # of the largest absolute logit


def check_integrity(
    directory: Path, progress: Progress = SILENT, *, trust_remote_code: bool = False
) -> list[Check]:
    """Check a certified model directory from its own files alone.

    Every check runs, whatever the others found; a file that cannot be read fails the checks that need it.
    trust_remote_code: open a model that comes with Python code of its own, and so run that code.
    """
    steps: list[tuple[str, Callable[[], str]]] = [
        ("record", lambda: _check_record(directory)),
        ("digests", lambda: _check_digests(directory)),
        ("tensors", lambda: _check_tensors(directory)),
        ("codes", lambda: _check_codes(directory)),
        ("zeros", lambda: _check_zeros(directory)),
        ("logits", lambda: _check_logits(directory, trust_remote_code)),
    ]
    checks = []
    with progress.task("verify", len(steps)) as advance:
        for name, step in steps:
            checks.append(run_check(name, step))
            advance(1)
    return checks


def _check_record(directory: Path) -> str:
    try:
        record = read_json(directory / CERTIFICATE)
        if SEAL in record:  # certificates of 0.1.0 have none
            record = unseal(record)
        outcomes = {str(check["name"]): check["passed"] for check in record["checks"]}
    except (ValueError, KeyError, TypeError) as error:
        raise CertificateError(f"{CERTIFICATE} is damaged ({error})") from None
    failed = [name for name, passed in outcomes.items() if passed is not True]
    if failed:
        raise CertificateError(f"when it was certified, {', '.join(failed)} did not hold")
    return f"as it was written, {len(outcomes)} checks then"


def _check_digests(directory: Path) -> str:
    recorded = read_json(directory / CERTIFICATE).get("files", {})
    return require_unchanged(recorded, file_digests(directory), hidden_names(directory))


def _check_tensors(directory: Path) -> str:
    model = StoredModel(directory)
    broken = []
    names = list(model.tensors)
    for name in names:
        values = model.tensors.values(name)
        if values.dtype.kind == "f" and not bool(np.isfinite(values).all()):
            broken.append(name)
    if broken:
        raise CertificateError(f"{broken[0]} and {len(broken) - 1} more tensors hold NaN or infinity")
    for name in model.quantized:
        missing = [
            f"{name}.{part}" for part in ("weight_scale", "weight_shape") if f"{name}.{part}" not in names
        ]
        if missing:
            raise CertificateError(f"the tensor {missing[0]} is missing")
    return f"{len(names)} tensors, all finite"


def _check_codes(directory: Path) -> str:
    model = StoredModel(directory)
    total = 0
    for name in model.quantized:
        codes, scale, zero_point = model.codes(name), model.scale(name), model.zero_point(name)
        if codes.shape[1] % scale.shape[1] or len(codes) != len(scale) or scale.shape != zero_point.shape:
            raise CertificateError(f"the grid of {name} does not fit its codes")
        if (
            int(codes.max()) >= 1 << model.bits
            or not 0 <= zero_point.min() <= zero_point.max() < 1 << model.bits
        ):
            raise CertificateError(f"{name} holds a code or zero point outside {model.bits} bits")
        if not bool((scale > 0).all()):
            raise CertificateError(f"{name} holds a scale that is not positive")
        total += codes.size
    facts = read_json(directory / FACTS) if (directory / FACTS).exists() else {}
    heads = [str(name) for name in facts.get("heads") or []]
    for name in heads:
        _check_head(name, model.tensors.values(name))
    in_heads = f", {', '.join(heads)} on a grid of 8 bits" if heads else ""
    if not model.quantized:
        return f"no integer weights{in_heads}"
    return f"{total} codes of {model.bits} bits in {len(model.quantized)} linears{in_heads}"


def _check_head(name: str, values: NDArray[np.floating]) -> None:
    """Every 32 neighbours are at most 127 times a number of which they all are whole multiples."""
    for first in range(0, len(values), HEAD_ROWS):
        multiples = np.abs(values[first : first + HEAD_ROWS].astype(np.float64)) * 2.0**24
        if values.shape[1] % 32 or bool((multiples != np.rint(multiples)).any()):
            raise CertificateError(f"{name} does not lie on a grid of 8 bits")
        groups = multiples.astype(np.int64).reshape(len(multiples), -1, 32)
        unit = np.maximum(np.gcd.reduce(groups, axis=-1), 1)
        outside = int((groups.max(-1) > 127 * unit).sum())
        if outside:
            raise CertificateError(f"{outside} groups of {name} are on no grid of 8 bits")


def _check_zeros(directory: Path) -> str:
    model = StoredModel(directory)
    facts = read_json(directory / FACTS) if (directory / FACTS).exists() else {}
    pattern = facts.get("pattern")
    if pattern and not model.masked:
        raise CertificateError(f"the pattern {pattern} is stated, but there are no masks")
    quantized = set(model.quantized)
    pruned = total = 0
    for name in model.masked:
        mask = model.mask(name)
        if mask is None:
            continue
        zero = _zeros(model, name, name in quantized)
        broken = int((~mask & ~zero).sum())
        if broken:
            raise CertificateError(f"{broken} pruned weights of {name} are not 0")
        if pattern:
            _check_pattern(name, mask, str(pattern))
        pruned += int((~mask).sum())
        total += mask.size
    if not model.masked:
        return "no masks: dense"
    share = f"{pruned} of {total} weights ({pruned / total:.4%}) pruned and exactly 0"
    return share + (f", pattern {pattern}" if pattern else "")


def _zeros(model: StoredModel, name: str, quantized: bool) -> NDArray[np.bool_]:
    """(out, in), True where the weight is exactly 0."""
    if not quantized:
        return np.asarray(model.tensors.values(f"{name}.weight") == 0)
    codes, zero_point = model.codes(name), model.zero_point(name)
    return np.asarray(codes == np.repeat(zero_point, codes.shape[1] // zero_point.shape[1], axis=1))


def _check_pattern(name: str, mask: NDArray[np.bool_], pattern: str) -> None:
    """N:M, at most N kept of M neighbours; with windows exactly N, the j-th in its window."""
    shape, _, window = pattern.partition(" window ")
    kept, block = (int(number) for number in shape.split(":"))
    if mask.shape[1] % block:
        raise CertificateError(f"the pattern {pattern} does not fit {name}")
    blocks = mask.reshape(-1, block)
    counts = blocks.sum(-1)
    if counts.max() > kept or (window and counts.min() < kept):
        worst = counts.max() if counts.max() > kept else counts.min()
        raise CertificateError(
            f"{name} keeps {worst} weights of {block} neighbours, its pattern is {pattern}"
        )
    if window:
        bits = [int(number) for number in window.split("-")]
        columns = blocks.nonzero()[1].reshape(-1, kept)
        for j in range(kept):
            width = 2 ** bits[j * len(bits) // kept]
            start = min(max(((2 * j + 1) * block - width * kept) // (2 * kept), 0), block - width)
            outside = int(((columns[:, j] < start) | (columns[:, j] >= start + width)).sum())
            if outside:
                raise CertificateError(
                    f"{outside} blocks of {name} keep a weight outside its window, the pattern is {pattern}"
                )


def _check_logits(directory: Path, trust_remote_code: bool) -> str:
    token_ids, expected = read_reference(directory)
    model = load_model(directory, dtype=torch.float32, trust_remote_code=trust_remote_code)
    logits = compute_logits(model, token_ids)
    share = largest_difference(logits, expected)
    if not share <= LOGIT_TOLERANCE:
        raise CertificateError(f"logits differ by {share:.2e} of the largest, allowed {LOGIT_TOLERANCE:.0e}")
    return f"{len(token_ids)} items, largest difference {share:.1e} of the largest logit"
