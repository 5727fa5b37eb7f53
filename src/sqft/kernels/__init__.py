"""Triton kernels for GPUs. Nothing here is needed: without a GPU the operations in `sqft.ops` do the same."""

from importlib.util import find_spec

__all__ = ["has_triton"]


def has_triton() -> bool:
    """Whether Triton is installed (extra: triton)."""
    return find_spec("triton") is not None
