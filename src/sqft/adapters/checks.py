"""What an adapter refuses: a base that its method does not fit, and scales that no grid can have."""

from torch import Tensor, nn

from sqft.adapters.identity import base_qparams
from sqft.errors import AdapterError

__all__ = ["check_method", "check_scale_values"]


def check_method(method: str, layer: nn.Module, name: str) -> None:
    """Raises: AdapterError if a method needs another kind of base than this layer."""
    qparams = base_qparams(layer)
    base = getattr(layer, "base_layer", layer)
    if method in ("qa_sparse_peft", "scales") and qparams is None:
        raise AdapterError(f"{method} needs a quantized base, and {name} is not; quantize it first")
    if method == "sparse_peft" and qparams is not None:
        raise AdapterError(f"sparse_peft on the quantized {name} would leave its grid; use qa_sparse_peft")
    if method == "qa_sparse_peft" and hasattr(base, "packed"):
        raise AdapterError(
            f"{name} is held as codes alone, and qa_sparse_peft needs the weights before rounding; load the "
            "base with base_precision latent"
        )


def check_scale_values(scale: Tensor, what: str) -> None:
    """Raises: AdapterError if one of the scales is not a finite number above 0."""
    wrong = ~(scale.isfinite() & (scale > 0))
    if bool(wrong.any()):
        kind = "not a number" if bool(scale.isnan().any()) else "zero, negative or infinite"
        raise AdapterError(
            f"{int(wrong.sum())} of {what} are {kind}; train again at a lower scale_learning_rate"
        )
