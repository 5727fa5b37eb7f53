"""Opening the models of finished stages, as they were trained on."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["open_adapted", "open_model", "tell_kept_zeros"]

logger = logging.getLogger(__name__)
BasePrecision = Literal["latent", "float32"]


def open_model(
    directory: Path, adapter: Path | None, *, base_precision: BasePrecision = "latent", **loading: Any
) -> "PreTrainedModel":
    """A model for inference in float32, with its adapter if it has one.

    loading: device and trust_remote_code.
    """
    from sqft.models import load_model

    if adapter is not None:
        return open_adapted(directory, adapter, base_precision=base_precision, **loading).eval()
    return load_model(directory, **loading).eval()


def open_adapted(
    directory: Path, adapter: Path, *, base_precision: BasePrecision = "latent", **loading: Any
) -> Any:
    """The base as it was trained on, with the adapter from a directory."""
    from peft import PeftConfig, PeftModel

    import sqft.adapters  # noqa: F401  enters the method into PEFT's tables
    from sqft.models import load_model, load_trainable

    config = PeftConfig.from_pretrained(adapter)
    if config.peft_type == "LORA":  # stock PEFT wants the base in one dtype
        base = load_model(directory, **loading)
    else:
        form = "packed" if getattr(config, "method", "") == "scales" else base_precision
        base = load_trainable(directory, base_precision=form, **loading)
    return PeftModel.from_pretrained(base, adapter)


def tell_kept_zeros(count: int) -> None:
    """Say that a model arrives sparse, where the recipe does not sparsify it."""
    if count:
        logger.warning(
            "%d linears arrive sparse; their zeros are kept, as the recipe has no sparsify section",
            count,
        )
