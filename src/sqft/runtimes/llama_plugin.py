"""Our kernels for sparse weights inside llama.cpp, as xllamacpp ships it.

A plain Q4_0 GGUF file is opened as always; its Q4_0 tensors are packed while they are loaded, and their
products run in llama.cpp's own threads (`kernels/native/llama_plugin.cpp`). The file stays as it is.
"""

import ctypes
import functools
import importlib.metadata
from pathlib import Path

from sqft.errors import ExportError, require
from sqft.kernels.native_build import BUILT_FOR, library_path
from sqft.kernels.packed_matrix import LAYOUTS

__all__ = ["packed_tensors", "use_packed_products"]

# What the plug-in calls, in the order of its `struct host_functions`.
FUNCTIONS = (
    "_Z39ggml_backend_cpu_get_extra_buffer_typesv",
    "ggml_backend_cpu_buffer_type",
    "ggml_backend_buft_alloc_buffer",
    "ggml_backend_cpu_reg",
    "ggml_backend_reg_dev_get",
    "ggml_barrier",
)
MUL_MAT = 29  # the number of the product among ggml's operations


def use_packed_products(wanted: bool = True) -> None:
    """Pack the sparse Q4_0 weights of the models that llama.cpp opens from now on in this process, or do not.

    The first call must come before llama.cpp opens its first model, which is when it chooses its buffers.

    Raises: ExportError if the plug-in does not fit the xllamacpp that is installed, or cannot be compiled;
    MissingExtraError without xllamacpp.
    """
    _plugin().sqft_plugin_enable(int(wanted))


def packed_tensors() -> dict[str, int]:
    """How many tensors were packed so far in this process, by layout."""
    plugin = _plugin()
    return {name: plugin.sqft_plugin_packed(i) for i, name in enumerate(LAYOUTS)}


@functools.cache
def _plugin() -> ctypes.CDLL:
    xllamacpp = require("xllamacpp", "gguf")
    found = importlib.metadata.version("xllamacpp")
    if found != BUILT_FOR:
        raise ExportError(
            f"the sparse kernels for llama.cpp fit xllamacpp {BUILT_FOR}, and {found} is installed; install "
            "that version, or go without them"
        )
    try:
        path = library_path("llama")
    except OSError as error:
        raise ExportError(f"the sparse kernels for llama.cpp: {error}") from None
    if path is None:
        raise ExportError("the sparse kernels for llama.cpp need a C and C++ compiler; install gcc or clang")
    extension = next(iter(Path(str(xllamacpp.__file__)).parent.glob("xllamacpp*.so")))
    host, plugin = ctypes.CDLL(str(extension)), ctypes.CDLL(str(path))
    host.ggml_op_name.restype, host.ggml_tensor_overhead.restype = ctypes.c_char_p, ctypes.c_size_t
    plugin.sqft_plugin_packed.restype = ctypes.c_int64
    plugin.sqft_plugin_install.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    try:
        pointers = [ctypes.cast(getattr(host, name), ctypes.c_void_p).value for name in FUNCTIONS]
    except AttributeError as error:
        raise ExportError(f"the sparse kernels cannot be added to this llama.cpp: {error}") from None
    table = (ctypes.c_void_p * len(pointers))(*pointers)
    fits = host.ggml_op_name(MUL_MAT) == b"MUL_MAT"
    if not fits or plugin.sqft_plugin_install(table, host.ggml_tensor_overhead()):
        raise ExportError(
            "this llama.cpp has another binary interface than the sparse kernels expect; go without them"
        )
    return plugin
