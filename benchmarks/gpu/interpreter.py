"""Triton's interpreter, in which its kernels run without a GPU."""

import os
from typing import Any

__all__ = ["use_interpreter"]


def use_interpreter() -> None:
    """Run Triton's kernels in its interpreter from now on; call it before anything imports Triton.

    Up to Triton 3.6 the interpreter makes loop bounds of arrays of one element in a way that NumPy warns of,
    and refuses from 2.4 on; it is mended here.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton
        from triton.runtime import interpreter
    except ImportError:  # without Triton there is nothing to interpret
        return
    release = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if release > (3, 6):
        return
    plain = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch
