"""Fast versions of what `sqft.ops` defines. Nothing here is needed: without them everything works, slower.

tiles            Triton kernels of the adapted weight, for training on GPUs
packed_matrix    compiled kernels for CPUs (native/), for decoding with packed 4-bit weights
reference        what these compute, in plain torch
"""

from importlib.util import find_spec

__all__ = ["has_triton"]


def has_triton() -> bool:
    """Whether Triton is installed (extra: triton)."""
    return find_spec("triton") is not None
