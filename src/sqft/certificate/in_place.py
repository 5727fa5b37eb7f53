"""Scales and norms that were trained in the place of the base's own, looked for in the merged model.

The adapter holds these numbers as they are served, so nothing is computed here. The merged file must hold
exactly them; every code without a low-rank update must be the base's; and whatever the adapter does not name
must be the base's too, which the checks "grid" and "other tensors" see to.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sqft.certificate.adapter import Adapter
from sqft.certificate.stored import StoredModel
from sqft.errors import CertificateError

__all__ = ["check_in_place", "digest_arrays", "merged_digest"]

DIGEST_TYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

Array = NDArray[Any]


def check_in_place(merged: StoredModel, base: StoredModel, adapter: Adapter) -> str:
    """Compare every trained scale and norm with the adapter's, and every frozen code with the base's.

    Raises: CertificateError if one differs.
    """
    if not adapter.scales and not adapter.norms:
        return "none were trained"
    quantized = set(base.quantized)
    frozen = [name for name in adapter.scales if name not in adapter.factors]
    for name, scale in adapter.scales.items():
        if name not in quantized:
            raise CertificateError(f"the adapter trained scales of {name}, which has no grid in the base")
        if scale.shape != base.scale(name).shape or not np.array_equal(merged.scale(name), scale):
            raise CertificateError(f"the scales of {name} are not those that were trained")
    for name in frozen:
        wrong = int((merged.codes(name) != base.codes(name)).sum())
        if wrong:
            raise CertificateError(
                f"{wrong} codes of {name} are not the base's, and only its scales were trained"
            )
    for name, weight in adapter.norms.items():
        key = f"{name}.weight"
        if key not in base.tensors or base.tensors.values(key).shape != weight.shape:
            raise CertificateError(f"the adapter trained a norm {name} that the base does not have")
        if not np.array_equal(merged.tensors.values(key).astype(np.float64), weight):
            raise CertificateError(f"the weight of {name} is not the one that was trained")
    scales = sum(scale.size for scale in adapter.scales.values())
    numbers = sum(weight.size for weight in adapter.norms.values())
    return (
        f"{scales} scales of {len(adapter.scales)} linears and {numbers} weights of {len(adapter.norms)} "
        f"norms equal the adapter's; codes of {len(frozen)} linears equal the base's"
    )


def merged_digest(model: StoredModel, adapter: Adapter) -> str:
    """The digest of what was merged, by sorted name.

    Of a linear its codes, one byte each, or its weights as stored; after the codes, as NAME.scale, its scales
    in float32 if they were trained; of a trained norm its weight as stored.
    """
    return digest_arrays(_merged(model, adapter))


def _merged(model: StoredModel, adapter: Adapter) -> Iterator[tuple[str, Array, str]]:
    quantized = set(model.quantized)
    for name in sorted({*adapter.factors, *adapter.scales, *adapter.norms}):
        if name in quantized:
            yield name, model.codes(name), "uint8"
        else:
            yield name, model.tensors.raw(f"{name}.weight"), model.tensors.dtype(f"{name}.weight")
        if name in adapter.scales:
            yield f"{name}.scale", model.scale(name).astype(np.float32), "float32"


def digest_arrays(named: Iterable[tuple[str, Array, str]]) -> str:
    """sha256 over `name\\0type\\0shape\\0` and the little endian bytes, row by row, of every array."""
    digest = hashlib.sha256()
    for name, values, dtype in named:
        digest.update(f"{name}\0{DIGEST_TYPES.get(dtype, dtype)}\0{values.shape}\0".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
