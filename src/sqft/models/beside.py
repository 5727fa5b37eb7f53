"""What lies beside the weights of a model directory: config.json, and files that are kept as they are."""

import json
import shutil
from pathlib import Path
from typing import Any

from sqft.errors import ModelError

__all__ = ["copy_kept_files", "read_config"]

# The tokenizer's files and the generation settings.
KEPT_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def copy_kept_files(source_dir: Path, directory: Path) -> None:
    """Copy the tokenizer and the generation settings, as far as they are there."""
    for name in KEPT_FILES:
        if (source_dir / name).is_file():
            shutil.copyfile(source_dir / name, directory / name)


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as it stands. Raises: ModelError if it is missing or holds no configuration."""
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(f"{directory} is not a model directory: it has no config.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}); fetch the model again") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path} holds no configuration; fetch the model again")
    return values
