"""One weight in few bytes. docs/format.md specifies it.

Of a sparse quantized weight it is stored which weights are kept, and their codes; of an embedding or head its
steps of 8 bits.

A packed linear NAME has NAME.weight_mask uint8 (out, ceil(in / 8)), a bit a column, and NAME.weight_kept
uint8, the kept codes row by row as one stream of bits. Scales, zero points and the shape stay as
compressed-tensors has them (`models/packing.py`). A pruned weight has the code of its zero point.

A mask takes a bit a weight whatever its pattern is, and no pattern that CPUs decode fast has offsets that
take less. The weight of an embedding or head NAME with quantize.head is NAME.byte_steps int8 (out, in) and
NAME.byte_scale float16 (out, in / 32).
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from sqft.errors import ModelError
from sqft.models.tensorfile import TensorSpec
from sqft.ops import QuantizedWeight, pack_mask, unpack_mask
from sqft.ops.head_grid import HEAD_GROUP, head_codes, head_qparams

__all__ = [
    "STEPS",
    "head_specs",
    "pack_codes",
    "pack_head",
    "sparse_specs",
    "sparse_takes_less",
    "unpack_codes",
    "unpack_head",
]

STEPS, STEPS_SCALE = ".byte_steps", ".byte_scale"  # end the names of what takes the place of a head's weight


def sparse_specs(name: str, shape: tuple[int, int], bits: int, kept: int) -> dict[str, TensorSpec]:
    """Names, dtypes and shapes of the two tensors that take the place of NAME.weight_packed."""
    return {
        f"{name}.weight_mask": (torch.uint8, (shape[0], math.ceil(shape[1] / 8))),
        f"{name}.weight_kept": (torch.uint8, (math.ceil(kept * bits / 8),)),
    }


def head_specs(name: str, shape: tuple[int, int]) -> dict[str, TensorSpec]:
    """Names, dtypes and shapes of the two tensors that take the place of an embedding's or head's weight."""
    groups = (shape[0], shape[1] // HEAD_GROUP)
    return {f"{name}{STEPS}": (torch.int8, shape), f"{name}{STEPS_SCALE}": (torch.float16, groups)}


def sparse_takes_less(shape: tuple[int, int], bits: int, kept: int) -> bool:
    """Whether a mask and the kept codes take fewer bytes than all codes in words of 32 bits."""
    size = sum(math.prod(shape) for _, shape in sparse_specs("", shape, bits, kept).values())
    return size < math.ceil(shape[1] * bits / 32) * 4 * shape[0]


def pack_codes(
    name: str, codes: UInt8[Tensor, "out in"], mask: Bool[Tensor, "out in"], bits: int
) -> dict[str, Tensor]:
    """The two tensors of a weight. mask: True = kept."""
    return {f"{name}.weight_mask": pack_mask(mask), f"{name}.weight_kept": _pack_bits(codes[mask], bits)}


def unpack_codes(
    name: str,
    tensor: Callable[[str], Tensor],
    in_features: int,
    bits: int,
    zero_point: UInt8[Tensor, "out groups"],
) -> tuple[UInt8[Tensor, "out in"], Bool[Tensor, "out in"]]:
    """Undo `pack_codes`: codes and mask. `tensor` gives a stored tensor by its full name.

    Raises: ModelError if the two tensors do not fit each other.
    """
    packed, kept = tensor(f"{name}.weight_mask"), tensor(f"{name}.weight_kept")
    mask = unpack_mask(packed, in_features)
    count = int(mask.sum())
    if not torch.equal(pack_mask(mask), packed) or kept.shape != (math.ceil(count * bits / 8),):
        raise ModelError(
            f"{name}: the mask and the codes that are kept do not fit each other; fetch it again"
        )
    codes = zero_point.repeat_interleave(in_features // zero_point.shape[1], dim=1).contiguous()
    codes.numpy()[mask.numpy()] = _unpack_bits(kept, count, bits).numpy()
    return codes, mask


def pack_head(name: str, weight: Tensor) -> dict[str, Tensor] | None:
    """The two tensors of an embedding or head whose float16 values lie on a grid of 8 bits; else None."""
    found = head_codes(weight)
    if found is None:
        return None
    steps = (found.codes ^ 128).view(torch.int8)
    return {f"{name}{STEPS}": steps, f"{name}{STEPS_SCALE}": found.qparams.scale.half()}


def unpack_head(name: str, tensor: Callable[[str], Tensor]) -> QuantizedWeight:
    """Undo `pack_head`. `tensor` gives a stored tensor by its full name."""
    codes = tensor(f"{name}{STEPS}").view(torch.uint8) ^ 128
    return QuantizedWeight(codes, head_qparams(tensor(f"{name}{STEPS_SCALE}")))


def _pack_bits(values: UInt8[Tensor, " n"], bits: int) -> UInt8[Tensor, " bytes"]:
    """One value after another, each with its bits, the lowest first."""
    if bits == 4:  # nearly always; half a byte each
        even = torch.nn.functional.pad(values, (0, len(values) % 2)).view(-1, 2)
        return even[:, 0] | even[:, 1] << 4
    ones = np.unpackbits(values.numpy()[:, None], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(ones.reshape(-1), bitorder="little"))


def _unpack_bits(stream: UInt8[Tensor, " bytes"], count: int, bits: int) -> UInt8[Tensor, " n"]:
    """Undo `_pack_bits`."""
    if bits == 4:
        return torch.stack([stream & 15, stream >> 4], dim=1).flatten()[:count]
    ones = np.unpackbits(stream.numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    return torch.from_numpy(np.packbits(ones, axis=1, bitorder="little").reshape(-1))
