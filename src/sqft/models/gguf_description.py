"""What a GGUF file tells beside its weights. transformers takes seconds to read it: kept of large files."""

import logging
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sqft.artifacts import digest_file, user_cache
from sqft.directories import new_directory
from sqft.errors import ModelError, SqftError, first_line
from sqft.models.gguf_header import read_gguf_header
from sqft.models.tokenizer import load_tokenizer, quiet_transformers

__all__ = ["gguf_config", "gguf_tokenizer"]

logger = logging.getLogger(__name__)
LARGE_BYTES = 16 * 1024 * 1024  # of smaller files nothing is kept: they are read at once


def gguf_config(path: Path) -> Any:
    """The configuration inside a GGUF file. Raises: ModelError if it cannot be read."""
    from transformers import AutoConfig

    def read() -> Any:
        read_gguf_header(path)  # its counts and lengths are believed by who reads it next
        try:
            with quiet_transformers():
                return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        except Exception as error:  # the reader of a damaged file fails in any way it likes
            raise ModelError(f"{path} cannot be read as GGUF ({first_line(error)})") from error

    return _kept(path, "config", AutoConfig.from_pretrained, read)


def gguf_tokenizer(path: Path) -> Any:
    """The tokenizer inside a GGUF file, with a padding token.

    Raises: ModelError if it cannot be read.
    """

    def read() -> Any:
        from transformers import AutoTokenizer

        read_gguf_header(path)
        try:
            with quiet_transformers():
                tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except Exception as error:  # the reader of a damaged file fails in any way it likes
            reason = first_line(error)
            raise ModelError(
                f"the tokenizer of {path} cannot be read ({reason}); give --tokenizer"
            ) from error
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    return _kept(path, "tokenizer", load_tokenizer, read)


def _kept(path: Path, part: str, load: Callable[[Path], Any], read: Callable[[], Any]) -> Any:
    """A part of a large file as it was read before, from the user's cache; else read now, and kept there."""
    if path.stat().st_size < LARGE_BYTES:
        return read()
    name = f"{path.stem}-{digest_file(path)[:12]}-{version('transformers')}"
    place = user_cache() / "gguf" / name / part
    if place.is_dir():
        try:
            return load(place)
        except (SqftError, OSError, ValueError) as error:
            logger.info("%s cannot be read (%s); the file itself is", place, first_line(error))
            return read()
    found = read()
    try:
        with new_directory(place) as partial:
            found.save_pretrained(partial)
    except (SqftError, OSError) as error:
        logger.info("%s cannot be kept (%s)", place, first_line(error))
    return found
