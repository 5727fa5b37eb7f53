"""The identity of a base: what an adapter was trained on, as digests of tensors."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from sqft.adapters.targets import find_targets
from sqft.errors import AdapterError
from sqft.ops import QParams, decode_latent, dequantize, latent_codes, pack_mask, quantize
from sqft.ops.packed import unpack_codes

__all__ = [
    "base_codes",
    "base_identity",
    "base_qparams",
    "base_tensor",
    "base_weight",
    "check_identity",
    "digest_tensors",
    "identity_of",
]

Named = tuple[str, Tensor]
# How a part of an identity is called in an error.
WORDS = {"codes": "base, with other codes", "norms": "base, with other norms"}


def base_weight(layer: nn.Module) -> Tensor:
    """The weight that adapters are added to: as stored, or decoded to float32 if it is quantized.

    While an adapter is merged into the layer, it is the base that unmerging brings back.
    """
    tensor, qparams = base_tensor(layer), base_qparams(layer)
    if qparams is None:
        return tensor
    if _holds_packed(layer):
        return dequantize(base_codes(layer), qparams)
    return decode_latent(tensor, qparams)


def base_tensor(layer: nn.Module) -> Tensor:
    """The tensor that holds the base: a float weight, or the latent or packed codes of a quantized layer."""
    if base_qparams(layer) is None:
        return _original(layer, "weight")
    return _original(layer, "packed" if _holds_packed(layer) else "latent")


def base_qparams(layer: nn.Module) -> QParams | None:
    """The grid of a quantized layer, else None."""
    qparams: QParams | None = getattr(getattr(layer, "base_layer", layer), "qparams", None)
    return None if qparams is None else replace(qparams, scale=_original(layer, "scale").float())


def base_codes(layer: nn.Module) -> Tensor:
    """The codes of a quantized layer, uint8 (out, in)."""
    tensor, qparams = base_tensor(layer), base_qparams(layer)
    assert qparams is not None
    if _holds_packed(layer):
        columns: int = getattr(layer, "base_layer", layer).in_features  # type: ignore[assignment]
        return unpack_codes(tensor, qparams.bits, columns)
    return quantize(tensor, qparams) if tensor.is_floating_point() else latent_codes(tensor)


def _original(layer: nn.Module, key: str) -> Tensor:
    """A tensor of the base, even while a merged adapter has replaced it."""
    kept: dict[str, Tensor] = getattr(layer, "kept", {})
    tensor = kept[key] if key in kept else getattr(getattr(layer, "base_layer", layer), key)
    assert isinstance(tensor, Tensor)
    return tensor.detach()


def _holds_packed(layer: nn.Module) -> bool:
    return hasattr(getattr(layer, "base_layer", layer), "packed")


def digest_tensors(named: Iterable[Named]) -> str:
    """The sha256 over (name, dtype, shape, bytes in row-major order) of every tensor, in the order given."""
    digest = hashlib.sha256()
    for name, tensor in named:
        plain = tensor.detach().cpu().contiguous()
        head = f"{name}\0{str(plain.dtype).removeprefix('torch.')}\0{tuple(plain.shape)}\0"
        digest.update(head.encode())
        digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def base_identity(model: nn.Module, target_modules: Sequence[str] | None = None) -> dict[str, str]:
    """Digests of what low-rank adapters on these modules depend on.

    Raises: AdapterError if a module is not there, or has no data.
    """
    return identity_of(find_targets(model, target_modules))


def identity_of(
    low_rank: Mapping[str, nn.Module],
    scaled: Mapping[str, nn.Module] | None = None,
    norms: Mapping[str, Tensor] | None = None,
) -> dict[str, str]:
    """Digests of what an adapter depends on, equal on every device and in every float dtype.

    low_rank: linears with a low-rank update; "base" is their weights as float32, or the decoded ones of a
    quantized layer, "mask" weight != 0, packed. scaled: linears whose scales are trained; "codes" are those
    of the linears that have no low-rank update. "grid": scales and zero points of both, "none" for a model
    without. norms: the weights of trained norms; "norms" is them as float32. What an adapter does not touch
    has no entry.

    Raises: AdapterError if a module has no data.
    """
    layers = {**low_rank, **(scaled or {})}
    for name, layer in layers.items():
        if base_tensor(layer).is_meta:
            raise AdapterError(
                f"{name} holds no data (meta device); load the model before attaching an adapter"
            )
    grid = [
        (f"{name}.{kind}", tensor)
        for name in sorted(layers)
        if (qparams := base_qparams(layers[name])) is not None
        for kind, tensor in (("scale", qparams.scale.float()), ("zero_point", qparams.zero_point))
    ]
    found = {"grid": digest_tensors(grid) if grid else "none"}
    if low_rank:
        names = sorted(low_rank)
        found["base"] = digest_tensors((name, base_weight(low_rank[name]).float()) for name in names)
        found["mask"] = digest_tensors((name, pack_mask(base_weight(low_rank[name]) != 0)) for name in names)
    frozen = sorted(set(layers) - set(low_rank))
    if frozen:
        found["codes"] = digest_tensors((name, base_codes(layers[name])) for name in frozen)
    if norms:
        found["norms"] = digest_tensors((name, norms[name].float()) for name in sorted(norms))
    return found


def check_identity(expected: dict[str, str], found: dict[str, str]) -> None:
    """Raises: AdapterError if one of the expected digests differs."""
    for part in ("base", "mask", "codes", "grid", "norms"):
        if part in expected and expected[part] != found.get(part):
            here = found.get(part, "none")[:12]
            raise AdapterError(
                f"this adapter belongs to another {WORDS.get(part, part)} (sha256 {expected[part][:12]}, "
                f"here {here}); load it on the model it was trained on"
            )
