"""Refusing an impossible export before anything is trained."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqft.errors import ExportError
from sqft.export.model_export import formats_that_hold
from sqft.export.table import find_format, require_runtime
from sqft.formats.gguf_tokenizer import check_gguf_tokenizer
from sqft.formats.planned import planned_source
from sqft.ops import GridSpec

__all__ = ["check_exports"]


def check_exports(
    formats: Sequence[str],
    config: Any,
    quantized: Mapping[str, tuple[int, int]],
    grid: GridSpec | None,
    tokenizer: Any = None,
) -> None:
    """Check that every format can hold the model that a recipe makes.

    quantized: shapes of the linears on the grid, by name. tokenizer: None leaves it out.

    Raises: ExportError naming the formats that can; MissingExtraError if the runtime that must check a format
    is not installed.
    """
    source = planned_source(config, quantized, grid)
    for name in formats:
        reason = find_format(name).refusal(source)
        if reason is not None:
            can = ", ".join(formats_that_hold(source)) or "none"
            raise ExportError(f"export.formats: {name} cannot hold {reason}; formats that can: {can}")
        require_runtime(name)
        if name == "gguf" and tokenizer is not None:
            check_gguf_tokenizer(tokenizer, int(config.get_text_config().vocab_size))
