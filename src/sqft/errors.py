"""Every error a user can meet. The command line prints one as a single line and exits with code 2.

SqftError
├── RecipeError          the recipe, or a value given on the command line, is wrong
├── DataError            a data or calibration file is missing, empty or malformed
├── ModelError           a model cannot be opened, or its architecture is not understood
├── CompressionError     a layer cannot be sparsified or quantized as asked
├── AdapterError         an adapter does not fit its base, mask or grid
├── TrainingError        training or search cannot go on (NaN loss, nothing to search)
├── CertificateError     a merged model is not, or cannot be shown to be, the model that was trained
├── ExportError          a format cannot hold the model exactly
├── WorkspaceError       the workspace is locked, full, or holds a damaged artefact
└── MissingExtraError    an optional dependency is not installed
"""

from importlib import import_module
from types import ModuleType

__all__ = [
    "AdapterError",
    "CertificateError",
    "CompressionError",
    "DataError",
    "ExportError",
    "MissingExtraError",
    "ModelError",
    "RecipeError",
    "SqftError",
    "TrainingError",
    "WorkspaceError",
    "first_line",
    "is_out_of_memory",
    "require",
]


class SqftError(Exception):
    """Base of all errors that sqft raises on purpose: what is wrong, and what to do."""


class RecipeError(SqftError):
    """The recipe, or an override of it, is wrong."""


class DataError(SqftError):
    """A data file is missing, empty or malformed."""


class ModelError(SqftError):
    """A model cannot be opened or is not understood."""


class CompressionError(SqftError):
    """A layer cannot be sparsified or quantized as asked."""


class AdapterError(SqftError, ValueError):
    """An adapter does not fit its base, mask or grid. PEFT's callers expect a ValueError, and this is one."""


class TrainingError(SqftError):
    """Training or search cannot go on."""


class CertificateError(SqftError):
    """A merged model is not, or cannot be shown to be, the model that was trained."""


class ExportError(SqftError):
    """A format cannot hold the model exactly, or an export differs from it."""


class WorkspaceError(SqftError):
    """The workspace is full, locked, or holds a damaged artefact."""


class MissingExtraError(SqftError):
    """An optional dependency is not installed."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Raises: MissingExtraError naming the extra to install.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        message = f"{module} is not installed; it comes with: pip install 'sqft[{extra}]'"
        raise MissingExtraError(message) from error


def first_line(error: BaseException) -> str:
    """What an error of a library says, for a message of ours: its first line, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a device or on the host. Told by name and text, so that torch stays out."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator: can't allocate memory" in text
        or "CUDA error: out of memory" in text
    )
