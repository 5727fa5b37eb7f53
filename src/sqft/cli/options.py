"""Arguments and options that several commands share, and what they print as JSON."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["AsJson", "Overrides", "RecipePath", "print_json"]

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings to change.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def print_json(value: Any) -> None:
    """Print a result as JSON: dataclasses as objects, paths as texts, what is not a number as null."""
    print(json.dumps(_plain(value), ensure_ascii=False, indent=1, default=str, allow_nan=False))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
