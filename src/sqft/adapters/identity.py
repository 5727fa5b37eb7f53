"""The identity of a base: what an adapter was trained on, as digests of tensors."""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from sqft.adapters.targets import find_targets
from sqft.errors import AdapterError
from sqft.ops import QParams, decode_latent, pack_mask

__all__ = ["base_identity", "base_qparams", "base_tensor", "base_weight", "check_identity", "digest_tensors"]

Named = tuple[str, Tensor]


def base_weight(layer: nn.Module) -> Tensor:
    """The weight that adapters are added to: as stored, or decoded to float32 if it is quantized.

    While an adapter is merged into the layer, it is the base that unmerging brings back.
    """
    tensor, qparams = base_tensor(layer), base_qparams(layer)
    return tensor if qparams is None else decode_latent(tensor, qparams)


def base_tensor(layer: nn.Module) -> Tensor:
    """The tensor that holds the base: a float weight, or the latent of a quantized layer."""
    kept = getattr(layer, "kept_base", None)
    layer = getattr(layer, "base_layer", layer)
    tensor = kept if kept is not None else layer.weight if base_qparams(layer) is None else layer.latent
    assert isinstance(tensor, Tensor)
    return tensor.detach()


def base_qparams(layer: nn.Module) -> QParams | None:
    """The grid of a quantized layer, else None."""
    qparams: QParams | None = getattr(getattr(layer, "base_layer", layer), "qparams", None)
    return qparams


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
    """Digests of what adapters on these modules depend on, equal on every device and in every float dtype.

    "base": the weights as float32, or the decoded ones of a quantized layer; "mask": weight != 0, packed;
    "grid": scales and zero points, "none" for a model without.

    Raises: AdapterError if a module is not there, or has no data.
    """
    layers = find_targets(model, target_modules)
    names = sorted(layers)
    for name in names:
        if base_weight(layers[name]).is_meta:
            raise AdapterError(
                f"{name} holds no data (meta device); load the model before attaching an adapter"
            )
    grids = {name: base_qparams(layers[name]) for name in names}
    grid = [
        (f"{name}.{kind}", tensor)
        for name, qparams in grids.items()
        if qparams is not None
        for kind, tensor in (("scale", qparams.scale.float()), ("zero_point", qparams.zero_point))
    ]
    return {
        "base": digest_tensors((name, base_weight(layers[name]).float()) for name in names),
        "mask": digest_tensors((name, pack_mask(base_weight(layers[name]) != 0)) for name in names),
        "grid": digest_tensors(grid) if grid else "none",
    }


def check_identity(expected: dict[str, str], found: dict[str, str]) -> None:
    """Raises: AdapterError if one of the expected digests differs."""
    for part in ("base", "mask", "grid"):
        if part in expected and expected[part] != found[part]:
            raise AdapterError(
                f"this adapter belongs to another {part} (sha256 {expected[part][:12]}, here "
                f"{found[part][:12]}); load it on the model it was trained on"
            )
